// alignment_loss: schemas, checks, tensors to params. The arguments are those of the functions of the same
// names in mmicl_kernels/ops/alignment_loss/_torch.py.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "bindings.h"
#include "cpu/alignment_loss.h"

namespace {

using namespace mmicl;
using torch::stable::new_empty;

const int64_t* indices(const Tensor& x, const char* name, int64_t size) {
  check_contiguous(x, name, {size}, ScalarType::Long);
  return static_cast<const int64_t*>(x.const_data_ptr());
}

void fill_rows(AlignmentRows& p, const Tensor& states, const Tensor& targets, int64_t N) {
  check_floating_rows(states, "states", 3);
  check_floating_rows(targets, "targets", 2);
  p.R = states.size(0) * states.size(1), p.T = states.size(1), p.C = states.size(2);
  check_rows(targets, "targets", {N, p.C}, targets.scalar_type());
  p.states = {states.const_data_ptr(), states.stride(0), states.stride(1)};
  p.targets = targets.const_data_ptr(), p.stride_targets = targets.stride(0);
}

std::tuple<Tensor, Tensor> alignment_squares_fwd(const Tensor& states, const Tensor& targets,
                                                 const Tensor& index) {
  SquaresParams p;
  const int64_t N = index.numel();
  fill_rows(p, states, targets, N);
  p.index = indices(index, "index", N);
  const ScalarType acc = acc_type(states.scalar_type());
  const Tensor d = new_empty(states, {N}, acc), s = new_empty(states, {N}, acc);
  p.d = d.mutable_data_ptr(), p.s = s.mutable_data_ptr();
  const auto forward = alignment_loss_kernels(element_type(states, "states"))
                           .forward[static_cast<int>(element_type(targets, "targets"))];
  parallel_rows(N, p.C, [&](int64_t begin, int64_t end) { forward(p, begin, end); });
  return {d, s};
}

// Every use is one of the N targets.
void check_uses(const SquaresGradParams& p, int64_t N) {
  STD_TORCH_CHECK(p.starts[0] >= 0 && p.starts[p.R] <= N, "starts goes from ", p.starts[0], " to ",
                  p.starts[p.R], ", expected 0 to ", N);
  for (int64_t r = 0; r < p.R; ++r) {
    STD_TORCH_CHECK(p.starts[r] <= p.starts[r + 1], "starts[", r + 1, "] is ", p.starts[r + 1],
                    ", expected at least ", p.starts[r]);
  }
  for (int64_t i = 0; i < N; ++i) {
    STD_TORCH_CHECK(p.order[i] >= 0 && p.order[i] < N, "order[", i, "] is ", p.order[i], ", expected 0 to ",
                    N - 1);
  }
}

Tensor alignment_squares_bwd(const Tensor& dd, const Tensor& ds, const Tensor& states, const Tensor& targets,
                             const Tensor& order, const Tensor& starts) {
  SquaresGradParams p;
  const int64_t N = order.numel();
  fill_rows(p, states, targets, N);
  check_contiguous(dd, "dd", {N}, acc_type(states.scalar_type()));
  check_contiguous(ds, "ds", {N}, acc_type(states.scalar_type()));
  p.order = indices(order, "order", N), p.starts = indices(starts, "starts", p.R + 1);
  check_uses(p, N);
  const Tensor dstates = new_rows(states, shape_of(states), states.scalar_type());
  p.dd = dd.const_data_ptr(), p.ds = ds.const_data_ptr();
  p.dstates = dstates.mutable_data_ptr();
  const auto backward = alignment_loss_kernels(element_type(states, "states"))
                            .backward[static_cast<int>(element_type(targets, "targets"))];
  parallel_rows(p.R, p.C, [&](int64_t begin, int64_t end) { backward(p, begin, end); });
  return dstates;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mmicl_cpu, m) {
  m.def("alignment_squares_fwd(Tensor states, Tensor targets, Tensor index) -> (Tensor d, Tensor s)");
  m.def(
      "alignment_squares_bwd(Tensor dd, Tensor ds, Tensor states, Tensor targets, Tensor order, "
      "Tensor starts) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(mmicl_cpu, CPU, m) {
  m.impl("alignment_squares_fwd", TORCH_BOX(&alignment_squares_fwd));
  m.impl("alignment_squares_bwd", TORCH_BOX(&alignment_squares_bwd));
}
