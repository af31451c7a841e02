// The kernels themselves. Included once per instruction set, with MMICL_ISA (a namespace) and
// MMICL_TABLE (the table to define) set by the including file, after its target pragma.
//
// No standard library templates below: the linker merges their instances across translation units, and
// one compiled for AVX-512 could then run on a machine without it.

#include <cstdint>

#include "attention_shift.h"

namespace mmicl {
namespace MMICL_ISA {

#include "vec.h"
#include "head_rows.h"

struct Tile {
  int64_t b, h, t_begin, t_end;
  int64_t head;  // of [A * H], or -1: no adapter

  MMICL_INLINE Tile(const ShiftParams& p, int64_t index) {
    const int64_t per_row = tiles_per_row(p);
    h = index % p.H;
    b = index / (p.H * per_row);
    t_begin = index / p.H % per_row * kTileRows;
    t_end = t_begin + kTileRows < p.T ? t_begin + kTileRows : p.T;
    const int64_t adapter = p.adapter_ids ? p.adapter_ids[b * p.stride_ids] : 0;
    head = adapter < 0 ? -1 : adapter * p.H + h;
  }
};

template <class T>
MMICL_INLINE void copy(T* y, const T* x, int64_t D) {
  if (y != x) __builtin_memcpy(y, x, D * sizeof(T));
}

// The head's parameters, and the gates of up to kLanes of its queries at once.
template <class T>
struct Head {
  using acc = acc_t<T>;
  const GateParams& p;
  const Tile& tile;
  const acc *weight, *shift;
  acc bias;

  MMICL_INLINE Head(const GateParams& p, const Tile& tile)
      : p(p),
        tile(tile),
        weight(static_cast<const acc*>(p.weight) + tile.head * p.D),
        shift(static_cast<const acc*>(p.shift) + tile.head * p.D),
        bias(static_cast<const acc*>(p.bias)[tile.head]) {}

  MMICL_INLINE bool is_shifted(int64_t t) const {
    return !__builtin_isinf(*row<acc>(p.lse, tile.b, tile.h, t));
  }

  MMICL_INLINE Sigmoid<acc> gates(int64_t t, int64_t n) const {
    acc logits[kLanes] = {};
    for (int64_t i = 0; i < n; ++i) {
      const acc g = dot(row<T>(p.q, tile.b, tile.h, t + i), weight, p.D) + bias;
      logits[i] = g - *row<acc>(p.lse, tile.b, tile.h, t + i);
    }
    return Sigmoid<acc>(load(logits));
  }
};

MMICL_INLINE int64_t block_rows(const Tile& tile, int64_t t) {
  return tile.t_end - t < kLanes ? tile.t_end - t : kLanes;
}

template <class T>
void forward_unshifted(const ForwardParams& p, const Tile& tile) {
  for (int64_t t = tile.t_begin; t < tile.t_end; ++t) {
    copy(row<T>(p.result, tile.b, tile.h, t), row<T>(p.out, tile.b, tile.h, t), p.D);
  }
}

template <class T>
void forward_tile(const ForwardParams& p, const Tile& tile) {
  const Head<T> head(p, tile);
  for (int64_t t = tile.t_begin; t < tile.t_end; t += kLanes) {
    const int64_t n = block_rows(tile, t);
    const auto mu = head.gates(t, n).mu;
    for (int64_t i = 0; i < n; ++i) {
      const T* out = row<T>(p.out, tile.b, tile.h, t + i);
      T* result = row<T>(p.result, tile.b, tile.h, t + i);
      if (head.is_shifted(t + i)) {
        add_scaled(result, out, mu[i], head.shift, p.D);
      } else {
        copy(result, out, p.D);
      }
    }
  }
}

// What backward writes for a query that is not shifted.
template <class T>
MMICL_INLINE void backward_unshifted(const BackwardParams& p, int64_t b, int64_t h, int64_t t) {
  *row<acc_t<T>>(p.dg, b, h, t) = 0;
  if (p.dq.data) __builtin_memset(row<T>(p.dq, b, h, t), 0, p.D * sizeof(T));
  if (p.base.data) copy(row<T>(p.base, b, h, t), row<T>(p.a, b, h, t), p.D);
}

template <class T>
MMICL_INLINE acc_t<T> get(const T* x, int64_t d) {
  return load_tail(x + d, 1)[0];
}

template <class T>
MMICL_INLINE void set(T* x, int64_t d, acc_t<T> value) {
  store_tail(x + d, vec_t<T>{value}, 1);
}

// n of a row's elements from x on, n <= kLanes; the missing lanes are zero.
template <class T>
MMICL_INLINE vec_t<T> load_block(const T* x, int64_t n) {
  return n == kLanes ? load(x) : load_tail(x, n);
}

// The kCarrying columns in which the row w is largest, the largest first.
constexpr int64_t kCarrying = 3;

template <class T>
MMICL_INLINE int64_t largest_columns(int64_t* columns, const T* w, int64_t D) {
  acc_t<T> sizes[kCarrying] = {-1, -1, -1};
  for (int64_t d = 0; d < D; d += kLanes) {
    const int64_t n = D - d < kLanes ? D - d : kLanes;
    const vec_t<T> block = load_block(w + d, n);
    const auto larger = (block < 0 ? -block : block) > sizes[kCarrying - 1];
    if (!sum(larger)) continue;  // most blocks, past the first
    for (int64_t lane = 0; lane < n; ++lane) {
      const acc_t<T> size = block[lane] < 0 ? -block[lane] : block[lane];
      if (!(size > sizes[kCarrying - 1])) continue;
      int64_t i = kCarrying - 1;
      for (; i > 0 && size > sizes[i - 1]; --i) sizes[i] = sizes[i - 1], columns[i] = columns[i - 1];
      sizes[i] = size, columns[i] = d + lane;
    }
  }
  int64_t found = 0;
  while (found < kCarrying && sizes[found] > 0) ++found;
  return found;
}

// The columns of y in which w is largest take up what rounding took from the product w.y, each what the one
// before left. A stock backward reads the product alone.
template <class T>
MMICL_INLINE void carry(const T* w, T* y, acc_t<T> left, int64_t D) {
  int64_t columns[kCarrying];
  const int64_t n = largest_columns(columns, w, D);
  for (int64_t i = 0; i < n; ++i) left += get(w, columns[i]) * get(y, columns[i]);
  for (int64_t i = 0; i < n; ++i) {
    const acc_t<T> weight = get(w, columns[i]);
    set(y, columns[i], left / weight);
    left -= weight * get(y, columns[i]);
  }
}

// y = x + a s, rounded, with the product w.y of before rounding.
template <class T>
MMICL_INLINE void add_scaled_for(const T* w, T* y, const T* x, acc_t<T> a, const acc_t<T>* s, int64_t D) {
  add_scaled(y, x, a, s, D);
  if (sizeof(T) == sizeof(acc_t<T>)) return;
  vec_t<T> lost = {};
  for (int64_t d = 0; d < D; d += kLanes) {
    const int64_t n = D - d < kLanes ? D - d : kLanes;
    const vec_t<T> exact = load_block(x + d, n) + a * load_block(s + d, n);
    lost += load_block(w + d, n) * (exact - load_block(y + d, n));
  }
  carry(w, y, sum(lost), D);
}

template <class T>
void backward_tile(const BackwardParams& p, const Tile& tile, acc_t<T>* partial) {
  using acc = acc_t<T>;
  const Head<T> head(p, tile);
  const int64_t b = tile.b, h = tile.h;
  acc* dweight = partial;
  acc* dshift = partial + p.D;
  acc dbias = 0;
  __builtin_memset(partial, 0, 2 * p.D * sizeof(acc));

  for (int64_t block = tile.t_begin; block < tile.t_end; block += kLanes) {
    const int64_t n = block_rows(tile, block);
    const Sigmoid<acc> gates = head.gates(block, n);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t t = block + i;
      if (!head.is_shifted(t)) {
        backward_unshifted<T>(p, b, h, t);
        continue;
      }
      const acc mu = gates.mu[i];
      const T* dout = row<T>(p.dout, b, h, t);
      const acc dg = mu * gates.complement[i] * dot(dout, head.shift, p.D);

      *row<acc>(p.dg, b, h, t) = dg;
      dbias += dg;
      accumulate(dweight, dg, row<T>(p.q, b, h, t), p.D);
      accumulate(dshift, mu, dout, p.D);
      if (p.dq.data) scale(row<T>(p.dq, b, h, t), dg, head.weight, p.D);
      if (p.base.data) {
        const T* a = row<T>(p.a, b, h, t);
        add_scaled_for(dout, row<T>(p.base, b, h, t), a, mu * gates.complement[i], head.shift, p.D);
      }
    }
  }
  partial[2 * p.D] = dbias;
}

#include "virtual_keys_kernel.h"

template <class T>
void forward(const ForwardParams& p, int64_t begin, int64_t end) {
  for (int64_t index = begin; index < end; ++index) {
    const Tile tile(p, index);
    if (!p.is_one_key()) {
      forward_keys<T>(p, tile);
    } else if (tile.head < 0) {
      forward_unshifted<T>(p, tile);
    } else {
      forward_tile<T>(p, tile);
    }
  }
}

template <class T>
void backward(const BackwardParams& p, int64_t begin, int64_t end) {
  for (int64_t index = begin; index < end; ++index) {
    const Tile tile(p, index);
    if (!p.is_one_key()) {
      backward_keys<T>(p, tile);
    } else if (tile.head < 0) {
      for (int64_t t = tile.t_begin; t < tile.t_end; ++t) {
        backward_unshifted<T>(p, tile.b, tile.h, t);
      }
    } else {
      backward_tile<T>(p, tile, static_cast<acc_t<T>*>(p.partial) + index * (2 * p.D + 1));
    }
  }
}

// Adds the tiles of each head in their order; the outputs come zeroed.
template <class T>
void reduce(const BackwardParams& p, int64_t begin, int64_t end) {
  using acc = acc_t<T>;
  if (!p.is_one_key()) return reduce_keys<T>(p, begin, end);
  for (int64_t h = begin; h < end; ++h) {
    for (int64_t index = h; index < tiles(p); index += p.H) {
      const Tile tile(p, index);
      if (tile.head < 0) continue;
      const acc* partial = static_cast<const acc*>(p.partial) + index * (2 * p.D + 1);
      accumulate<acc>(static_cast<acc*>(p.dweight) + tile.head * p.D, 1, partial, p.D);
      accumulate<acc>(static_cast<acc*>(p.dshift) + tile.head * p.D, 1, partial + p.D, p.D);
      static_cast<acc*>(p.dbias)[tile.head] += partial[2 * p.D];
    }
  }
}

template <class T>
void add_gate_grad(const GateGradParams& p, int64_t begin, int64_t end) {
  using acc = acc_t<T>;
  for (int64_t index = begin; index < end; ++index) {
    const Tile tile(p, index);
    if (!p.is_one_key()) {
      add_keys_grad<T>(p, tile);
      continue;
    }
    if (tile.head < 0) continue;
    const acc* weight = static_cast<const acc*>(p.weight) + tile.head * p.D;
    for (int64_t t = tile.t_begin; t < tile.t_end; ++t) {
      T* dq = row<T>(p.dq, tile.b, tile.h, t);
      add_scaled(dq, dq, *row<acc>(p.dg, tile.b, tile.h, t), weight, p.D);
    }
  }
}

template <class T>
constexpr AttentionShiftKernels kKernels = {forward<T>, backward<T>, reduce<T>, add_gate_grad<T>};

}  // namespace MMICL_ISA

const AttentionShiftKernels MMICL_TABLE[4] = {
    MMICL_ISA::kKernels<float>,
    MMICL_ISA::kKernels<double>,
    MMICL_ISA::kKernels<MMICL_ISA::bf16>,
    MMICL_ISA::kKernels<MMICL_ISA::f16>,
};

}  // namespace mmicl
