// residual_shift and residual_shift_rms_norm on CPU: what a kernel is given, and which there are. No torch.
//
//   d_bt = sum_k strength_btk scale_a vector_a    y = x + d    out = y, or preserving the norm y |x| / |y|
//   h = residual + x + d (rounded)                normed = h / sqrt(mean(h^2) + eps) (offset + weight)
//
// Letters: B batch, T tokens, C model dim, A adapters, K entries of a batch row, or of a token. acc is float
// for float, bfloat16 and half elements, double for double.
#pragma once

#include <cstdint>

#include "attention_shift.h"
#include "token_rows.h"

namespace mmicl {

struct EntryParams {
  int64_t B = 0, T = 0, C = 0, A = 0, K = 1;
  bool per_token = false;           // every token has entries of its own
  const void* vector = nullptr;     // [A, C] acc
  int64_t stride_vector = 0;        // 0 where all batch rows have the only one
  const void* scale = nullptr;      // [A] acc, or [1] with stride 0; absent = 1
  int64_t stride_scale = 0;
  const int32_t* adapter_ids = nullptr;  // [B, K] or [B, T, K], -1 = none; absent = the batch row's number
  int64_t stride_ids_b = 0, stride_ids_t = 0, stride_ids_k = 0;
  const void* strengths = nullptr;  // [B, K] or [B, T, K] acc, contiguous; absent = 1
  void* combined = nullptr;         // [C] acc of a thread's own, where K > 1: the sum of several entries
};

struct ResidualShiftParams : EntryParams {
  bool preserve_norm = false;
  ConstTokens x;
  MutableTokens out;
};

struct ResidualShiftGradParams : EntryParams {
  ConstTokens dout, x;    // x absent: the norm is not preserved, and dx is dout
  MutableTokens dx;       // may be absent
  void* sums = nullptr;   // [token_tiles(), C] acc, per_token [B * T, C]: the gradient of d; may be absent
};

struct RMSNormParams : EntryParams {
  ConstTokens x, residual;
  const void* weight = nullptr;  // [C] acc
  double eps = 0, offset = 0;
  MutableTokens normed, new_residual, rstd;  // rstd is acc
};

struct RMSNormGradParams : EntryParams {
  ConstTokens dnormed, dnew_residual, new_residual, rstd;  // dnew_residual may be absent
  const void* weight = nullptr;
  double offset = 0;
  MutableTokens dx;
  void *sums = nullptr, *weight_sums = nullptr;  // [token_tiles(), C] acc; either may be absent
};

struct AdapterSumsParams : EntryParams {
  ConstTokens dd;
  // Entries are numbered as [B, T, K]: order[starts[a]] to order[starts[a + 1] - 1] are those of adapter a.
  const int64_t *order = nullptr, *starts = nullptr;
  int64_t parts = 1;     // in which the entries of an adapter are summed
  void* sums = nullptr;  // [A, parts, C] acc
};

struct EntryProductsParams : EntryParams {
  ConstTokens dd;
  void* products = nullptr;  // [B, T, K] acc
};

// A tile is up to kTileTokens tokens of one batch row: enough that what it sums up is little to write.
// The tiling depends on shapes alone, so sums do not depend on the number of threads.
constexpr int64_t kTileTokens = 32;

inline int64_t tiles_per_sequence(const EntryParams& p) { return (p.T + kTileTokens - 1) / kTileTokens; }
inline int64_t token_tiles(const EntryParams& p) { return p.B * tiles_per_sequence(p); }

// Each function does the half-open range [begin, end) of its items, to be split over threads at will.
struct ResidualShiftKernels {
  void (*forward)(const ResidualShiftParams&, int64_t begin, int64_t end);        // tiles
  void (*backward)(const ResidualShiftGradParams&, int64_t begin, int64_t end);   // tiles
  void (*norm_forward)(const RMSNormParams&, int64_t begin, int64_t end);         // tiles
  void (*norm_backward)(const RMSNormGradParams&, int64_t begin, int64_t end);    // tiles
  void (*adapter_sums)(const AdapterSumsParams&, int64_t begin, int64_t end);      // parts of adapters
  void (*entry_products)(const EntryProductsParams&, int64_t begin, int64_t end);  // tokens
};

const ResidualShiftKernels& residual_shift_kernels(ElementType type);

// One table per translation unit, indexed by ElementType.
extern const ResidualShiftKernels kResidualShiftBaseline[4];
extern const ResidualShiftKernels kResidualShiftAvx2[4];
extern const ResidualShiftKernels kResidualShiftAvx512[4];

}  // namespace mmicl
