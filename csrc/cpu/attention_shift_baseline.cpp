#define MMICL_ISA baseline
#define MMICL_TABLE kAttentionShiftBaseline
#include "attention_shift_kernel.h"
