// Shifted attention of a few queries on CPU: every key and value is read once. No torch here.
//
//   s = softcap tanh(scale q.k / softcap) + mask      out = softmax(s) v      lse = log sum exp(s)
//
// over the keys from first to last of each query, and for an all_keys gate the log sum of all keys up to
// gate_end, whatever is hidden. A task is one key head of one batch row, with all the queries that read it, and
// one part of its keys: parts depend on the shapes alone, so results do not depend on the number of threads.
// Letters: B batch, T queries, H heads, G key heads, S keys, D head dim. acc as in attention_shift.h.
#pragma once

#include <cstdint>

#include "attention_shift.h"

namespace mmicl {

enum class MaskType { none, boolean, f32, f64, bf16, f16 };

struct DecodeParams {
  int64_t B, H, G, T, S, D;
  ConstRows q, k, v;
  MutableRows out;              // [B, H, T, D]
  MutableRows lse, gate_lse;    // [B, H, T] acc; gate_lse absent unless all_keys
  const void* mask = nullptr;   // [B, H, T, S] by its strides: true is seen, or added
  MaskType mask_type = MaskType::none;
  int64_t mask_b = 0, mask_h = 0, mask_t = 0, mask_s = 0;
  const int64_t *first, *last;  // [B, T]: keys from first to before last may be seen
  const int64_t* gate_end;      // [B], read if there is a gate_lse
  double scale, softcap;        // softcap 0: none
  void* partial;                // [tasks(), rows(), D + kSums] acc
};

constexpr int64_t kPartKeys = 1024;
constexpr int64_t kBlockKeys = 64;
constexpr int64_t kSums = 4;  // beside D sums of values: maximum, sum of exp; the gate's two

inline int64_t rows(const DecodeParams& p) { return p.H / p.G * p.T; }
inline int64_t parts(const DecodeParams& p) {
  return p.S <= kPartKeys ? 1 : (p.S + kPartKeys - 1) / kPartKeys;
}
inline int64_t tasks(const DecodeParams& p) { return p.B * p.G * parts(p); }
// Numbers of acc that a thread needs: queries, and a block of keys and values.
inline int64_t scratch_size(const DecodeParams& p) { return (rows(p) + 2 * kBlockKeys) * p.D; }

struct DecodeKernels {
  void (*attend)(const DecodeParams&, void* scratch, int64_t begin, int64_t end);  // tasks
  void (*combine)(const DecodeParams&, int64_t begin, int64_t end);                // B * G, after attend
};

const DecodeKernels& decode_kernels(ElementType type);

extern const DecodeKernels kDecodeBaseline[4];
extern const DecodeKernels kDecodeAvx2[4];
extern const DecodeKernels kDecodeAvx512[4];

}  // namespace mmicl
