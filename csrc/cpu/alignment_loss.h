// alignment_loss on CPU: squares of rows and their gradient; what a kernel is given. No torch here.
//
//   d_n = |x_n - y_n|^2      s_n = |x_n|^2 + |y_n|^2
//   dx_r = sum_{n: index_n = r} 2 dd_n (x_r - y_n) + 2 ds_n x_r
//
// Letters: B batch, T tokens, R = B T rows of the states x, C model dim, N targets y. acc is float for states
// of float, bfloat16 and half elements, double for double.
#pragma once

#include <cstdint>

#include "attention_shift.h"
#include "token_rows.h"

namespace mmicl {

struct AlignmentRows {
  int64_t R = 0, T = 0, C = 0;
  ConstTokens states;
  const void* targets = nullptr;  // [N, C]
  int64_t stride_targets = 0;
};

struct SquaresParams : AlignmentRows {
  const int64_t* index = nullptr;  // [N]; outside of the R rows it is none
  void *d = nullptr, *s = nullptr;  // [N] acc
};

struct SquaresGradParams : AlignmentRows {
  // Row r is used by order[starts[r]] to order[starts[r + 1] - 1].
  const int64_t *order = nullptr, *starts = nullptr;
  const void *dd = nullptr, *ds = nullptr;  // [N] acc
  void* dstates = nullptr;                  // [R, C]
};

// Each does the half-open range [begin, end) of its items, to be split over threads at will. Indexed by the
// targets' type.
struct AlignmentLossKernels {
  void (*forward[4])(const SquaresParams&, int64_t begin, int64_t end);       // targets
  void (*backward[4])(const SquaresGradParams&, int64_t begin, int64_t end);  // rows of dstates
};

const AlignmentLossKernels& alignment_loss_kernels(ElementType states);

// One table per translation unit, indexed by the states' type.
extern const AlignmentLossKernels kAlignmentLossBaseline[4];
extern const AlignmentLossKernels kAlignmentLossAvx2[4];
extern const AlignmentLossKernels kAlignmentLossAvx512[4];

}  // namespace mmicl
