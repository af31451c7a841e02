// Attention of many queries, by products of tiles. A task is one key head of one batch row with a tile of the
// queries that read it, from all of its heads: keys and values are read once for each.
#pragma once

#include <cstdint>

#include "attention.h"

namespace mmicl {

constexpr int64_t kTileKeys = 128;
constexpr int64_t kStripRows = 24;  // as many share scores in the first cache

// Queries of a task, of each head: few where that leaves threads without one.
inline int64_t tile_queries(const AttentionParams& p) {
  const int64_t group = p.H / p.G;
  for (int64_t rows = 192;; rows /= 2) {
    const int64_t queries = rows > group ? rows / group : 1;
    if (rows <= kStripRows || p.B * p.G * ((p.T + queries - 1) / queries) >= 16) {
      const int64_t tiles = (p.T + queries - 1) / queries;
      return (p.T + tiles - 1) / tiles;
    }
  }
}

struct TileParams : AttentionParams {
  int64_t queries;  // tile_queries()

  int64_t tiles() const { return (T + queries - 1) / queries; }
  int64_t tasks() const { return B * G * tiles(); }
  int64_t rows() const { return H / G * queries; }
};

// Numbers of acc that a thread needs: queries and their sums, a tile of keys and values, a strip's scores and mask.
inline int64_t tile_scratch_size(const TileParams& p) {
  const int64_t D = in_panels(p.D);
  return p.rows() * (p.D + D + kSums) + kTileKeys * (p.D + D) + 2 * kStripRows * kTileKeys;
}

struct TileKernels {
  void (*attend)(const TileParams&, void* scratch, int64_t begin, int64_t end);  // tasks
};

const TileKernels& tile_kernels(ElementType type);

extern const TileKernels kTileBaseline[4];
extern const TileKernels kTileAvx2[4];
extern const TileKernels kTileAvx512[4];

}  // namespace mmicl
