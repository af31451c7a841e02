// N virtual keys of a query: its adapter's keys, their masses, and the kernels for them. Part of
// attention_shift_kernel.h, which has the one-key form that is as fast as it can be.

// y_n = x.w_n of kRows rows w, which share the loads of x.
template <class T, int kRows>
MMICL_INLINE void dots_of(acc_t<T>* y, const T* x, const acc_t<T>* w, int64_t D) {
  vec_t<T> sums[kRows] = {};
  const auto add = [&](int64_t d, int64_t count) MMICL_LAMBDA {
    const vec_t<T> block = load_block(x + d, count);
    for (int i = 0; i < kRows; ++i) sums[i] += block * load_block(w + i * D + d, count);
  };
  int64_t d = 0;
  for (; d + kLanes <= D; d += kLanes) add(d, kLanes);
  if (d < D) add(d, D - d);
  for (int i = 0; i < kRows; ++i) y[i] = sum(sums[i]);
}

template <class T>
MMICL_INLINE void dots(acc_t<T>* y, const T* x, const acc_t<T>* w, int64_t n, int64_t D) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) dots_of<T, 8>(y + i, x, w + i * D, D);
  for (; i + 4 <= n; i += 4) dots_of<T, 4>(y + i, x, w + i * D, D);
  for (; i < n; ++i) y[i] = dot(x, w + i * D, D);
}

template <class T>
struct Keys {
  using acc = acc_t<T>;
  const GateParams& p;
  const acc *weight = nullptr, *bias, *shift;
  bool prefix = false;
  acc mass[kMaxKeys];  // p_n
  acc mu, rest;        // their sum, and 1 - mu without cancellation

  MMICL_INLINE explicit Keys(const GateParams& p) : p(p) {}

  // Takes the keys of one query; whether there are any that count.
  MMICL_INLINE bool take(int64_t b, int64_t h, int64_t t) {
    const acc lse = *row<acc>(p.lse, b, h, t);
    const int64_t adapter = adapter_of(p, b, t);
    if (adapter < 0 || __builtin_isinf(lse)) return false;
    const int64_t first = first_key(p, adapter, h);
    weight = static_cast<const acc*>(p.weight) + first * p.D;
    bias = static_cast<const acc*>(p.bias) + first;
    shift = static_cast<const acc*>(p.shift) + first * p.D;
    prefix = p.prefix && p.prefix[adapter * p.stride_prefix];
    return weigh(row<T>(p.q, b, h, t), lse);
  }

  static MMICL_INLINE int64_t adapter_of(const ShiftParams& p, int64_t b, int64_t t) {
    return p.adapter_ids ? p.adapter_ids[b * p.stride_ids + t * p.stride_ids_t] : 0;
  }

  // Of [A * P * N].
  static MMICL_INLINE int64_t first_key(const ShiftParams& p, int64_t adapter, int64_t h) {
    return (adapter * p.P + h / (p.H / p.P)) * p.N;
  }

 private:
  MMICL_INLINE bool weigh(const T* q, acc lse) {
    using Vec = vec_t<acc>;
    constexpr acc kNone = -__builtin_inf();
    dots(mass, q, weight, p.N, p.D);
    Vec largest_of = {};
    largest_of += kNone;
    bool unused = true;
    for (int64_t n = 0; n < p.N; n += kLanes) {
      const int64_t count = p.N - n < kLanes ? p.N - n : kLanes;
      for (int64_t i = count; i < kLanes; ++i) mass[n + i] = kNone;
      const Vec logits = load(mass + n) + load_block(bias + n, count);
      store(mass + n, logits);
      largest_of = logits > largest_of ? logits : largest_of;
      unused = unused && !sum(logits != kNone);
    }
    if (unused) return false;
    acc largest = kNone;
    for (int64_t i = 0; i < kLanes; ++i) largest = largest_of[i] > largest ? largest_of[i] : largest;
    Vec totals = {};
    for (int64_t n = 0; n < p.N; n += kLanes) {
      const Vec e = exp_nonpositive<acc>(load(mass + n) - largest);
      store(mass + n, e);
      totals += e;
    }
    const acc total = sum(totals);
    const acc x[kLanes] = {largest + logarithm(total) - lse};
    const Sigmoid<acc> gate(load(x));
    mu = gate.mu[0], rest = gate.complement[0];
    const acc unit = mu / total;
    for (int64_t n = 0; n < p.N; n += kLanes) store(mass + n, unit * load(mass + n));
    return true;
  }

  static MMICL_INLINE acc logarithm(acc x) {
    if constexpr (sizeof(acc) == sizeof(float)) return __builtin_logf(x);
    return __builtin_log(x);
  }
};

// body(sum_n p_n shift_n of a block of columns, its first column, their number), block after block.
template <class T, class Body>
MMICL_INLINE void for_shifted_columns(const Keys<T>& keys, Body body) {
  constexpr int kBlocks = 4;  // sums that run beside each other
  const int64_t D = keys.p.D;
  int64_t d = 0;
  for (; d + kBlocks * kLanes <= D; d += kBlocks * kLanes) {
    vec_t<T> added[kBlocks] = {};
    for (int64_t i = 0; i < keys.p.N; ++i) {
      const acc_t<T>* shift = keys.shift + i * D + d;
      for (int j = 0; j < kBlocks; ++j) added[j] += keys.mass[i] * load(shift + j * kLanes);
    }
    for (int j = 0; j < kBlocks; ++j) body(added[j], d + j * kLanes, kLanes);
  }
  for (; d < D; d += kLanes) {
    const int64_t n = D - d < kLanes ? D - d : kLanes;
    vec_t<T> added = {};
    for (int64_t i = 0; i < keys.p.N; ++i) added += keys.mass[i] * load_block(keys.shift + i * D + d, n);
    body(added, d, n);
  }
}

template <class T>
MMICL_INLINE void store_block(T* y, vec_t<T> v, int64_t n) {
  if (n == kLanes) return store(y, v);
  store_tail(y, v, n);
}

template <class T>
void forward_keys(const ForwardParams& p, const Tile& tile) {
  Keys<T> keys(p);
  for (int64_t t = tile.t_begin; t < tile.t_end; ++t) {
    const T* out = row<T>(p.out, tile.b, tile.h, t);
    T* result = row<T>(p.result, tile.b, tile.h, t);
    if (!keys.take(tile.b, tile.h, t)) {
      copy(result, out, p.D);
      continue;
    }
    const acc_t<T> kept = keys.prefix ? keys.rest : 1;
    for_shifted_columns<T>(keys, [&](vec_t<T> added, int64_t d, int64_t n) MMICL_LAMBDA {
      store_block(result + d, kept * load_block(out + d, n) + added, n);
    });
  }
}

// What a stock backward is given: a with delta = dout.base the gradient through lse, too.
template <class T>
MMICL_INLINE void base_of(const BackwardParams& p, const Keys<T>& keys, const T* dout, const T* a, T* base) {
  const acc_t<T> kept = keys.prefix ? keys.rest : 1, scale = keys.prefix ? 1 : keys.rest;
  vec_t<T> lost = {};
  for_shifted_columns<T>(keys, [&](vec_t<T> added, int64_t d, int64_t n) MMICL_LAMBDA {
    const vec_t<T> exact = kept * load_block(a + d, n) + scale * added;
    store_block(base + d, exact, n);
    lost += load_block(dout + d, n) * (exact - load_block(base + d, n));
  });
  if (sizeof(T) != sizeof(acc_t<T>)) carry(dout, base, sum(lost), p.D);
}

template <class T>
void add_keys_grad(const GateGradParams& p, const Tile& tile) {
  using acc = acc_t<T>;
  for (int64_t t = tile.t_begin; t < tile.t_end; ++t) {
    const int64_t adapter = Keys<T>::adapter_of(p, tile.b, t);
    if (adapter < 0) continue;
    T* dq = row<T>(p.dq, tile.b, tile.h, t);
    const acc* dg = row<acc>(p.dg, tile.b, tile.h, t);
    const acc* weight = static_cast<const acc*>(p.weight) + Keys<T>::first_key(p, adapter, tile.h) * p.D;
    for (int64_t d = 0; d < p.D; d += kLanes) {
      const int64_t n = p.D - d < kLanes ? p.D - d : kLanes;
      vec_t<T> added = {};
      for (int64_t i = 0; i < p.N; ++i) added += dg[i] * load_block(weight + i * p.D + d, n);
      store_block(dq + d, load_block(dq + d, n) + added, n);
    }
  }
}

template <class T>
void backward_keys(const BackwardParams& p, const Tile& tile) {
  using acc = acc_t<T>;
  Keys<T> keys(p);
  for (int64_t t = tile.t_begin; t < tile.t_end; ++t) {
    const int64_t b = tile.b, h = tile.h;
    acc* dg = row<acc>(p.dg, b, h, t);
    acc* mass = static_cast<acc*>(p.partial) + ((b * p.H + h) * p.T + t) * p.N;
    const bool shifted = keys.take(b, h, t);
    if (p.lift.data) {
      const bool lifted = shifted && keys.prefix;
      *row<acc>(p.lift, b, h, t) = lifted ? -acc(__builtin_log(keys.rest)) : 0;
    }
    if (p.dq.data) __builtin_memset(row<T>(p.dq, b, h, t), 0, p.D * sizeof(T));
    if (!shifted) {
      *row<acc>(p.total, b, h, t) = 0;
      __builtin_memset(dg, 0, p.N * sizeof(acc));
      __builtin_memset(mass, 0, p.N * sizeof(acc));
      if (p.base.data) copy(row<T>(p.base, b, h, t), row<T>(p.a, b, h, t), p.D);
      continue;
    }
    const T* dout = row<T>(p.dout, b, h, t);
    const T* a = p.a.data ? row<T>(p.a, b, h, t) : nullptr;
    acc along = 0;
    if (keys.prefix) {
      for (int64_t d = 0; d < p.D; ++d) along += get(dout, d) * get(a, d);
    }
    acc mean = 0;  // S mu: of the slopes s_n by mass
    dots(dg, dout, keys.shift, p.N, p.D);
    for (int64_t n = 0; n < p.N; ++n) {
      mass[n] = keys.mass[n];
      dg[n] = mass[n] == 0 ? 0 : dg[n] - along;
      mean += mass[n] * dg[n];
    }
    const acc slope = keys.mu == 0 ? 0 : mean / keys.mu;
    *row<acc>(p.total, b, h, t) = keys.rest * mean;
    for (int64_t n = 0; n < p.N; ++n) dg[n] = mass[n] * ((dg[n] - slope) + keys.rest * slope);
    if (p.base.data) base_of<T>(p, keys, dout, a, row<T>(p.base, b, h, t));
  }
  if (p.dq.data) {
    GateGradParams own;
    static_cast<ShiftParams&>(own) = p;
    own.dq = p.dq;
    own.dg = {p.dg.data, p.dg.stride_b, p.dg.stride_h, p.dg.stride_t};
    add_keys_grad<T>(own, tile);
  }
}

// Query by query in their order; the outputs come zeroed. Items are heads of P.
template <class T>
void reduce_keys(const BackwardParams& p, int64_t begin, int64_t end) {
  using acc = acc_t<T>;
  const int64_t group = p.H / p.P;
  for (int64_t h = begin * group; h < end * group; ++h) {
    for (int64_t b = 0; b < p.B; ++b) {
      for (int64_t t = 0; t < p.T; ++t) {
        const int64_t adapter = Keys<T>::adapter_of(p, b, t);
        if (adapter < 0 || __builtin_isinf(*row<acc>(p.lse, b, h, t))) continue;
        const acc* dg = row<acc>(p.dg, b, h, t);
        const acc* mass = static_cast<const acc*>(p.partial) + ((b * p.H + h) * p.T + t) * p.N;
        const int64_t first = Keys<T>::first_key(p, adapter, h);
        for (int64_t n = 0; n < p.N; ++n) {
          if (mass[n] == 0) continue;  // 0 times NaN
          const int64_t key = first + n;
          static_cast<acc*>(p.dbias)[key] += dg[n];
          accumulate(static_cast<acc*>(p.dweight) + key * p.D, dg[n], row<T>(p.q, b, h, t), p.D);
          accumulate(static_cast<acc*>(p.dshift) + key * p.D, mass[n], row<T>(p.dout, b, h, t), p.D);
        }
      }
    }
  }
}
