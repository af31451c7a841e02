// attention_shift on CPU: what a kernel is given, and which kernels there are. No torch here.
//
//   g = q.weight_h + bias_h      mu = sigmoid(g - lse)      result = out + mu shift_h
//   c = dout.shift_h             dg = mu (1 - mu) c
//   dweight_h = sum dg q         dbias_h = sum dg           dshift_h = sum mu dout      dq = dg weight_h
//
// That is one virtual key for each head (attention_shift_kernel.h). Of N, of P heads of which each stands for
// H / P neighbouring ones, of another adapter for each query, or of a prefix, which takes mu from out
// (virtual_keys_kernel.h):
//
//   G = log sum_n exp(g_n)       mu = sigmoid(G - lse)      p_n = mu exp(g_n - G)
//   result = (1 - c mu) out + sum_n p_n shift_n             c: 1 for a prefix, else 0
//   s_n = dout.(shift_n - c a)   S = sum_n exp(g_n - G) s_n dg_n = p_n ((s_n - S) + (1 - mu) S)
//
// mu = 0 where lse is infinite or there is no adapter. Letters: B batch, T queries, H heads, D head dim, A
// adapters. acc is float for float, bfloat16 and half elements, double for double.
#pragma once

#include <cstdint>

namespace mmicl {

enum class ElementType { f32, f64, bf16, f16 };

// Rows of a [B, H, T, D] tensor (or the scalars of a [B, H, T] one). Strides in elements.
template <class Void>
struct Rows {
  Void* data = nullptr;
  int64_t stride_b = 0, stride_h = 0, stride_t = 0;
};
using ConstRows = Rows<const void>;
using MutableRows = Rows<void>;

constexpr int64_t kMaxKeys = 2048;

struct ShiftParams {
  int64_t B, H, T, D, A, P, N;
  const void* weight = nullptr;          // [A, P, N, D] acc, contiguous
  const int32_t* adapter_ids = nullptr;  // [B, T], -1 = none; absent = adapter 0
  int64_t stride_ids = 0, stride_ids_t = 0;
  bool ids_per_query = false;
  const bool* prefix = nullptr;  // [A]; absent = none
  int64_t stride_prefix = 0;

  bool is_one_key() const { return N == 1 && P == H && !prefix && !ids_per_query; }
};

struct GateParams : ShiftParams {
  const void* bias = nullptr;   // [A, P, N] acc, contiguous
  const void* shift = nullptr;  // [A, P, N, D] acc, contiguous
  ConstRows q, lse;             // lse is acc
};

struct ForwardParams : GateParams {
  ConstRows out;
  MutableRows result;  // may be the memory of out
};

struct BackwardParams : GateParams {
  ConstRows dout, a;     // a: the attention output before the shift
  MutableRows dg;        // [B, H, T, N] acc, N contiguous
  MutableRows dq, base;  // either may be absent; dout.base = dout.a + dg
  MutableRows total;     // acc; of several keys: the sum of dg, mu (1 - mu) S
  MutableRows lift;      // acc; beside a prefix: -log(1 - mu) where there is one, else 0
  // Of one key [tiles(), 2 D + 1] acc: dweight, dshift, dbias of one tile. Of several [B, H, T, N] acc: p.
  void* partial = nullptr;
  void *dweight = nullptr, *dbias = nullptr, *dshift = nullptr;  // like weight, bias, shift
};

struct GateGradParams : ShiftParams {
  MutableRows dq;
  ConstRows dg;  // [B, H, T, N] acc, N contiguous
};

// A tile is up to kTileRows queries of one head of one batch row. The tiling depends on shapes alone, so
// sums over tiles do not depend on the number of threads. Heads run fastest: [B, T, H, D] memory is
// then walked almost in order.
constexpr int64_t kTileRows = 16;

inline int64_t tiles_per_row(const ShiftParams& p) { return (p.T + kTileRows - 1) / kTileRows; }
inline int64_t tiles(const ShiftParams& p) { return p.B * tiles_per_row(p) * p.H; }

// Each function does the half-open range [begin, end) of its items, to be split over threads at will.
struct AttentionShiftKernels {
  void (*forward)(const ForwardParams&, int64_t begin, int64_t end);           // tiles
  void (*backward)(const BackwardParams&, int64_t begin, int64_t end);         // tiles
  void (*reduce)(const BackwardParams&, int64_t begin, int64_t end);           // P, after backward
  void (*add_gate_grad)(const GateGradParams&, int64_t begin, int64_t end);    // tiles
};

// The instruction set in use ("avx512", "avx2" or "baseline") and its kernels.
const char* isa();
const AttentionShiftKernels& attention_shift_kernels(ElementType type);

// One table per translation unit, indexed by ElementType.
extern const AttentionShiftKernels kAttentionShiftBaseline[4];
extern const AttentionShiftKernels kAttentionShiftAvx2[4];
extern const AttentionShiftKernels kAttentionShiftAvx512[4];

}  // namespace mmicl
