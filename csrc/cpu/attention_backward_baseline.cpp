#define MMICL_ISA baseline
#define MMICL_TABLE kAttentionBackwardBaseline
#include "attention_backward_kernel.h"
