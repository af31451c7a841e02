// Rows of [B, T, C] and their columns, kLanes at a time. Include it after vec.h, inside of the same namespace.

template <class T>
MMICL_INLINE const T* row(const ConstTokens& r, int64_t b, int64_t t) {
  return static_cast<const T*>(r.data) + b * r.stride_b + t * r.stride_t;
}

template <class T>
MMICL_INLINE T* row(const MutableTokens& r, int64_t b, int64_t t) {
  return static_cast<T*>(r.data) + b * r.stride_b + t * r.stride_t;
}

// Where a block of up to kLanes columns lies; the missing lanes of the last one are zero.
struct Full {
  int64_t c;
  template <class T>
  MMICL_INLINE vec_t<T> load(const T* x) const {
    return MMICL_ISA::load(x + c);
  }
  template <class T>
  MMICL_INLINE void store(T* y, vec_t<T> v) const {
    MMICL_ISA::store(y + c, v);
  }
};
struct Tail {
  int64_t c, n;
  template <class T>
  MMICL_INLINE vec_t<T> load(const T* x) const {
    return load_tail(x + c, n);
  }
  template <class T>
  MMICL_INLINE void store(T* y, vec_t<T> v) const {
    store_tail(y + c, v, n);
  }
};

// body(block, i): i is 0 or 1 in turn, for sums in two parts that do not wait for one another.
template <class Body>
MMICL_INLINE void for_columns(int64_t C, Body body) {
  int64_t c = 0;
  for (; c + 2 * kLanes <= C; c += 2 * kLanes) {
    body(Full{c}, 0);
    body(Full{c + kLanes}, 1);
  }
  if (c + kLanes <= C) {
    body(Full{c}, 0);
    c += kLanes;
  }
  if (c < C) body(Tail{c, C - c}, 1);
}

template <class Vec>
struct Sum {
  Vec parts[2] = {};
  MMICL_INLINE auto total() const { return sum(parts[0] + parts[1]); }
};
