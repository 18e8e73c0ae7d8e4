#define GSPN_ISA amx
#define GSPN_VECTOR_BYTES 64
#define GSPN_TABLE kAmxProjected
#include "projected_table.h"
