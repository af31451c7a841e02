#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>

#include "attention_backward.h"

// From here on, so that headers above keep the baseline.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#define MMICL_AVX2
#define MMICL_ISA avx2
#define MMICL_TABLE kAttentionBackwardAvx2
#include "attention_backward_kernel.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
