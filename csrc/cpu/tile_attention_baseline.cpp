#define MMICL_ISA baseline
#define MMICL_TABLE kTileBaseline
#include "tile_attention_kernel.h"
