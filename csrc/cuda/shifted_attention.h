// shifted_attention's forward on Hopper, as FlashAttention 3 computes attention (arXiv 2407.08608): one warp copies
// tiles of keys and values (TMA), two or three warpgroups of 64 queries each compute (wgmma) and take turns at the
// tensor cores, so that one's softmax runs beside another's products; and the scores of a tile are computed beside
// the values of the last. The shift is applied to the accumulators at the end.
//
// Rows of keys and values that no query sees must be finite: they are multiplied by 0.
#pragma once

#include "hopper.h"
#include "virtual_keys.h"

namespace mmicl::cuda {

// Distances in elements.
struct HeadStrides {
  int64_t b, h, t;
};

struct ShiftedAttentionParams {
  TensorMap q, k, v;    // [B, H, T, D], [B, G, S, D]
  void *out, *attended;  // [B, H, T, D]; before the shift, where it is asked for
  HeadStrides stride_out, stride_attended;
  float* lse;  // [B, H, T], contiguous
  VirtualKeys keys;
  int H, G, T, S;
  bool causal, has_q_start;
  int q_start;
  const int32_t *q_starts, *kv_start, *kv_end;  // [B]; each may be absent
  float scale;                                  // above 0
};

// How a block is made for a head dim: its warpgroups that compute, and the registers of a thread of theirs and of the
// copying one's, 65,536 in all.
template <int D>
struct Tile;
template <>
struct Tile<64> {
  static constexpr int kGroups = 3, kRegisters = 160, kCopyRegisters = 32;
};
template <>
struct Tile<128> {
  static constexpr int kGroups = 2, kRegisters = 240, kCopyRegisters = 24;
};

constexpr int kGroupRows = 64, kTileKeys = 128, kStages = 2, kBarrierBytes = 8;
template <int D>
constexpr int kTileRows = kGroupRows * Tile<D>::kGroups;
template <int D>
constexpr int kThreads = 128 * (1 + Tile<D>::kGroups);

// Shared memory: panels of 64 columns, so that rows have 128 bytes. Queries, stages of keys and of values, barriers.
template <int D>
struct Shared {
  static constexpr uint32_t kQueryPanel = kTileRows<D> * 128, kKeyPanel = kTileKeys * 128;
  static constexpr uint32_t kQueries = D / 64 * kQueryPanel, kStage = D / 64 * kKeyPanel;
  static constexpr uint32_t kBytes = kQueries + 2 * kStages * kStage + (1 + 4 * kStages) * kBarrierBytes;

  uint32_t base;
  DEVICE uint32_t queries() const { return base; }
  DEVICE uint32_t keys(int i) const { return base + kQueries + i % kStages * kStage; }
  DEVICE uint32_t values(int i) const { return keys(i) + kStages * kStage; }

  DEVICE uint32_t queries_full() const { return base + kQueries + 2 * kStages * kStage; }
  DEVICE uint32_t keys_full(int i) const { return queries_full() + (1 + i % kStages) * kBarrierBytes; }
  DEVICE uint32_t keys_empty(int i) const { return keys_full(i) + kStages * kBarrierBytes; }
  DEVICE uint32_t values_full(int i) const { return keys_full(i) + 2 * kStages * kBarrierBytes; }
  DEVICE uint32_t values_empty(int i) const { return keys_full(i) + 3 * kStages * kBarrierBytes; }
  // Of a stage's barriers for tile i.
  static DEVICE int parity(int i) { return i / kStages & 1; }
};

// What this block's queries see. Tiles of keys are numbered from the last, which alone may be seen in part, on.
struct Keys {
  int begin, limit, position, first_row;
  bool causal;

  template <class Params>
  DEVICE Keys(const Params& p, int b, int first_row) : first_row(first_row), causal(p.causal) {
    begin = p.kv_start ? p.kv_start[b] : 0;
    limit = p.kv_end ? p.kv_end[b] : p.S;
    position = p.q_starts ? p.q_starts[b] : p.has_q_start ? p.q_start : limit - p.T;
  }
  // One past the last key that a query sees.
  DEVICE int end(int row) const {
    const int own = position + row + 1;
    return causal && own < limit ? own : limit;
  }
  DEVICE int tiles(int rows) const {
    const int count = end(first_row + rows - 1) - begin;
    return count > 0 ? (count + kTileKeys - 1) / kTileKeys : 0;
  }
  DEVICE int first_key(int i, int tiles) const { return begin + (tiles - 1 - i) * kTileKeys; }
  DEVICE bool is_seen_by_all(int i, int tiles) const { return first_key(i, tiles) + kTileKeys <= end(first_row); }
};

template <int D>
DEVICE void copy_tiles(const ShiftedAttentionParams& p, const Shared<D>& shared, const Keys& keys, int tiles, int h, int b) {
  const auto load = [&](const TensorMap& map, uint32_t to, uint32_t panel, uint32_t full, int row, int head) {
    barrier_arrive_expect(full, D / 64 * panel);
    for (int c = 0; c < D / 64; ++c) tma_load(to + c * panel, map, full, 64 * c, row, head, b);
  };
  load(p.q, shared.queries(), shared.kQueryPanel, shared.queries_full(), keys.first_row, h);
  const int g = h / (p.H / p.G);
  const auto load_keys = [&](int i) {
    if (i >= kStages) barrier_wait(shared.keys_empty(i), shared.parity(i) ^ 1);
    load(p.k, shared.keys(i), shared.kKeyPanel, shared.keys_full(i), keys.first_key(i, tiles), g);
  };
  const auto load_values = [&](int i) {
    if (i >= kStages) barrier_wait(shared.values_empty(i), shared.parity(i) ^ 1);
    load(p.v, shared.values(i), shared.kKeyPanel, shared.values_full(i), keys.first_key(i, tiles), g);
  };
  if (tiles > 0) load_keys(0);
  for (int i = 0; i < tiles; ++i) {  // keys are needed, and released, a tile ahead of values
    if (i + 1 < tiles) load_keys(i + 1);
    load_values(i);
  }
}

// What a thread of a computing warpgroup has: of two queries, `row` and `row + 8` of the block, which it shares with
// three neighbours. Element j of the scores is of query j / 2 % 2 and key 8 (j / 4) + 2 (lane % 4) + j % 2, and
// likewise for the columns of the output.
template <class T, int D>
struct Attention {
  static constexpr int kGroups = Tile<D>::kGroups;
  const Shared<D>& shared;
  const Keys& keys;
  const int tiles, group, lane, row;
  const float scale_log2;
  float scores[kTileKeys / 2], out[D / 2];
  uint32_t probabilities[kTileKeys / 16][4];
  float highest[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0}, rescale[2];

  DEVICE Attention(const Shared<D>& shared, const Keys& keys, int tiles, int thread, float scale)
      : shared(shared),
        keys(keys),
        tiles(tiles),
        group(thread / 128),
        lane(thread % 32),
        row(thread / 32 * 16 + lane / 4),
        scale_log2(scale * 1.44269504f) {
    UNROLL for (int j = 0; j < D / 2; ++j) out[j] = 0;
  }

  // ---- products ----

  DEVICE void issue_scores(int i) {
    const uint64_t a = matrix_descriptor(shared.queries() + group * kGroupRows * 128, 16);
    const uint64_t b = matrix_descriptor(shared.keys(i), 16);
    pin(scores);
    product_fence();
    UNROLL for (int j = 0; j < D / 16; ++j) {
      product_shared(scores, advanced(a, j / 4 * shared.kQueryPanel + j % 4 * 32),
                     advanced(b, j / 4 * shared.kKeyPanel + j % 4 * 32), j > 0, T{});
    }
    product_commit();
  }
  DEVICE void issue_values(int i) {
    const uint64_t b = matrix_descriptor(shared.values(i), shared.kKeyPanel);
    pin(out);
    product_fence();
    UNROLL for (int j = 0; j < kTileKeys / 16; ++j) product_registers(out, probabilities[j], advanced(b, j * 2048), T{});
    product_commit();
  }
  DEVICE void release(uint32_t empty) {
    if (lane == 0) barrier_arrive(empty);
  }

  // ---- softmax of a tile, on top of those before ----

  DEVICE void hide(int i) {
    const int first = keys.first_key(i, tiles) + 2 * (lane % 4);
    const int end[2] = {keys.end(keys.first_row + row), keys.end(keys.first_row + row + 8)};
    UNROLL for (int j = 0; j < kTileKeys / 2; ++j) {
      if (first + j / 4 * 8 + j % 2 >= end[j / 2 % 2]) scores[j] = -INFINITY;
    }
  }
  DEVICE void softmax() {
    UNROLL for (int r = 0; r < 2; ++r) {
      float next = highest[r];
      UNROLL for (int j = 0; j < kTileKeys / 4; ++j) next = fmaxf(next, scores[j / 2 * 4 + 2 * r + j % 2]);
      next = fmaxf(next, shuffle_xor(next, 1));
      next = fmaxf(next, shuffle_xor(next, 2));
      const float base = next == -INFINITY ? 0 : next * scale_log2;  // all keys hidden so far
      rescale[r] = exp2_approx(highest[r] * scale_log2 - base);
      highest[r] = next;
      float own = 0;
      UNROLL for (int j = 0; j < kTileKeys / 4; ++j) {
        float& x = scores[j / 2 * 4 + 2 * r + j % 2];
        x = exp2_approx(x * scale_log2 - base);
        own += x;
      }
      sum[r] = sum[r] * rescale[r] + own;
    }
  }
  DEVICE void keep_probabilities() {
    UNROLL for (int j = 0; j < kTileKeys / 16; ++j) {
      UNROLL for (int e = 0; e < 4; ++e) probabilities[j][e] = pack(scores[8 * j + 2 * e], scores[8 * j + 2 * e + 1], T{});
    }
  }

  // ---- the tiles ----

  DEVICE void first_tile() {
    barrier_wait(shared.keys_full(0), 0);
    issue_scores(0);
    product_wait<0>();
    pin(scores);
    release(shared.keys_empty(0));
    hide(0);
    softmax();
    keep_probabilities();
  }
  // The scores of tile i beside the values of tile i - 1.
  template <bool kIsSeenByAll>
  DEVICE void next_tile(int i) {
    barrier_wait(shared.keys_full(i), shared.parity(i));
    named_sync(1 + group, 256);
    issue_scores(i);
    barrier_wait(shared.values_full(i - 1), shared.parity(i - 1));
    issue_values(i - 1);
    named_arrive(1 + (group + 1) % kGroups, 256);
    product_wait<1>();
    pin(scores);
    release(shared.keys_empty(i));
    if (!kIsSeenByAll) hide(i);
    softmax();
    product_wait<0>();
    pin(out);
    release(shared.values_empty(i - 1));
    keep_probabilities();
    UNROLL for (int j = 0; j < D / 2; ++j) out[j] *= rescale[j / 2 % 2];
  }
  DEVICE void last_values() {
    barrier_wait(shared.values_full(tiles - 1), shared.parity(tiles - 1));
    issue_values(tiles - 1);
    product_wait<0>();
    pin(out);
  }
  DEVICE void run() {
    barrier_wait(shared.queries_full(), 0);
    if (tiles == 0) return;
    if (group == kGroups - 1) named_arrive(1, 256);  // the first warpgroup begins
    first_tile();
    int i = 1;
    for (; i < tiles && !keys.is_seen_by_all(i, tiles); ++i) next_tile<false>(i);
    for (; i < tiles; ++i) next_tile<true>(i);
    if (group == 0) named_sync(1, 256);  // the last warpgroup's last turn, which nobody took
    last_values();
  }
};

// 16 rows of the accumulators to memory by way of the queries' place, whole rows at a time.
template <class T, int D>
DEVICE void store_rows(const Attention<T, D>& x, void* to, const HeadStrides& stride, int T_, int h, int b) {
  const Shared<D>& shared = x.shared;
  UNROLL for (int j = 0; j < D / 4; ++j) {
    const uint32_t panel = shared.queries() + j / 16 * shared.kQueryPanel;
    const int d = j / 2, r = j % 2;
    store_shared(panel + swizzled(x.row + 8 * r, d % 8) + 4 * (x.lane % 4),
                 pack(x.out[4 * d + 2 * r], x.out[4 * d + 2 * r + 1], T{}));
  }
  sync_warp();
  const int first = x.row - x.lane / 4;
  UNROLL for (int i = x.lane; i < 16 * (D / 8); i += 32) {
    const int row = first + i / (D / 8), c = i % (D / 8), t = x.keys.first_row + row;
    if (t >= T_) continue;
    auto* elements = static_cast<T*>(to) + b * stride.b + h * stride.h + t * stride.t;
    *reinterpret_cast<Vec4*>(elements + 8 * c) =
        load_shared(shared.queries() + c / 8 * shared.kQueryPanel + swizzled(row, c % 8));
  }
}

// The same without: the queries are still there. Only for training.
template <class T, int D>
DEVICE void store_row(const Attention<T, D>& x, int r, T* row) {
  UNROLL for (int d = 0; d < D / 8; ++d) {
    auto* pair = reinterpret_cast<uint32_t*>(row + 8 * d + 2 * (x.lane % 4));
    *pair = pack(x.out[4 * d + 2 * r], x.out[4 * d + 2 * r + 1], T{});
  }
}

// A query's logit of one virtual key, in all four threads.
template <class T, int D>
DEVICE float logit(const Attention<T, D>& x, int row, const float* weight, float bias) {
  float sum = 0;
  UNROLL for (int c = x.lane % 4; c < D / 8; c += 4) {
    const Vec4 q = load_shared(x.shared.queries() + c / 8 * x.shared.kQueryPanel + swizzled(row, c % 8));
    const uint32_t pairs[4] = {q.x, q.y, q.z, q.w};
    UNROLL for (int e = 0; e < 4; ++e) {
      float low, high;
      unpack(pairs[e], low, high, T{});
      sum += low * weight[8 * c + 2 * e] + high * weight[8 * c + 2 * e + 1];
    }
  }
  sum += shuffle_xor(sum, 1);
  sum += shuffle_xor(sum, 2);
  return sum + bias;
}

template <class T, int D>
DEVICE void shift_row(Attention<T, D>& x, const VirtualKeys& keys, int r, int adapter, int h, float lse) {
  const int row = x.row + 8 * r, own = adapter < 0 ? 0 : adapter;
  const int64_t first = keys.first_key(own, h);
  const auto logit_of = [&](int64_t key) { return logit(x, row, keys.weight + key * D, keys.bias[key]); };
  LogSumExp together;
  for (int n = 0; n < keys.N; ++n) together.add(logit_of(first + n));
  const Gate gate(together.value(), lse, adapter >= 0, keys.is_prefix(own));
  UNROLL for (int j = 0; j < D / 4; ++j) x.out[j / 2 * 4 + 2 * r + j % 2] *= gate.kept();
  for (int n = 0; n < keys.N; ++n) {
    const float g = logit_of(first + n);  // by all four threads, which need not be of one mind below
    if (!gate.is_shifted) continue;
    const float mass = gate.mu * gate.share(g);
    const float* shift = keys.shift + (first + n) * D + 2 * (x.lane % 4);
    UNROLL for (int j = 0; j < D / 4; ++j) x.out[j / 2 * 4 + 2 * r + j % 2] += mass * shift[j / 2 * 8 + j % 2];
  }
}

// Divides by the sums, writes lse, shifts.
template <class T, int D>
DEVICE void finish(Attention<T, D>& x, const ShiftedAttentionParams& p, int h, int b) {
  UNROLL for (int r = 0; r < 2; ++r) {
    const int t = x.keys.first_row + x.row + 8 * r;
    float sum = x.sum[r];
    sum += shuffle_xor(sum, 1);
    sum += shuffle_xor(sum, 2);
    const bool is_blind = sum == 0;
    const float inverse = 1 / sum;
    UNROLL for (int j = 0; j < D / 4; ++j) {
      float& a = x.out[j / 2 * 4 + 2 * r + j % 2];
      a = is_blind ? 0 : a * inverse;
    }
    const float lse = is_blind ? -INFINITY : (x.highest[r] * x.scale_log2 + log2_approx(sum)) * 0.69314718f;
    if (t < p.T && x.lane % 4 == 0) p.lse[(static_cast<int64_t>(b) * p.H + h) * p.T + t] = lse;
    if (t < p.T && p.attended) {
      const HeadStrides& stride = p.stride_attended;
      store_row(x, r, static_cast<T*>(p.attended) + b * stride.b + h * stride.h + t * stride.t);
    }
    shift_row(x, p.keys, r, t < p.T ? p.keys.adapter(b, t) : -1, h, lse);
  }
  sync_warp();  // the queries have been read
}

template <class T, int D>
KERNEL(kThreads<D>, 1)
shifted_attention_kernel(PARAM(ShiftedAttentionParams) p) {
  const Shared<D> shared{shared_base()};
  const int h = block_x(), b = block_z(), thread = thread_index();
  const int last = (p.T + kTileRows<D> - 1) / kTileRows<D> - 1;  // the longest rows first, if causal
  const Keys keys(p, b, (last - block_y()) * kTileRows<D>);
  const int tiles = keys.tiles(kTileRows<D>);

  if (thread == 0) {
    barrier_init(shared.queries_full(), 1);
    for (int i = 0; i < kStages; ++i) {
      barrier_init(shared.keys_full(i), 1);
      barrier_init(shared.values_full(i), 1);
      barrier_init(shared.keys_empty(i), 4 * Tile<D>::kGroups);  // one lane of each computing warp
      barrier_init(shared.values_empty(i), 4 * Tile<D>::kGroups);
    }
    fence_barrier_init();
  }
  sync_threads();

  if (thread < 128) {
    fewer_registers<Tile<D>::kCopyRegisters>();
    if (thread == 0) copy_tiles(p, shared, keys, tiles, h, b);
    return;
  }
  more_registers<Tile<D>::kRegisters>();
  Attention<T, D> x(shared, keys, tiles, thread - 128, p.scale);
  x.run();
  finish(x, p, h, b);
  store_rows(x, p.out, p.stride_out, p.T, h, b);
}

}  // namespace mmicl::cuda
