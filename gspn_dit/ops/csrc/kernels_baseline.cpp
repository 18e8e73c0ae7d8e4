#define GSPN_ISA baseline
#define GSPN_VECTOR_BYTES 16
#define GSPN_TABLE kBaselineKernels
#define GSPN_NAME "baseline vectors"
#include "kernels.h"
#include "table.h"
