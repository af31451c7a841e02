// Eight lanes of float or double, loaded from and stored to the four element types.
//
// Written with the vector extensions of GCC and clang: one source, lowered to whatever the including
// translation unit may use. Include it inside that unit's namespace (see attention_shift_kernel.h).

#define MMICL_INLINE inline __attribute__((always_inline))
#define MMICL_LAMBDA __attribute__((always_inline))

constexpr int64_t kLanes = 8;

typedef float f32x8 __attribute__((vector_size(32)));
typedef double f64x8 __attribute__((vector_size(64)));
typedef uint16_t u16x8 __attribute__((vector_size(16)));
typedef uint32_t u32x8 __attribute__((vector_size(32)));
typedef uint64_t u64x8 __attribute__((vector_size(64)));

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class Vec>
MMICL_INLINE Vec read(const void* p) {
  Vec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <class Vec>
MMICL_INLINE void write(void* p, Vec v) {
  __builtin_memcpy(p, &v, sizeof v);
}

MMICL_INLINE u16x8 narrow(u32x8 v) { return __builtin_convertvector(v, u16x8); }

#ifdef MMICL_AVX2
MMICL_INLINE u32x8 widen(u16x8 v) { return (u32x8)_mm256_cvtepu16_epi32((__m128i)v); }
MMICL_INLINE f32x8 from_f16(u16x8 h) { return (f32x8)_mm256_cvtph_ps((__m128i)h); }
MMICL_INLINE u16x8 to_f16(f32x8 v) {
  return (u16x8)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
}
#else
MMICL_INLINE u32x8 widen(u16x8 v) { return __builtin_convertvector(v, u32x8); }

// A half's exponent and fraction, moved to a float's place, read 2^112 too small; subnormals included.
MMICL_INLINE f32x8 from_f16(u16x8 h) {
  u32x8 wide = widen(h);
  f32x8 magnitude = (f32x8)((wide & 0x7fff) << 13) * 0x1p112f;
  u32x8 special = (u32x8)(magnitude >= 0x1p16f) & 0x7f800000;  // exponent 31: inf or nan
  return (f32x8)((u32x8)magnitude | special | ((wide & 0x8000) << 16));
}

// Round to nearest even. Below 2^-14 adding 0.5 aligns the fraction with a subnormal half's and rounds it.
MMICL_INLINE u16x8 to_f16(f32x8 v) {
  u32x8 bits = (u32x8)v;
  u32x8 a = bits & 0x7fffffff;
  u32x8 normal = (a - 0x38000000 + 0xfff + ((a >> 13) & 1)) >> 13;
  u32x8 subnormal = (u32x8)((f32x8)a + 0.5f) - 0x3f000000;
  u32x8 h = a < 0x38800000 ? subnormal : normal;
  h = a >= 0x47800000 ? (h & 0) + 0x7c00 : h;
  h = a > 0x7f800000 ? (h & 0) + 0x7e00 : h;
  return narrow(h | ((bits >> 16) & 0x8000));
}
#endif

MMICL_INLINE f32x8 from_bf16(u16x8 h) { return (f32x8)(widen(h) << 16); }

// Round to nearest even. Adding would carry some nans into zero, so they are replaced.
MMICL_INLINE u16x8 to_bf16(f32x8 v) {
  u32x8 bits = (u32x8)v;
  u32x8 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return narrow(v == v ? rounded : (bits & 0) + 0x7fc0);
}

template <class T>
struct Traits;

template <>
struct Traits<float> {
  using acc = float;
  using Vec = f32x8;
  using Bits = u32x8;
  static constexpr int kFraction = 23, kBias = 127, kTaylorTerms = 7;
  static constexpr float kLn2High = 355.0f / 512, kLn2Low = -2.12194440e-4f;
  static constexpr float kExpLowest = -87;  // exp is normal from here on
};
template <>
struct Traits<double> {
  using acc = double;
  using Vec = f64x8;
  using Bits = u64x8;
  static constexpr int kFraction = 52, kBias = 1023, kTaylorTerms = 13;
  static constexpr double kLn2High = 6.93147180369123816490e-1, kLn2Low = 1.90821492927058770002e-10;
  static constexpr double kExpLowest = -708;
};
template <>
struct Traits<bf16> : Traits<float> {};
template <>
struct Traits<f16> : Traits<float> {};

template <class T>
using acc_t = typename Traits<T>::acc;
template <class T>
using vec_t = typename Traits<T>::Vec;

MMICL_INLINE f32x8 load(const float* p) { return read<f32x8>(p); }
MMICL_INLINE f64x8 load(const double* p) { return read<f64x8>(p); }
MMICL_INLINE f32x8 load(const bf16* p) { return from_bf16(read<u16x8>(p)); }
MMICL_INLINE f32x8 load(const f16* p) { return from_f16(read<u16x8>(p)); }

MMICL_INLINE void store(float* p, f32x8 v) { write(p, v); }
MMICL_INLINE void store(double* p, f64x8 v) { write(p, v); }
MMICL_INLINE void store(bf16* p, f32x8 v) { write(p, to_bf16(v)); }
MMICL_INLINE void store(f16* p, f32x8 v) { write(p, to_f16(v)); }

// Lanes of another width. From double to a 16-bit type it rounds twice, by way of float, as PyTorch does.
template <class To, class Vec>
MMICL_INLINE vec_t<To> lanes_of(Vec v) {
  return __builtin_convertvector(v, vec_t<To>);
}

// The last n < kLanes elements of a row; the missing lanes are zero.
template <class T>
MMICL_INLINE vec_t<T> load_tail(const T* p, int64_t n) {
  T lanes[kLanes] = {};
  __builtin_memcpy(lanes, p, n * sizeof(T));
  return load(lanes);
}

template <class T>
MMICL_INLINE void store_tail(T* p, vec_t<T> v, int64_t n) {
  T lanes[kLanes];
  store(lanes, v);
  __builtin_memcpy(p, lanes, n * sizeof(T));
}

// ---- lanes of acc ----

constexpr double reciprocal_factorial(int n) { return n < 2 ? 1 : reciprocal_factorial(n - 1) / n; }

template <class Vec>
MMICL_INLINE auto sum(Vec v) {
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

// exp(x) for x <= 0, to about one unit in the last place: x = n ln 2 + r with |r| <= ln 2 / 2, then a
// Taylor series in r and n added to the exponent. Adding 1.5 * 2^fraction leaves the rounded n in the
// lowest bits. Below kExpLowest the result is 0.
template <class acc>
MMICL_INLINE vec_t<acc> exp_nonpositive(vec_t<acc> x) {
  using Vec = vec_t<acc>;
  using R = Traits<acc>;
  using Bits = typename R::Bits;
  constexpr acc kRounder = acc(3ull << (R::kFraction - 1));
  const Vec shifted = x * acc(1.4426950408889634) + kRounder;
  const Vec n = shifted - kRounder;
  const Vec r = (x - n * R::kLn2High) - n * R::kLn2Low;
  Vec y = r * acc(reciprocal_factorial(R::kTaylorTerms)) + acc(reciprocal_factorial(R::kTaylorTerms - 1));
#pragma GCC unroll 16
  for (int k = R::kTaylorTerms - 2; k >= 0; --k) y = y * r + acc(reciprocal_factorial(k));
  const Bits power_of_two = ((Bits)shifted + R::kBias) << R::kFraction;
  return x < R::kExpLowest ? Vec{} : y * (Vec)power_of_two;
}

// mu = sigmoid(x) and 1 - mu, both to full relative precision and without overflow.
template <class acc>
struct Sigmoid {
  vec_t<acc> mu, complement;

  MMICL_INLINE explicit Sigmoid(vec_t<acc> x) {
    const vec_t<acc> e = exp_nonpositive<acc>(x < 0 ? x : -x);
    const vec_t<acc> larger = 1 / (1 + e);
    const vec_t<acc> smaller = e * larger;
    mu = x < 0 ? smaller : larger;
    complement = x < 0 ? larger : smaller;
  }
};

// ---- rows of D elements; w, s and sums are acc ----

template <class T>
MMICL_INLINE acc_t<T> dot(const T* x, const acc_t<T>* w, int64_t D) {
  vec_t<T> even = {}, odd = {};
  int64_t d = 0;
  for (; d + 2 * kLanes <= D; d += 2 * kLanes) {
    even += load(x + d) * load(w + d);
    odd += load(x + d + kLanes) * load(w + d + kLanes);
  }
  for (; d + kLanes <= D; d += kLanes) even += load(x + d) * load(w + d);
  if (d < D) odd += load_tail(x + d, D - d) * load_tail(w + d, D - d);
  return sum(even + odd);
}

// sums += a x
template <class T>
MMICL_INLINE void accumulate(acc_t<T>* sums, acc_t<T> a, const T* x, int64_t D) {
  int64_t d = 0;
  for (; d + kLanes <= D; d += kLanes) store(sums + d, load(sums + d) + a * load(x + d));
  if (d < D) {
    store_tail(sums + d, load_tail(sums + d, D - d) + a * load_tail(x + d, D - d), D - d);
  }
}

// y = x + a s; y may be x
template <class T>
MMICL_INLINE void add_scaled(T* y, const T* x, acc_t<T> a, const acc_t<T>* s, int64_t D) {
  int64_t d = 0;
  for (; d + kLanes <= D; d += kLanes) store(y + d, load(x + d) + a * load(s + d));
  if (d < D) store_tail(y + d, load_tail(x + d, D - d) + a * load_tail(s + d, D - d), D - d);
}

// y = a w
template <class T>
MMICL_INLINE void scale(T* y, acc_t<T> a, const acc_t<T>* w, int64_t D) {
  int64_t d = 0;
  for (; d + kLanes <= D; d += kLanes) store(y + d, a * load(w + d));
  if (d < D) store_tail(y + d, a * load_tail(w + d, D - d), D - d);
}
