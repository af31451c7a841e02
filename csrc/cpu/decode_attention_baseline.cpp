#define MMICL_ISA baseline
#define MMICL_TABLE kDecodeBaseline
#include "decode_attention_kernel.h"
