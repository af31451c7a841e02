// Picks the instruction set once per process, as the machine and MMICL_CPU_ISA allow.

#include <cstdlib>
#include <cstring>

#include "alignment_loss.h"
#include "attention_backward.h"
#include "attention_shift.h"
#include "decode_attention.h"
#include "prefix_splice.h"
#include "residual_shift.h"
#include "tile_attention.h"

namespace mmicl {
namespace {

enum Isa { kBaseline, kAvx2, kAvx512 };
constexpr const char* kNames[] = {"baseline", "avx2", "avx512"};

Isa supported() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  // every processor with AVX2 and FMA converts halves (F16C); not every compiler can be asked
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2 && avx512) return kAvx512;
  if (avx2) return kAvx2;
#endif
  return kBaseline;
}

// MMICL_CPU_ISA can only lower the choice; a name it does not know changes nothing.
Isa choose() {
  const Isa best = supported();
  const char* wanted = std::getenv("MMICL_CPU_ISA");
  for (int isa = kBaseline; wanted && isa < best; ++isa) {
    if (std::strcmp(wanted, kNames[isa]) == 0) return static_cast<Isa>(isa);
  }
  return best;
}

Isa chosen() {
  static const Isa isa = choose();
  return isa;
}

}  // namespace

const char* isa() { return kNames[chosen()]; }

const AlignmentLossKernels& alignment_loss_kernels(ElementType states) {
  const int i = static_cast<int>(states);
#if defined(__x86_64__)
  if (chosen() == kAvx512) return kAlignmentLossAvx512[i];
  if (chosen() == kAvx2) return kAlignmentLossAvx2[i];
#endif
  return kAlignmentLossBaseline[i];
}

const AttentionBackwardKernels& attention_backward_kernels(ElementType type) {
  const int i = static_cast<int>(type);
#if defined(__x86_64__)
  if (chosen() == kAvx512) return kAttentionBackwardAvx512[i];
  if (chosen() == kAvx2) return kAttentionBackwardAvx2[i];
#endif
  return kAttentionBackwardBaseline[i];
}

const AttentionShiftKernels& attention_shift_kernels(ElementType type) {
  const int i = static_cast<int>(type);
#if defined(__x86_64__)
  if (chosen() == kAvx512) return kAttentionShiftAvx512[i];
  if (chosen() == kAvx2) return kAttentionShiftAvx2[i];
#endif
  return kAttentionShiftBaseline[i];
}

const DecodeKernels& decode_kernels(ElementType type) {
  const int i = static_cast<int>(type);
#if defined(__x86_64__)
  if (chosen() == kAvx512) return kDecodeAvx512[i];
  if (chosen() == kAvx2) return kDecodeAvx2[i];
#endif
  return kDecodeBaseline[i];
}

const PrefixSpliceKernels& prefix_splice_kernels(ElementType out) {
  const int i = static_cast<int>(out);
#if defined(__x86_64__)
  if (chosen() == kAvx512) return kPrefixSpliceAvx512[i];
  if (chosen() == kAvx2) return kPrefixSpliceAvx2[i];
#endif
  return kPrefixSpliceBaseline[i];
}

const ResidualShiftKernels& residual_shift_kernels(ElementType type) {
  const int i = static_cast<int>(type);
#if defined(__x86_64__)
  if (chosen() == kAvx512) return kResidualShiftAvx512[i];
  if (chosen() == kAvx2) return kResidualShiftAvx2[i];
#endif
  return kResidualShiftBaseline[i];
}

const TileKernels& tile_kernels(ElementType type) {
  const int i = static_cast<int>(type);
#if defined(__x86_64__)
  if (chosen() == kAvx512) return kTileAvx512[i];
  if (chosen() == kAvx2) return kTileAvx2[i];
#endif
  return kTileBaseline[i];
}

}  // namespace mmicl
