// The kernels themselves, included once per instruction set as attention_shift_kernel.h is.

#include <cstdint>

#include "tile_attention.h"

namespace mmicl {
namespace MMICL_ISA {

#include "vec.h"
#include "head_rows.h"
#include "matrix_product.h"
#include "softmax.h"

template <class acc>
struct Memory {  // of a thread
  acc *queries, *values_of, *keys, *values, *scores, *added;
  Softmax<acc>*seen, *all;

  Memory(const TileParams& p, void* scratch) {
    const int64_t D = in_panels(p.D);
    queries = static_cast<acc*>(scratch);
    values_of = queries + p.rows() * p.D;
    keys = values_of + p.rows() * D;
    values = keys + kTileKeys * p.D;
    scores = values + kTileKeys * D;
    added = scores + kStripRows * kTileKeys;
    seen = reinterpret_cast<Softmax<acc>*>(added + kStripRows * kTileKeys);
    all = seen + p.rows();
  }
};

// What one task computes: queries from begin to end of the heads that read key head g of row b.
template <class T>
struct Task {
  using acc = acc_t<T>;
  const TileParams& p;
  int64_t b, g, begin, end;

  // Short and long tiles of a causal mask in turn: threads get as many keys.
  MMICL_INLINE Task(const TileParams& p, int64_t index) : p(p) {
    const int64_t tiles = p.tiles(), i = index % tiles, tile = i % 2 ? tiles - 1 - i / 2 : i / 2;
    g = index / tiles % p.G, b = index / tiles / p.G;
    begin = tile * p.queries, end = begin + p.queries < p.T ? begin + p.queries : p.T;
    if (begin > end) begin = end;
  }

  MMICL_INLINE int64_t rows() const { return p.H / p.G * (end - begin); }
  MMICL_INLINE int64_t head(int64_t r) const { return g * (p.H / p.G) + r / (end - begin); }
  MMICL_INLINE int64_t query(int64_t r) const { return begin + r % (end - begin); }
  MMICL_INLINE Range keys_of_rows(int64_t from, int64_t to) const {
    Range range{p.S, 0};
    for (int64_t r = from; r < to; ++r) range.join(keys_of(p, b, query(r)));
    return range;
  }
};

// Rows from to to of a task, with n keys from j on, which lie packed in memory.
template <class T>
MMICL_INLINE void attend_strip(const Task<T>& task, const Memory<acc_t<T>>& m, int64_t from, int64_t to, int64_t j,
                               int64_t n) {
  using acc = acc_t<T>;
  const TileParams& p = task.p;
  const bool gated = p.gate_lse.data;
  const int64_t b = task.b, D = in_panels(p.D), M = to - from;
  Range range = task.keys_of_rows(from, to);
  range.clip(j, j + n);
  bool any = !range.is_empty();
  if (any && p.mask_type != MaskType::none) {
    any = false;
    for (int64_t i = 0; i < M; ++i) {
      any |= read_mask(m.added + i * kTileKeys, p, b, task.head(from + i), task.query(from + i), j, n);
    }
  }
  if (!any && !gated) return;

  // Whole panels of the keys that some row needs.
  const int64_t low = gated ? 0 : (range.first - j) / kPanel * kPanel;
  const int64_t count = (gated ? n : range.last - j) - low;
  const Left<acc> queries{m.queries + from * p.D, p.D, 1};
  multiply<false>(m.scores + low, kTileKeys, queries, m.keys + low * p.D, kPanel * p.D, M, count, p.D);
  for (int64_t i = 0; i < M; ++i) {
    acc* scores = m.scores + i * kTileKeys + low;
    make_scores(scores, p, count);
    if (gated) {
      acc weights[kTileKeys];
      m.all[from + i].add_gate(weights, scores, p.gate_end[b] - j, count);
    }
    if (!any) continue;
    hide(scores, p, m.added + i * kTileKeys + low, keys_of(p, b, task.query(from + i)), j + low, count);
    const acc kept = m.seen[from + i].add(scores, scores, count);
    acc* sums = m.values_of + (from + i) * D;
    if (kept != 1) {
      for (int64_t d = 0; d < D; d += kLanes) store(sums + d, load(sums + d) * kept);
    }
  }
  if (!any) return;
  const Left<acc> weights{m.scores + low, kTileKeys, 1};
  multiply<true>(m.values_of + from * D, D, weights, m.values + low * kPanel, n * kPanel, M, p.D, count);
}

template <class T>
void attend(const TileParams& p, void* scratch, int64_t begin, int64_t end) {
  using acc = acc_t<T>;
  const int64_t D = in_panels(p.D);
  const Memory<acc> m(p, scratch);
  for (int64_t index = begin; index < end; ++index) {
    const Task<T> task(p, index);
    const int64_t R = task.rows(), b = task.b, g = task.g;
    for (int64_t r = 0; r < R; ++r) {
      widen_rows<T>(m.queries + r * p.D, p.D, row<T>(p.q, b, task.head(r), task.query(r)), 0, 1, p.D);
      m.seen[r] = m.all[r] = {};
    }
    __builtin_memset(m.values_of, 0, R * D * sizeof(acc));

    Range range = task.keys_of_rows(0, R);
    if (p.gate_lse.data) range.join({0, p.gate_end[b]});
    range.clip(0, p.S);
    for (int64_t j = range.first; j < range.last; j += kTileKeys) {
      const int64_t n = range.last - j < kTileKeys ? range.last - j : kTileKeys;
      pack_transposed<T>(m.keys, row<T>(p.k, b, g, j), p.k.stride_t, n, p.D);
      pack<T>(m.values, row<T>(p.v, b, g, j), p.v.stride_t, n, p.D);
      for (int64_t r = 0; r < R; r += kStripRows) {
        attend_strip(task, m, r, r + kStripRows < R ? r + kStripRows : R, j, n);
      }
    }

    for (int64_t r = 0; r < R; ++r) {
      const int64_t h = task.head(r), t = task.query(r);
      const Softmax<acc>& seen = m.seen[r];
      const bool blind = seen.is_empty();
      const acc inverse = blind ? acc(0) : 1 / seen.total;
      scale(row<T>(p.out, b, h, t), inverse, m.values_of + r * D, p.D);
      *row<acc>(p.lse, b, h, t) = seen.lse();
      if (p.gate_lse.data) *row<acc>(p.gate_lse, b, h, t) = blind ? seen.maximum : m.all[r].lse();
    }
  }
}

template <class T>
constexpr TileKernels kTileKernels = {attend<T>};

}  // namespace MMICL_ISA

const TileKernels MMICL_TABLE[4] = {
    MMICL_ISA::kTileKernels<float>,
    MMICL_ISA::kTileKernels<double>,
    MMICL_ISA::kTileKernels<MMICL_ISA::bf16>,
    MMICL_ISA::kTileKernels<MMICL_ISA::f16>,
};

}  // namespace mmicl
