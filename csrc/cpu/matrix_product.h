// Products of matrices in acc whose right side lies in panels of kPanel columns. Include it after vec.h, inside of
// the same namespace.
//
// A tile of kTileRows rows and one panel is summed in registers: as many as AVX2 has without the operands.

static_assert(kPanel == 2 * kLanes);
constexpr int kRowsOfTile = 6;

// Where element (i, k) of a left side is: rows of numbers, or its transpose.
template <class acc>
struct Left {
  const acc* data;
  int64_t stride_i, stride_k;
};

// c[i][0 : W kLanes] (+)= sum_k a(i, k) b[k][0 : W kLanes], for R rows i. Rows of b are kPanel numbers apart.
template <int R, int W, bool kAdd, class acc>
MMICL_INLINE void multiply_tile(acc* c, int64_t stride_c, Left<acc> a, const acc* b, int64_t K) {
  vec_t<acc> sums[R][W];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 2
    for (int w = 0; w < W; ++w) {
      sums[i][w] = vec_t<acc>{};  // c is added last: a long sum is one of sums
    }
  }
  for (int64_t k = 0; k < K; ++k) {
    vec_t<acc> columns[W];
#pragma GCC unroll 2
    for (int w = 0; w < W; ++w) columns[w] = load(b + k * kPanel + w * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const acc x = a.data[i * a.stride_i + k * a.stride_k];
#pragma GCC unroll 2
      for (int w = 0; w < W; ++w) sums[i][w] += x * columns[w];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 2
    for (int w = 0; w < W; ++w) {
      acc* to = c + i * stride_c + w * kLanes;
      store(to, kAdd ? load(to) + sums[i][w] : sums[i][w]);
    }
  }
}

template <int R, bool kAdd, class acc>
void multiply_rows(acc* c, int64_t stride_c, Left<acc> a, const acc* b, int64_t K, int64_t M) {
  for (; M >= R; M -= R) {
    multiply_tile<R, 2, kAdd>(c, stride_c, a, b, K);
    c += R * stride_c, a.data += R * a.stride_i;
  }
  if constexpr (R > 1) {
    if (M > 0) multiply_rows<R / 2, kAdd>(c, stride_c, a, b, K, M);
  }
}

// c[M][N] (+)= a b. Panel n of b begins at b + n * stride_panel; columns of the last one beyond N are written, too.
template <bool kAdd, class acc>
MMICL_INLINE void multiply(acc* c, int64_t stride_c, Left<acc> a, const acc* b, int64_t stride_panel, int64_t M,
                           int64_t N, int64_t K) {
  for (int64_t n = 0; n < N; n += kPanel) {
    multiply_rows<kRowsOfTile, kAdd>(c + n, stride_c, a, b + n / kPanel * stride_panel, K, M);
  }
}

// ---- panels ----

// n rows of D numbers become panels of D rows and kPanel columns, one for each of the n: the transpose.
template <class T>
MMICL_INLINE void pack_transposed(acc_t<T>* to, const T* from, int64_t stride, int64_t n, int64_t D) {
  for (int64_t j = 0; j < n; j += kPanel, to += D * kPanel) {
    for (int64_t i = 0; i < kPanel; ++i) {
      int64_t d = 0;
      if (j + i < n) {
        const T* x = from + (j + i) * stride;
        for (; d + kLanes <= D; d += kLanes) {
          const vec_t<T> lanes = load(x + d);
          for (int64_t l = 0; l < kLanes; ++l) to[(d + l) * kPanel + i] = lanes[l];
        }
        if (d < D) {
          const vec_t<T> lanes = load_tail(x + d, D - d);
          for (int64_t l = 0; d < D; ++d, ++l) to[d * kPanel + i] = lanes[l];
        }
      }
      for (; d < D; ++d) to[d * kPanel + i] = 0;
    }
  }
}

// n rows of D numbers become panels of n rows and kPanel columns of the D; the last is filled up with 0.
template <class T>
MMICL_INLINE void pack(acc_t<T>* to, const T* from, int64_t stride, int64_t n, int64_t D) {
  for (int64_t c = 0; c < D; c += kPanel, to += n * kPanel) {
    for (int64_t j = 0; j < n; ++j) {
      const T* x = from + j * stride + c;
      for (int64_t i = 0; i < kPanel; i += kLanes) {
        const int64_t left = D - c - i;
        store(to + j * kPanel + i, left >= kLanes ? load(x + i) : left > 0 ? load_tail(x + i, left) : vec_t<T>{});
      }
    }
  }
}

// n rows of D numbers in acc, stride_to apart.
template <class T>
MMICL_INLINE void widen_rows(acc_t<T>* to, int64_t stride_to, const T* from, int64_t stride, int64_t n, int64_t D) {
  for (int64_t j = 0; j < n; ++j) {
    int64_t d = 0;
    for (; d + kLanes <= D; d += kLanes) store(to + j * stride_to + d, load(from + j * stride + d));
    if (d < D) store_tail(to + j * stride_to + d, load_tail(from + j * stride + d, D - d), D - d);
  }
}
