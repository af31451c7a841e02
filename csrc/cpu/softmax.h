// The scores of one query, what it sees of them, and sums of their exponentials. Include it after vec.h, inside
// of the same namespace.

// ---- what a query sees of a block of keys ----

struct Range {  // keys from first to before last
  int64_t first, last;
  MMICL_INLINE bool is_empty() const { return first >= last; }
  MMICL_INLINE void join(const Range& other) {
    if (other.first < first) first = other.first;
    if (other.last > last) last = other.last;
  }
  MMICL_INLINE void clip(int64_t low, int64_t high) {
    if (first < low) first = low;
    if (last > high) last = high;
  }
};

// But for a mask.
MMICL_INLINE Range keys_of(const AttentionParams& p, int64_t b, int64_t t) {
  return {p.first[b * p.T + t], p.last[b * p.T + t]};
}

template <class acc>
MMICL_INLINE bool read_seen(acc* added, const bool* mask, int64_t stride, int64_t n) {
  bool any = false;
  for (int64_t i = 0; i < n; ++i) {
    const bool seen = mask[i * stride];
    added[i] = seen ? acc(0) : -acc(__builtin_inf());
    any |= seen;
  }
  return any;
}

template <class acc, class T>
MMICL_INLINE bool read_added(acc* added, const T* mask, int64_t stride, int64_t n) {
  int64_t j = 0;
  if (stride == 1) {
    for (; j + kLanes <= n; j += kLanes) store(added + j, lanes_of<acc>(load(mask + j)));
  }
  for (; j < n; ++j) added[j] = acc(load_tail(mask + j * stride, 1)[0]);
  bool any = false;
  for (int64_t i = 0; i < n; ++i) any |= added[i] != -acc(__builtin_inf());
  return any;
}

// What the mask adds to the scores of n keys from j on: -infinity where it hides. Whether it leaves any.
template <class acc>
MMICL_INLINE bool read_mask(acc* added, const AttentionParams& p, int64_t b, int64_t h, int64_t t, int64_t j,
                            int64_t n) {
  const int64_t at = b * p.mask_b + h * p.mask_h + t * p.mask_t + j * p.mask_s;
  switch (p.mask_type) {
    case MaskType::none: return true;
    case MaskType::boolean: {
      const bool* mask = static_cast<const bool*>(p.mask) + at;
      return p.mask_s == 1 ? read_seen(added, mask, 1, n) : read_seen(added, mask, p.mask_s, n);
    }
    case MaskType::f32: return read_added(added, static_cast<const float*>(p.mask) + at, p.mask_s, n);
    case MaskType::f64: return read_added(added, static_cast<const double*>(p.mask) + at, p.mask_s, n);
    case MaskType::bf16: return read_added(added, static_cast<const bf16*>(p.mask) + at, p.mask_s, n);
    case MaskType::f16: return read_added(added, static_cast<const f16*>(p.mask) + at, p.mask_s, n);
  }
  __builtin_unreachable();
}

// Of n products with keys their scores; hidden ones follow up to a multiple of kLanes.
template <class acc>
MMICL_INLINE void make_scores(acc* scores, const AttentionParams& p, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) store(scores + i, load(scores + i) * acc(p.scale));
  if (p.softcap > 0) {
    for (int64_t i = 0; i < n; ++i) scores[i] = acc(p.softcap * __builtin_tanh(double(scores[i]) / p.softcap));
  }
  for (int64_t i = n; i % kLanes; ++i) scores[i] = -acc(__builtin_inf());
}

// Hides those of n keys from j on that are not seen, or by what read_mask read.
template <class acc>
MMICL_INLINE void hide(acc* scores, const AttentionParams& p, const acc* added, Range seen, int64_t j, int64_t n) {
  const acc hidden = -acc(__builtin_inf());
  if (p.mask_type == MaskType::boolean) {  // not added: what it hides may be NaN
    for (int64_t i = 0; i < n; ++i) scores[i] = added[i] == hidden ? hidden : scores[i];
  } else if (p.mask_type != MaskType::none) {
    for (int64_t i = 0; i < n; ++i) scores[i] += added[i];
  }
  seen.clip(j, j + n);
  for (int64_t i = 0; i < n && i < seen.first - j; ++i) scores[i] = hidden;
  for (int64_t i = seen.last > j ? seen.last - j : 0; i < n; ++i) scores[i] = hidden;
}

// ---- sums of exponentials, which a later block or part may rescale ----

template <class acc>
struct Softmax {
  acc maximum = -acc(__builtin_inf()), total = 0;

  // Of n scores, up to a multiple of kLanes: p becomes exp(scores - maximum); returns what earlier sums are times.
  MMICL_INLINE acc add(acc* p, const acc* scores, int64_t n) {
    vec_t<acc> largest = load(scores);
    for (int64_t j = kLanes; j < n; j += kLanes) {
      const vec_t<acc> x = load(scores + j);
      largest = x > largest ? x : largest;
    }
    acc next = maximum;
    for (int64_t i = 0; i < kLanes; ++i) next = largest[i] > next ? largest[i] : next;
    const acc level = next == -acc(__builtin_inf()) ? acc(0) : next;  // a NaN stays one: it is no maximum
    vec_t<acc> sums = {};
    for (int64_t j = 0; j < n; j += kLanes) {
      const vec_t<acc> e = exp_nonpositive<acc>(load(scores + j) - level);
      sums += e;
      store(p + j, e);
    }
    const acc kept = rescaled(level);
    maximum = next, total = total * kept + sum(sums);
    return kept;
  }

  // A gate's: those of n scores before end, whatever is hidden. p is memory for them.
  MMICL_INLINE void add_gate(acc* p, const acc* scores, int64_t end, int64_t n) {
    __builtin_memcpy(p, scores, (n + kLanes - 1) / kLanes * kLanes * sizeof(acc));
    for (int64_t i = end > 0 ? end : 0; i < n; ++i) p[i] = -acc(__builtin_inf());
    add(p, p, n);
  }

  MMICL_INLINE acc rescaled(acc level) const {
    return maximum == level ? acc(1) : exp_nonpositive<acc>(vec_t<acc>{} + (maximum - level))[0];
  }

  MMICL_INLINE bool is_empty() const { return maximum == -acc(__builtin_inf()) && total == 0; }

  MMICL_INLINE acc lse() const {
    return is_empty() ? maximum : acc(double(maximum) + __builtin_log(double(total)));
  }

  // That of this and of another part.
  MMICL_INLINE void join(const Softmax& other, acc& mine, acc& others) {
    const acc next = other.maximum > maximum ? other.maximum : maximum;
    const acc level = next == -acc(__builtin_inf()) ? acc(0) : next;
    mine = rescaled(level), others = other.rescaled(level);
    maximum = next, total = total * mine + other.total * others;
  }
};
