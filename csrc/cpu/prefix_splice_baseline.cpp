#define MMICL_ISA baseline
#define MMICL_TABLE kPrefixSpliceBaseline
#include "prefix_splice_kernel.h"
