// Attention on CPU: what the kernels of few and of many queries are given. No torch here.
//
//   s = softcap tanh(scale q.k / softcap) + mask      out = softmax(s) v      lse = log sum exp(s)
//
// over the keys from first to last of each query, and for an all_keys gate the log sum of all keys up to
// gate_end, whatever is hidden. Tasks depend on the shapes alone, so results do not depend on the number of
// threads. Letters: B batch, T queries, H heads, G key heads, S keys, D head dim. acc as in attention_shift.h.
#pragma once

#include <cstdint>

#include "attention_shift.h"

namespace mmicl {

enum class MaskType { none, boolean, f32, f64, bf16, f16 };

struct AttentionParams {
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
};

constexpr int64_t kSums = 4;    // of a query, beside D sums of values: maximum, sum of exp; the gate's two
constexpr int64_t kPanel = 16;  // columns that lie together in a product of matrices

constexpr int64_t in_panels(int64_t n) { return (n + kPanel - 1) / kPanel * kPanel; }

}  // namespace mmicl
