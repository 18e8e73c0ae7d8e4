#define GSPN_ISA baseline
#define GSPN_VECTOR_BYTES 16
#define GSPN_TABLE kBaselineKernels
#include "kernels.h"
#include "table.h"
