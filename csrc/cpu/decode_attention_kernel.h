// The kernels themselves, included once per instruction set as attention_shift_kernel.h is.

#include <cstdint>

#include "decode_attention.h"

namespace mmicl {
namespace MMICL_ISA {

#include "vec.h"
#include "head_rows.h"
#include "matrix_product.h"
#include "softmax.h"

// ---- a block of up to kBlockKeys keys ----

// Lane i is the sum of v[i].
template <class Vec>
MMICL_INLINE Vec sums_of(const Vec* v) {
#if defined(__clang__) || __GNUC__ >= 12
  Vec pairs[4], fours[2];
  for (int i = 0; i < 4; ++i) {
    pairs[i] = __builtin_shufflevector(v[2 * i], v[2 * i + 1], 0, 8, 2, 10, 4, 12, 6, 14) +
               __builtin_shufflevector(v[2 * i], v[2 * i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
  }
  for (int i = 0; i < 2; ++i) {
    fours[i] = __builtin_shufflevector(pairs[2 * i], pairs[2 * i + 1], 0, 1, 8, 9, 4, 5, 12, 13) +
               __builtin_shufflevector(pairs[2 * i], pairs[2 * i + 1], 2, 3, 10, 11, 6, 7, 14, 15);
  }
  return __builtin_shufflevector(fours[0], fours[1], 0, 1, 2, 3, 8, 9, 10, 11) +
         __builtin_shufflevector(fours[0], fours[1], 4, 5, 6, 7, 12, 13, 14, 15);
#else
  Vec result = {};
  for (int i = 0; i < kLanes; ++i) result[i] = sum(v[i]);
  return result;
#endif
}

// The products of q with n keys, stride numbers apart; those beyond are of the last key.
template <class T>
MMICL_INLINE void products(acc_t<T>* result, const acc_t<T>* q, const T* keys, int64_t stride, int64_t n,
                           int64_t D) {
  for (int64_t j = 0; j < n; j += kLanes) {
    const T* k[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) k[i] = keys + (j + i < n ? j + i : n - 1) * stride;
    vec_t<T> sums[kLanes] = {};
    int64_t d = 0;
    for (; d + kLanes <= D; d += kLanes) {
      const vec_t<T> lanes = load(q + d);
      for (int64_t i = 0; i < kLanes; ++i) sums[i] += load(k[i] + d) * lanes;
    }
    if (d < D) {
      const vec_t<T> lanes = load_tail(q + d, D - d);
      for (int64_t i = 0; i < kLanes; ++i) sums[i] += load_tail(k[i] + d, D - d) * lanes;
    }
    store(result + j, sums_of(sums));
  }
}

// W * kLanes columns of sums: each takes the n values with their weights p.
template <int W, class T>
MMICL_INLINE void add_columns(acc_t<T>* sums, const acc_t<T>* p, const T* values, int64_t stride, int64_t n) {
  vec_t<T> columns[W];
  for (int i = 0; i < W; ++i) columns[i] = load(sums + i * kLanes);
  for (int64_t j = 0; j < n; ++j) {
    for (int i = 0; i < W; ++i) columns[i] += p[j] * load(values + j * stride + i * kLanes);
  }
  for (int i = 0; i < W; ++i) store(sums + i * kLanes, columns[i]);
}

template <class T>
MMICL_INLINE void add_values(acc_t<T>* sums, const acc_t<T>* p, const T* values, int64_t stride, int64_t n,
                             int64_t D) {
  int64_t d = 0;
  for (; d + 8 * kLanes <= D; d += 8 * kLanes) add_columns<8>(sums + d, p, values + d, stride, n);
  for (; d + 2 * kLanes <= D; d += 2 * kLanes) add_columns<2>(sums + d, p, values + d, stride, n);
  for (; d + kLanes <= D; d += kLanes) add_columns<1>(sums + d, p, values + d, stride, n);
  if (d == D) return;
  vec_t<T> tail = load_tail(sums + d, D - d);
  for (int64_t j = 0; j < n; ++j) tail += p[j] * load_tail(values + j * stride + d, D - d);
  store_tail(sums + d, tail, D - d);
}

// What a part of the keys makes of one query: sums of values, then kSums numbers.
template <class acc>
struct Sums {
  acc* values;
  Softmax<acc> seen, all;

  MMICL_INLINE Sums(const DecodeParams& p, int64_t task, int64_t r)
      : values(static_cast<acc*>(p.partial) + (task * rows(p) + r) * (p.D + kSums)) {}
  MMICL_INLINE void clear(int64_t D) {
    __builtin_memset(values, 0, D * sizeof(acc));
    write(D);
  }
  MMICL_INLINE void read(int64_t D) {
    const acc* x = values + D;
    seen.maximum = x[0], seen.total = x[1], all.maximum = x[2], all.total = x[3];
  }
  MMICL_INLINE void write(int64_t D) const {
    acc* x = values + D;
    x[0] = seen.maximum, x[1] = seen.total, x[2] = all.maximum, x[3] = all.total;
  }
};

// ---- tasks ----

template <class T>
struct Block {  // of keys and values, in T or widened
  const T *keys, *values;
  int64_t stride_k, stride_v;
};

// Query r of the task, with the keys from j to j + n.
template <class T, class E>
MMICL_INLINE void attend_block(const DecodeParams& p, Sums<acc_t<T>>& sums, const acc_t<T>* q,
                               const Block<E>& block, int64_t b, int64_t h, int64_t t, int64_t j, int64_t n) {
  using acc = acc_t<T>;
  const bool gated = p.gate_lse.data;
  const Range keys = keys_of(p, b, t);
  acc scores[kBlockKeys], added[kBlockKeys], weights[kBlockKeys];
  const bool seen = keys.first < j + n && keys.last > j && read_mask(added, p, b, h, t, j, n);
  if (!seen && !gated) return;

  products<E>(scores, q, block.keys, block.stride_k, n, p.D);
  make_scores(scores, p, n);
  if (gated) sums.all.add_gate(weights, scores, p.gate_end[b] - j, n);
  if (!seen) return;

  hide(scores, p, added, keys, j, n);
  const acc before = sums.seen.total, kept = sums.seen.add(weights, scores, n);
  if (kept != 1 && before != 0) {
    for (int64_t d = 0; d < p.D; ++d) sums.values[d] *= kept;
  }
  add_values<E>(sums.values, weights, block.values, block.stride_v, n, p.D);
}

template <class T>
void attend(const DecodeParams& p, void* scratch, int64_t begin, int64_t end) {
  using acc = acc_t<T>;
  const int64_t group = p.H / p.G, R = rows(p);
  acc* queries = static_cast<acc*>(scratch);
  acc* wide_keys = queries + R * p.D;
  acc* wide_values = wide_keys + kBlockKeys * p.D;
  const bool widens = sizeof(T) < sizeof(acc) && R > 1;  // once for all queries
  for (int64_t task = begin; task < end; ++task) {
    const int64_t part = task % parts(p), g = task / parts(p) % p.G, b = task / parts(p) / p.G;
    Range range{p.S, 0};
    for (int64_t t = 0; t < p.T; ++t) range.join(keys_of(p, b, t));
    if (p.gate_lse.data) range.join({0, p.gate_end[b]});
    range.clip(part * kPartKeys, (part + 1) * kPartKeys);
    for (int64_t r = 0; r < R; ++r) {
      const T* q = row<T>(p.q, b, g * group + r / p.T, r % p.T);
      widen_rows<T>(queries + r * p.D, p.D, q, 0, 1, p.D);
      Sums<acc>(p, task, r).clear(p.D);
    }
    for (int64_t j = range.first; j < range.last; j += kBlockKeys) {
      const int64_t n = range.last - j < kBlockKeys ? range.last - j : kBlockKeys;
      const T *keys = row<T>(p.k, b, g, j), *values = row<T>(p.v, b, g, j);
      if (widens) {
        widen_rows<T>(wide_keys, p.D, keys, p.k.stride_t, n, p.D);
        widen_rows<T>(wide_values, p.D, values, p.v.stride_t, n, p.D);
      }
      for (int64_t r = 0; r < R; ++r) {
        Sums<acc> sums(p, task, r);
        sums.read(p.D);
        const acc* q = queries + r * p.D;
        const int64_t h = g * group + r / p.T, t = r % p.T;
        if (widens) {
          attend_block<T, acc>(p, sums, q, {wide_keys, wide_values, p.D, p.D}, b, h, t, j, n);
        } else {
          attend_block<T, T>(p, sums, q, {keys, values, p.k.stride_t, p.v.stride_t}, b, h, t, j, n);
        }
        sums.write(p.D);
      }
    }
  }
}

// Of [begin, end) key heads of batch rows: joins their parts in order and divides.
template <class T>
void combine(const DecodeParams& p, int64_t begin, int64_t end) {
  using acc = acc_t<T>;
  const int64_t group = p.H / p.G, D = p.D;
  for (int64_t index = begin; index < end; ++index) {
    const int64_t b = index / p.G, g = index % p.G;
    for (int64_t r = 0; r < rows(p); ++r) {
      Sums<acc> total(p, index * parts(p), r);
      total.read(D);
      for (int64_t part = 1; part < parts(p); ++part) {
        Sums<acc> other(p, index * parts(p) + part, r);
        other.read(D);
        acc mine, others;
        total.all.join(other.all, mine, others);
        total.seen.join(other.seen, mine, others);
        for (int64_t d = 0; d < D; ++d) total.values[d] = mine * total.values[d] + others * other.values[d];
      }
      const int64_t h = g * group + r / p.T, t = r % p.T;
      const bool blind = total.seen.is_empty();
      const acc inverse = blind ? acc(0) : 1 / total.seen.total;
      scale(row<T>(p.out, b, h, t), inverse, total.values, D);
      *row<acc>(p.lse, b, h, t) = total.seen.lse();
      if (p.gate_lse.data) *row<acc>(p.gate_lse, b, h, t) = blind ? total.seen.maximum : total.all.lse();
    }
  }
}

template <class T>
constexpr DecodeKernels kDecodeKernels = {attend<T>, combine<T>};

}  // namespace MMICL_ISA

const DecodeKernels MMICL_TABLE[4] = {
    MMICL_ISA::kDecodeKernels<float>,
    MMICL_ISA::kDecodeKernels<double>,
    MMICL_ISA::kDecodeKernels<MMICL_ISA::bf16>,
    MMICL_ISA::kDecodeKernels<MMICL_ISA::f16>,
};

}  // namespace mmicl
