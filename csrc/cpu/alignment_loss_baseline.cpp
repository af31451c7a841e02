#define MMICL_ISA baseline
#define MMICL_TABLE kAlignmentLossBaseline
#include "alignment_loss_kernel.h"
