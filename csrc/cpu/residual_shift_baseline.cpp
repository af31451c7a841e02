#define MMICL_ISA baseline
#define MMICL_TABLE kResidualShiftBaseline
#include "residual_shift_kernel.h"
