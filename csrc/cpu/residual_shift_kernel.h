// The kernels themselves. Included once per instruction set, as attention_shift_kernel.h is, and without
// standard library templates for the same reason. Every row is read from memory once: a second look at
// it finds it in the first-level cache. Meanwhile the next row is fetched into the second-level cache, line
// by line between the computations; past the last row a prefetch does nothing.

#include <cstdint>

#include "residual_shift.h"

namespace mmicl {
namespace MMICL_ISA {

#include "vec.h"
#include "columns.h"

struct TokenTile {
  int64_t b, t_begin, t_end;

  MMICL_INLINE TokenTile(const EntryParams& p, int64_t index) {
    const int64_t per_sequence = tiles_per_sequence(p);
    b = index / per_sequence;
    t_begin = index % per_sequence * kTileTokens;
    t_end = t_begin + kTileTokens < p.T ? t_begin + kTileTokens : p.T;
  }
};

// ---- what is added to a token ----

template <class acc>
struct Entry {
  const acc* vector = nullptr;
  acc coefficient = 0;  // 0: nothing is added
};

template <class acc>
MMICL_INLINE Entry<acc> single_entry(const EntryParams& p, int64_t b, int64_t t, int64_t k) {
  const int64_t id =
      p.adapter_ids ? p.adapter_ids[b * p.stride_ids_b + t * p.stride_ids_t + k * p.stride_ids_k] : b;
  if (id < 0) return {};
  const int64_t row = p.per_token ? b * p.T + t : b;
  acc coefficient = p.strengths ? static_cast<const acc*>(p.strengths)[row * p.K + k] : 1;
  if (p.scale) coefficient *= static_cast<const acc*>(p.scale)[id * p.stride_scale];
  return {static_cast<const acc*>(p.vector) + id * p.stride_vector, coefficient};
}

// A single one that is not off is used as it is, so that a row does not depend on the K of others.
template <class acc>
Entry<acc> entry_of(const EntryParams& p, int64_t b, int64_t t) {
  Entry<acc> only;
  int64_t count = 0;
  for (int64_t k = 0; k < p.K; ++k) {
    const Entry<acc> e = single_entry<acc>(p, b, t, k);
    if (e.coefficient != 0) only = e, ++count;
  }
  if (count <= 1) return only;
  acc* combined = static_cast<acc*>(p.combined);
  __builtin_memset(combined, 0, p.C * sizeof(acc));
  for (int64_t k = 0; k < p.K; ++k) {
    const Entry<acc> e = single_entry<acc>(p, b, t, k);
    if (e.coefficient != 0) accumulate<acc>(combined, e.coefficient, e.vector, p.C);
  }
  return {combined, 1};
}

// The entry of one token after another, looked up where it may be another than the last one's.
template <class acc>
struct TokenEntry {
  const EntryParams& p;
  Entry<acc> e;
  int64_t row = -1;

  MMICL_INLINE explicit TokenEntry(const EntryParams& params) : p(params) {}
  MMICL_INLINE Entry<acc> at(int64_t b, int64_t t) {
    if (p.per_token || b != row) e = entry_of<acc>(p, b, t), row = b;
    return e;
  }
};

// ---- residual_shift ----

template <class acc>
MMICL_INLINE acc square_root(acc x) {
  if constexpr (sizeof(acc) == sizeof(float)) return __builtin_sqrtf(x);
  return __builtin_sqrt(x);
}

// Sums over a row of x and y = x + e: their squares and the products with dout.
template <class T>
struct RowSums {
  acc_t<T> x_square, y_square, along;
};

template <class T>
MMICL_INLINE RowSums<T> row_sums(const T* x, const T* dout, Entry<acc_t<T>> e, int64_t C) {
  Sum<vec_t<T>> x_square, y_square, along;
  for_columns(C, [&](auto block, int i) MMICL_LAMBDA {
    const auto vx = block.load(x);
    const auto y = vx + e.coefficient * block.load(e.vector);
    x_square.parts[i] += vx * vx;
    y_square.parts[i] += y * y;
    if (dout) along.parts[i] += y * block.load(dout);
  });
  return {x_square.total(), y_square.total(), along.total()};
}

template <class T>
MMICL_INLINE void forward_row(T* out, const T* x, Entry<acc_t<T>> e, int64_t C, const T* next_out,
                              const T* next_x) {
  const RowSums<T> s = row_sums<T>(x, nullptr, e, C);
  if (s.x_square == 0 || s.y_square == 0) {
    __builtin_memset(out, 0, C * sizeof(T));
    return;
  }
  const acc_t<T> ratio = square_root(s.x_square) / square_root(s.y_square);
  for_columns(C, [&](auto block, int i) MMICL_LAMBDA {
    if (i == 0) {
      __builtin_prefetch(next_x + block.c, 0, 2);
      __builtin_prefetch(next_out + block.c, 1, 2);
    }
    block.store(out, ratio * (block.load(x) + e.coefficient * block.load(e.vector)));
  });
}

template <class T>
void forward(const ResidualShiftParams& p, int64_t begin, int64_t end) {
  TokenEntry<acc_t<T>> entry(p);
  for (int64_t index = begin; index < end; ++index) {
    const TokenTile tile(p, index);
    for (int64_t t = tile.t_begin; t < tile.t_end; ++t) {
      const Entry<acc_t<T>> e = entry.at(tile.b, t);
      const T* x = row<T>(p.x, tile.b, t);
      T* out = row<T>(p.out, tile.b, t);
      if (e.coefficient == 0) {
        __builtin_memcpy(out, x, p.C * sizeof(T));
      } else if (p.preserve_norm) {
        forward_row(out, x, e, p.C, out + p.out.stride_t, x + p.x.stride_t);
      } else {
        add_scaled(out, x, e.coefficient, e.vector, p.C);
      }
    }
  }
}

// dd = ratio (dout - y along / |y|^2)      dx = dd + x ratio along / |x|^2
template <class T>
MMICL_INLINE void backward_row(T* dx, acc_t<T>* sums, const T* dout, const T* x, Entry<acc_t<T>> e,
                               int64_t C) {
  using acc = acc_t<T>;
  const RowSums<T> s = row_sums(x, dout, e, C);
  if (s.x_square == 0 || s.y_square == 0) {
    if (dx) __builtin_memset(dx, 0, C * sizeof(T));
    return;
  }
  const acc ratio = square_root(s.x_square) / square_root(s.y_square);
  const acc of_y = s.along / s.y_square, of_x = ratio * (s.along / s.x_square);
  for_columns(C, [&](auto block, int) MMICL_LAMBDA {
    const auto vx = block.load(x);
    const auto dd = ratio * (block.load(dout) - of_y * (vx + e.coefficient * block.load(e.vector)));
    if (sums) block.store(sums, block.load(sums) + dd);
    if (dx) block.store(dx, dd + of_x * vx);
  });
}

// Nothing was added: dx is dout, and the coefficients still have a gradient.
template <class T>
MMICL_INLINE void backward_row_off(T* dx, acc_t<T>* sums, const T* dout, const T* x, int64_t C) {
  if (dx) __builtin_memcpy(dx, dout, C * sizeof(T));
  if (!sums) return;
  Sum<vec_t<T>> squares, products;
  for_columns(C, [&](auto block, int i) MMICL_LAMBDA {
    squares.parts[i] += block.load(x) * block.load(x);
    products.parts[i] += block.load(x) * block.load(dout);
  });
  const acc_t<T> square = squares.total();
  if (square == 0) return;
  const acc_t<T> along = products.total() / square;
  for_columns(C, [&](auto block, int) MMICL_LAMBDA {
    block.store(sums, block.load(sums) + (block.load(dout) - along * block.load(x)));
  });
}

template <class T>
void backward(const ResidualShiftGradParams& p, int64_t begin, int64_t end) {
  using acc = acc_t<T>;
  TokenEntry<acc> entry(p);
  for (int64_t index = begin; index < end; ++index) {
    const TokenTile tile(p, index);
    acc* sums = nullptr;
    for (int64_t t = tile.t_begin; t < tile.t_end; ++t) {
      if (p.sums && (p.per_token || t == tile.t_begin)) {
        sums = static_cast<acc*>(p.sums) + (p.per_token ? tile.b * p.T + t : index) * p.C;
        __builtin_memset(sums, 0, p.C * sizeof(acc));
      }
      const T* dout = row<T>(p.dout, tile.b, t);
      if (!p.x.data) {
        if (sums) accumulate<T>(sums, 1, dout, p.C);
        continue;
      }
      T* dx = p.dx.data ? row<T>(p.dx, tile.b, t) : nullptr;
      const Entry<acc> e = entry.at(tile.b, t);
      if (e.coefficient == 0) {
        backward_row_off(dx, sums, dout, row<T>(p.x, tile.b, t), p.C);
      } else {
        backward_row(dx, sums, dout, row<T>(p.x, tile.b, t), e, p.C);
      }
    }
  }
}

// ---- gradients of tokens' entries ----

template <class T>
void adapter_sums(const AdapterSumsParams& p, int64_t begin, int64_t end) {
  using acc = acc_t<T>;
  const acc* strengths = static_cast<const acc*>(p.strengths);
  for (int64_t index = begin; index < end; ++index) {
    const int64_t first = p.starts[index / p.parts], last = p.starts[index / p.parts + 1];
    const int64_t size = (last - first + p.parts - 1) / p.parts;
    const int64_t i_begin = first + index % p.parts * size;
    const int64_t i_end = i_begin + size < last ? i_begin + size : last;
    acc* sums = static_cast<acc*>(p.sums) + index * p.C;
    __builtin_memset(sums, 0, p.C * sizeof(acc));
    for (int64_t i = i_begin; i < i_end; ++i) {
      const int64_t entry = p.order[i], token = entry / p.K;
      const T* dd = row<T>(p.dd, token / p.T, token % p.T);
      accumulate<T>(sums, strengths ? strengths[entry] : 1, dd, p.C);
    }
  }
}

template <class T>
void entry_products(const EntryProductsParams& p, int64_t begin, int64_t end) {
  using acc = acc_t<T>;
  for (int64_t token = begin; token < end; ++token) {
    const int64_t b = token / p.T, t = token % p.T;
    for (int64_t k = 0; k < p.K; ++k) {
      const Entry<acc> e = single_entry<acc>(p, b, t, k);
      acc* product = static_cast<acc*>(p.products) + token * p.K + k;
      *product = e.vector ? dot<T>(row<T>(p.dd, b, t), e.vector, p.C) : 0;
    }
  }
}

// ---- residual_shift_rms_norm ----

// A product of stored elements, as storing it would round it. NaN needs no care here: products keep the
// fraction of a stored bfloat16's, and adding to that does not carry.
template <class T>
struct Rounded {
  static MMICL_INLINE vec_t<T> of(vec_t<T> v) {
    T lanes[kLanes];
    store(lanes, v);
    return load(lanes);
  }
};
template <>
struct Rounded<bf16> {
  static MMICL_INLINE f32x8 of(f32x8 v) {
    const u32x8 bits = (u32x8)v;
    return (f32x8)((bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000);
  }
};

// h = residual + x + e, rounded, and the sum of its squares. The row normed is written next.
template <class T>
MMICL_INLINE acc_t<T> add_row(T* h, const T* residual, const T* x, Entry<acc_t<T>> e, int64_t C,
                              const T* normed) {
  Sum<vec_t<T>> squares;
  for_columns(C, [&](auto block, int i) MMICL_LAMBDA {
    if (i == 0) __builtin_prefetch(normed + block.c, 1, 3);
    auto v = block.load(residual) + block.load(x);
    if (e.coefficient != 0) v += e.coefficient * block.load(e.vector);
    block.store(h, v);
    v = block.load(h);  // as it was rounded
    squares.parts[i] += v * v;
  });
  return squares.total();
}

template <class T>
void norm_forward(const RMSNormParams& p, int64_t begin, int64_t end) {
  using acc = acc_t<T>;
  const acc* weight = static_cast<const acc*>(p.weight);
  const acc offset = static_cast<acc>(p.offset);
  TokenEntry<acc> entry(p);
  for (int64_t index = begin; index < end; ++index) {
    const TokenTile tile(p, index);
    const T *residual = row<T>(p.residual, tile.b, tile.t_begin), *x = row<T>(p.x, tile.b, tile.t_begin);
    for (int64_t t = tile.t_begin; t < tile.t_end; ++t) {
      T* h = row<T>(p.new_residual, tile.b, t);
      T* normed = row<T>(p.normed, tile.b, t);
      const acc square = add_row(h, residual, x, entry.at(tile.b, t), p.C, normed);
      const acc rstd = 1 / square_root(square / p.C + static_cast<acc>(p.eps));
      *row<acc>(p.rstd, tile.b, t) = rstd;
      residual += p.residual.stride_t, x += p.x.stride_t;
      const T* next_h = h + p.new_residual.stride_t;
      for_columns(p.C, [&](auto block, int i) MMICL_LAMBDA {
        if (i == 0) {
          __builtin_prefetch(residual + block.c, 0, 2);
          __builtin_prefetch(x + block.c, 0, 2);
          __builtin_prefetch(next_h + block.c, 1, 2);
        }
        auto n = rstd * block.load(h);
        if (offset == 0) n = Rounded<T>::of(n);
        block.store(normed, n * (offset + block.load(weight)));
      });
    }
  }
}

// dn = dnormed (offset + weight)      dx = rstd (dn - n mean(dn n)) + dnew_residual
template <class T>
void norm_backward(const RMSNormGradParams& p, int64_t begin, int64_t end) {
  using acc = acc_t<T>;
  const acc* weight = static_cast<const acc*>(p.weight);
  const acc offset = static_cast<acc>(p.offset);
  for (int64_t index = begin; index < end; ++index) {
    const TokenTile tile(p, index);
    acc* sums = p.sums ? static_cast<acc*>(p.sums) + index * p.C : nullptr;
    acc* weight_sums = p.weight_sums ? static_cast<acc*>(p.weight_sums) + index * p.C : nullptr;
    if (sums) __builtin_memset(sums, 0, p.C * sizeof(acc));
    if (weight_sums) __builtin_memset(weight_sums, 0, p.C * sizeof(acc));
    for (int64_t t = tile.t_begin; t < tile.t_end; ++t) {
      const T* dnormed = row<T>(p.dnormed, tile.b, t);
      const T* dh = p.dnew_residual.data ? row<T>(p.dnew_residual, tile.b, t) : nullptr;
      const T* h = row<T>(p.new_residual, tile.b, t);
      T* dx = row<T>(p.dx, tile.b, t);
      const acc rstd = *row<acc>(p.rstd, tile.b, t);
      Sum<vec_t<T>> products;
      for_columns(p.C, [&](auto block, int i) MMICL_LAMBDA {
        products.parts[i] += block.load(dnormed) * (offset + block.load(weight)) * (rstd * block.load(h));
      });
      const acc mean = products.total() / p.C;
      for_columns(p.C, [&](auto block, int) MMICL_LAMBDA {
        const auto n = rstd * block.load(h);
        const auto dy = block.load(dnormed);
        auto grad = rstd * (dy * (offset + block.load(weight)) - n * mean);
        if (dh) grad += block.load(dh);
        block.store(dx, grad);
        if (sums) block.store(sums, block.load(sums) + grad);
        if (weight_sums) block.store(weight_sums, block.load(weight_sums) + dy * n);
      });
    }
  }
}

// Named unlike those of attention_shift: the linker would merge variables of one name.
template <class T>
constexpr ResidualShiftKernels kResidualShiftKernels = {
    forward<T>, backward<T>, norm_forward<T>, norm_backward<T>, adapter_sums<T>, entry_products<T>};

}  // namespace MMICL_ISA

const ResidualShiftKernels MMICL_TABLE[4] = {
    MMICL_ISA::kResidualShiftKernels<float>,
    MMICL_ISA::kResidualShiftKernels<double>,
    MMICL_ISA::kResidualShiftKernels<MMICL_ISA::bf16>,
    MMICL_ISA::kResidualShiftKernels<MMICL_ISA::f16>,
};

}  // namespace mmicl
