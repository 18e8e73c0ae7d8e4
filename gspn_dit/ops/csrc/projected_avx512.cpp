#define GSPN_ISA avx512
#define GSPN_VECTOR_BYTES 64
#define GSPN_TABLE kAvx512Projected
#include "projected_table.h"
