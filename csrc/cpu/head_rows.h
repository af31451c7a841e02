// Where the row of a head is. Include it inside the namespace of an instruction set, after vec.h.

template <class T>
MMICL_INLINE const T* row(const ConstRows& r, int64_t b, int64_t h, int64_t t) {
  return static_cast<const T*>(r.data) + b * r.stride_b + h * r.stride_h + t * r.stride_t;
}

template <class T>
MMICL_INLINE T* row(const MutableRows& r, int64_t b, int64_t h, int64_t t) {
  return static_cast<T*>(r.data) + b * r.stride_b + h * r.stride_h + t * r.stride_t;
}
