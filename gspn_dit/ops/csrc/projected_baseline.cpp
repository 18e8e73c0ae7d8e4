#define GSPN_ISA baseline
#define GSPN_VECTOR_BYTES 16
#define GSPN_TABLE kBaselineProjected
#include "projected_table.h"
