// The backward of attention.h's attention, by products of tiles:
//
//   p = exp(s - lse)      delta = dout.base      ds = p (dout.v - delta)
//   dq = scale sum ds k      dk = scale sum ds q      dv = sum p dout
//
// base is the output, or what stands in its place, and lse may count more than the keys. A task is one key head of
// one batch row with every parts-th tile of its keys and all queries that read them; dq is the sum of its parts, in
// order. A query whose lse is -infinity has no part in it. No mask that is added to the scores.
#pragma once

#include <cstdint>

#include "attention.h"

namespace mmicl {

constexpr int64_t kBlock = 64;  // queries, and keys, of a product

struct AttentionBackwardParams : AttentionParams {
  ConstRows dout, base, given_lse;  // given_lse is acc
  MutableRows dq, dk, dv;
  MutableRows delta;  // [B, H, T] acc
  void* partial;      // [parts, B, H, T, D in whole panels] acc
  int64_t parts;

  int64_t tasks() const { return B * G * parts; }
};

// Enough tasks for sixteen threads, where there are as many tiles.
inline int64_t backward_parts(const AttentionParams& p) {
  const int64_t wanted = 16 / (p.B * p.G > 0 ? p.B * p.G : 1), tiles = (p.S + kBlock - 1) / kBlock;
  const int64_t parts = wanted < 4 ? wanted : 4;
  return parts < 1 || tiles < 1 ? 1 : parts < tiles ? parts : tiles;
}

// Numbers of acc that a thread needs: keys, values and their gradients; queries and dout; scores, ds and mask.
inline int64_t backward_scratch_size(const AttentionParams& p) {
  return 9 * kBlock * in_panels(p.D) + 3 * kBlock * kBlock;
}

struct AttentionBackwardKernels {
  void (*find_delta)(const AttentionBackwardParams&, int64_t begin, int64_t end);              // B * H * T
  void (*attend)(const AttentionBackwardParams&, void* scratch, int64_t begin, int64_t end);   // tasks, after it
  void (*add_parts)(const AttentionBackwardParams&, int64_t begin, int64_t end);               // B * H * T, after it
};

const AttentionBackwardKernels& attention_backward_kernels(ElementType type);

extern const AttentionBackwardKernels kAttentionBackwardBaseline[4];
extern const AttentionBackwardKernels kAttentionBackwardAvx2[4];
extern const AttentionBackwardKernels kAttentionBackwardAvx512[4];

}  // namespace mmicl
