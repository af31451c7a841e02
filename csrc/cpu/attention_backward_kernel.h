// The kernels themselves, included once per instruction set as attention_shift_kernel.h is.

#include <cstdint>

#include "attention_backward.h"

namespace mmicl {
namespace MMICL_ISA {

#include "vec.h"
#include "head_rows.h"
#include "matrix_product.h"
#include "softmax.h"

template <class T>
struct Backward {
  using acc = acc_t<T>;
  const AttentionBackwardParams& p;
  const int64_t D;  // in whole panels
  // Of a tile of keys: panels of the transposed keys and values, and of keys; gradients.
  acc *keys_t, *values_t, *keys, *dk, *dv;
  // Of a block of queries: rows and panels.
  acc *q, *q_panels, *dout, *dout_panels;
  acc *weights, *dscores, *added;  // [kBlock, kBlock]

  Backward(const AttentionBackwardParams& p, void* scratch) : p(p), D(in_panels(p.D)) {
    acc** of_keys_and_queries[] = {&keys_t, &values_t, &keys, &dk, &dv, &q, &q_panels, &dout, &dout_panels};
    acc* next = static_cast<acc*>(scratch);
    for (acc** memory : of_keys_and_queries) *memory = next, next += kBlock * D;
    weights = next, dscores = weights + kBlock * kBlock, added = dscores + kBlock * kBlock;
  }

  // Weights and dscores of query t of head h, of count keys from j on, of their products with q and with dout.
  MMICL_INLINE void weigh(acc* w, acc* ds, const acc* seen, int64_t b, int64_t h, int64_t t, int64_t j,
                          int64_t count) const {
    const acc lse = *row<acc>(p.given_lse, b, h, t), delta = *row<acc>(p.delta, b, h, t);
    const int64_t whole = (count + kLanes - 1) / kLanes * kLanes;
    if (lse == -acc(__builtin_inf())) {
      for (int64_t i = 0; i < whole; i += kLanes) store(w + i, vec_t<acc>{}), store(ds + i, vec_t<acc>{});
      return;
    }
    acc slope[kBlock];
    make_scores(w, p, count);
    if (p.softcap > 0) {
      for (int64_t i = 0; i < count; ++i) slope[i] = 1 - (w[i] / acc(p.softcap)) * (w[i] / acc(p.softcap));
    }
    hide(w, p, seen, keys_of(p, b, t), j, count);
    for (int64_t i = 0; i < whole; i += kLanes) {
      const vec_t<acc> weight = exp_nonpositive<acc>(load(w + i) - lse);
      const vec_t<acc> product = weight * (load(ds + i) - delta) * acc(p.scale);
      store(w + i, weight);
      store(ds + i, weight != 0 ? product : vec_t<acc>{});  // what is hidden may be anything
    }
    if (p.softcap > 0) {
      for (int64_t i = 0; i < count; ++i) ds[i] = w[i] != 0 ? ds[i] * slope[i] : acc(0);
    }
  }

  // Queries from t to t + M of head h, with n keys from j on; their dq is rows of D numbers.
  MMICL_INLINE void block(acc* dq, int64_t b, int64_t h, int64_t t, int64_t M, int64_t j, int64_t n) const {
    Range range{p.S, 0};
    for (int64_t i = 0; i < M; ++i) range.join(keys_of(p, b, t + i));
    range.clip(j, j + n);
    if (range.is_empty()) return;
    // Whole panels of the keys that some query sees.
    const int64_t low = (range.first - j) / kPanel * kPanel, count = range.last - j - low;
    if (p.mask_type != MaskType::none) {
      bool any = false;
      for (int64_t i = 0; i < M; ++i) any |= read_mask(added + i * kBlock, p, b, h, t + i, j + low, count);
      if (!any) return;
    }

    const T *rows_q = row<T>(p.q, b, h, t), *rows_dout = row<T>(p.dout, b, h, t);
    widen_rows<T>(q, D, rows_q, p.q.stride_t, M, p.D);
    widen_rows<T>(dout, D, rows_dout, p.dout.stride_t, M, p.D);
    pack<T>(q_panels, rows_q, p.q.stride_t, M, p.D);
    pack<T>(dout_panels, rows_dout, p.dout.stride_t, M, p.D);

    multiply<false>(weights, kBlock, Left<acc>{q, D, 1}, keys_t + low * p.D, kPanel * p.D, M, count, p.D);
    multiply<false>(dscores, kBlock, Left<acc>{dout, D, 1}, values_t + low * p.D, kPanel * p.D, M, count, p.D);
    for (int64_t i = 0; i < M; ++i) {
      weigh(weights + i * kBlock, dscores + i * kBlock, added + i * kBlock, b, h, t + i, j + low, count);
    }
    multiply<true>(dv + low * D, D, Left<acc>{weights, 1, kBlock}, dout_panels, M * kPanel, count, p.D, M);
    multiply<true>(dk + low * D, D, Left<acc>{dscores, 1, kBlock}, q_panels, M * kPanel, count, p.D, M);
    multiply<true>(dq, D, Left<acc>{dscores, kBlock, 1}, keys + low * kPanel, n * kPanel, M, p.D, count);
  }

  // n keys from j on, with all queries that read them.
  MMICL_INLINE void tile(acc* dq_of_row, int64_t b, int64_t g, int64_t j, int64_t n) const {
    pack_transposed<T>(keys_t, row<T>(p.k, b, g, j), p.k.stride_t, n, p.D);
    pack_transposed<T>(values_t, row<T>(p.v, b, g, j), p.v.stride_t, n, p.D);
    pack<T>(keys, row<T>(p.k, b, g, j), p.k.stride_t, n, p.D);
    __builtin_memset(dk, 0, n * D * sizeof(acc));
    __builtin_memset(dv, 0, n * D * sizeof(acc));
    const int64_t group = p.H / p.G;
    for (int64_t h = g * group; h < (g + 1) * group; ++h) {
      for (int64_t t = 0; t < p.T; t += kBlock) {
        block(dq_of_row + (h * p.T + t) * D, b, h, t, t + kBlock < p.T ? kBlock : p.T - t, j, n);
      }
    }
    for (int64_t i = 0; i < n; ++i) {
      scale(row<T>(p.dk, b, g, j + i), acc(1), dk + i * D, p.D);
      scale(row<T>(p.dv, b, g, j + i), acc(1), dv + i * D, p.D);
    }
  }
};

template <class T>
void attend_backward(const AttentionBackwardParams& p, void* scratch, int64_t begin, int64_t end) {
  const Backward<T> backward(p, scratch);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t part = task % p.parts, g = task / p.parts % p.G, b = task / p.parts / p.G;
    const int64_t of_head = p.T * in_panels(p.D), group = p.H / p.G;
    acc_t<T>* dq = static_cast<acc_t<T>*>(p.partial) + (part * p.B + b) * p.H * of_head;
    __builtin_memset(dq + g * group * of_head, 0, group * of_head * sizeof(acc_t<T>));
    for (int64_t j = part * kBlock; j < p.S; j += p.parts * kBlock) {
      backward.tile(dq, b, g, j, j + kBlock < p.S ? kBlock : p.S - j);
    }
  }
}

template <class T>
void find_delta(const AttentionBackwardParams& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t t = i % p.T, h = i / p.T % p.H, b = i / p.T / p.H;
    const T *x = row<T>(p.dout, b, h, t), *y = row<T>(p.base, b, h, t);
    vec_t<T> sums = {};
    int64_t d = 0;
    for (; d + kLanes <= p.D; d += kLanes) sums += load(x + d) * load(y + d);
    if (d < p.D) sums += load_tail(x + d, p.D - d) * load_tail(y + d, p.D - d);
    *row<acc_t<T>>(p.delta, b, h, t) = sum(sums);
  }
}

template <class T>
void add_parts(const AttentionBackwardParams& p, int64_t begin, int64_t end) {
  using acc = acc_t<T>;
  const int64_t D = in_panels(p.D), rows = p.B * p.H * p.T;
  for (int64_t i = begin; i < end; ++i) {
    acc* total = static_cast<acc*>(p.partial) + i * D;
    for (int64_t part = 1; part < p.parts; ++part) accumulate<acc>(total, 1, total + part * rows * D, p.D);
    scale(row<T>(p.dq, i / p.T / p.H, i / p.T % p.H, i % p.T), acc(1), total, p.D);
  }
}

template <class T>
constexpr AttentionBackwardKernels kAttentionBackwardKernels = {find_delta<T>, attend_backward<T>, add_parts<T>};

}  // namespace MMICL_ISA

const AttentionBackwardKernels MMICL_TABLE[4] = {
    MMICL_ISA::kAttentionBackwardKernels<float>,
    MMICL_ISA::kAttentionBackwardKernels<double>,
    MMICL_ISA::kAttentionBackwardKernels<MMICL_ISA::bf16>,
    MMICL_ISA::kAttentionBackwardKernels<MMICL_ISA::f16>,
};

}  // namespace mmicl
