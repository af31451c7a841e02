// The virtual keys of the heads, and what their gate does to a query's attention output:
//
//   g_n = q.weight_n + bias_n    G = log sum_n exp(g_n)    mu = sigmoid(G - lse)    p_n = mu exp(g_n - G)
//   out = kept a + sum_n p_n shift_n                       kept: 1 - mu for a prefix, else 1
//
// mu = 0 where lse is infinite or there is no adapter. Letters: B batch, T queries, H heads, D head dim, A adapters of
// P heads with N keys, each for H / P neighbouring heads.
#pragma once

#include "device.h"

namespace mmicl::cuda {

struct VirtualKeys {
  const float *weight, *bias, *shift;  // [A, P, N, D], [A, P, N], [A, P, N, D], contiguous
  const int32_t* adapter_ids;          // of [B] or [B, T], -1 is none; absent: all have adapter 0
  int64_t stride_ids_b, stride_ids_t;
  const bool* prefix;  // [A]; absent: none is one
  int64_t stride_prefix;
  int P, N, D, heads_per_key;

  DEVICE int adapter(int b, int t) const {
    return adapter_ids ? adapter_ids[b * stride_ids_b + t * stride_ids_t] : 0;
  }
  DEVICE bool is_prefix(int adapter) const { return prefix && prefix[adapter * stride_prefix]; }
  // The number of a head's first key among all.
  DEVICE int64_t first_key(int adapter, int h) const {
    return (static_cast<int64_t>(adapter) * P + h / heads_per_key) * N;
  }
};

// log sum exp of numbers that come one after the other.
struct LogSumExp {
  float highest = -INFINITY, sum = 0;

  DEVICE void add(float x) {
    const float next = fmaxf(highest, x);
    if (next == -INFINITY) return;
    sum = sum * expf(highest - next) + expf(x - next);
    highest = next;
  }
  DEVICE float value() const { return highest == -INFINITY ? highest : highest + logf(sum); }
};

// Of one query: the mass mu of its virtual keys, 1 - mu without cancellation, and whether it is shifted at all.
struct Gate {
  bool is_shifted, is_prefix;
  float together, mu, rest;

  DEVICE Gate(float together, float lse, bool has_adapter, bool is_prefix)
      : is_shifted(has_adapter && fabsf(lse) != INFINITY && together > -INFINITY),
        is_prefix(is_prefix),
        together(together),
        mu(is_shifted ? 1 / (1 + expf(lse - together)) : 0),
        rest(is_shifted ? 1 / (1 + expf(together - lse)) : 1) {}

  DEVICE float kept() const { return is_prefix ? rest : 1; }
  // A key's share of what the keys have together.
  DEVICE float share(float logit) const { return is_shifted ? expf(logit - together) : 0; }
};

}  // namespace mmicl::cuda
