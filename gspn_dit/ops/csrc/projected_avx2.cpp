#define GSPN_ISA avx2
#define GSPN_VECTOR_BYTES 32
#define GSPN_TABLE kAvx2Projected
#include "projected_table.h"
