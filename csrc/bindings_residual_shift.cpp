// residual_shift and residual_shift_rms_norm: schemas, checks, tensors to params. The arguments are those of
// the functions of the same names in mmicl_kernels/ops/residual_shift*/_torch.py.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "bindings.h"
#include "cpu/residual_shift.h"

namespace {

using namespace mmicl;

ConstTokens tokens(const Tensor& x) { return {x.const_data_ptr(), x.stride(0), x.stride(1)}; }
MutableTokens writable_tokens(const Tensor& x) {
  return {x.mutable_data_ptr(), x.stride(0), x.stride(1)};
}

void check_tokens(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.dim() == 3, name, " has ", x.dim(), " dims, expected [B, T, C]");
  element_type(x, name);
  check_rows(x, name, shape_of(x), x.scalar_type());
}

void check_entry_ids(const Tensor& ids, const EntryParams& p) {
  check_tensor(ids, "adapter_ids", {p.B, p.K}, ScalarType::Int);
  const auto* data = static_cast<const int32_t*>(ids.const_data_ptr());
  for (int64_t b = 0; b < p.B; ++b) {
    for (int64_t k = 0; k < p.K; ++k) {
      const int32_t id = data[b * ids.stride(0) + k * ids.stride(1)];
      STD_TORCH_CHECK(id >= -1 && id < p.A, "adapter_ids[", b, ", ", k, "] is ", id,
                      ", expected -1 or 0 to ", p.A - 1);
    }
  }
}

// Returns the memory of the combined entries, which must outlive the kernels.
std::optional<Tensor> fill_entries(EntryParams& p, const Tensor& like, const Tensor& vector,
                                   const std::optional<Tensor>& scale, const std::optional<Tensor>& ids,
                                   const std::optional<Tensor>& strengths) {
  const ScalarType acc = acc_type(like.scalar_type());
  p.B = like.size(0), p.T = like.size(1), p.C = like.size(2);
  STD_TORCH_CHECK(vector.dim() == 2, "vector has ", vector.dim(), " dims, expected [A, C]");
  p.A = vector.size(0);
  check_contiguous(vector, "vector", {p.A, p.C}, acc);
  p.vector = vector.const_data_ptr();
  STD_TORCH_CHECK(ids || p.A >= 1 || p.B == 0, "vector has no adapters");
  if (scale) {
    const bool shared = scale->dim() == 1 && scale->size(0) == 1;
    check_contiguous(*scale, "scale", {shared ? 1 : p.A}, acc);
    p.scale = scale->const_data_ptr(), p.stride_scale = shared ? 0 : 1;
  }
  if (!ids) return std::nullopt;
  STD_TORCH_CHECK(ids->dim() == 2, "adapter_ids has ", ids->dim(), " dims, expected [B, K]");
  p.K = ids->size(1);
  check_entry_ids(*ids, p);
  p.adapter_ids = static_cast<const int32_t*>(ids->const_data_ptr());
  p.stride_ids_b = ids->stride(0), p.stride_ids_k = ids->stride(1);
  if (strengths) {
    check_contiguous(*strengths, "strengths", {p.B, p.K}, acc);
    p.strengths = strengths->const_data_ptr();
  }
  if (p.K == 1) return std::nullopt;
  const Tensor combined = torch::stable::new_empty(vector, {p.B, p.C});
  p.combined = combined.mutable_data_ptr();
  residual_shift_kernels(element_type(like, "x")).combine(p, 0, p.B);
  return combined;
}

// The layout of x where that is dense, else contiguous.
Tensor new_tokens(const Tensor& x) {
  const int64_t B = x.size(0), T = x.size(1), C = x.size(2);
  if (!x.is_contiguous() && torch::stable::transpose(x, 0, 1).is_contiguous()) {
    return torch::stable::transpose(torch::stable::new_empty(x, {T, B, C}), 0, 1);
  }
  return torch::stable::new_empty(x, {B, T, C});
}

// The tiles' sums as [B, N, C], in the accumulation type, or an empty tensor.
Tensor new_sums(const Tensor& like, const EntryParams& p, bool needed) {
  const ScalarType acc = acc_type(like.scalar_type());
  if (!needed) return torch::stable::new_empty(like, {0}, acc);
  return torch::stable::new_empty(like, {p.B, tiles_per_sequence(p), p.C}, acc);
}

template <class Kernel, class Params>
void parallel_tokens(Kernel kernel, const Params& p) {
  const int64_t elements = std::max<int64_t>(1, std::min(p.T, kTileTokens) * p.C);
  torch::stable::parallel_for(0, token_tiles(p), (32768 + elements - 1) / elements,
                              [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

Tensor residual_shift_fwd(const Tensor& x, const Tensor& vector, const std::optional<Tensor>& scale,
                          const std::optional<Tensor>& ids, const std::optional<Tensor>& strengths,
                          bool preserve_norm) {
  check_tokens(x, "x");
  ResidualShiftParams p;
  const auto combined = fill_entries(p, x, vector, scale, ids, strengths);
  const Tensor out = new_tokens(x);
  p.x = tokens(x), p.out = writable_tokens(out), p.preserve_norm = preserve_norm;
  parallel_tokens(residual_shift_kernels(element_type(x, "x")).forward, p);
  return out;
}

std::tuple<Tensor, Tensor> residual_shift_bwd(const Tensor& dout, const std::optional<Tensor>& x,
                                              const Tensor& vector, const std::optional<Tensor>& scale,
                                              const std::optional<Tensor>& ids,
                                              const std::optional<Tensor>& strengths, bool need_dx,
                                              bool need_sums) {
  check_tokens(dout, "dout");
  ResidualShiftGradParams p;
  const auto combined = fill_entries(p, dout, vector, scale, ids, strengths);
  p.dout = tokens(dout);
  if (x) {
    check_rows(*x, "x", shape_of(dout), dout.scalar_type());
    p.x = tokens(*x);
  }
  need_dx = need_dx && x;
  const Tensor dx = need_dx ? new_tokens(*x) : torch::stable::new_empty(dout, {0});
  const Tensor sums = new_sums(dout, p, need_sums);
  if (need_dx) p.dx = writable_tokens(dx);
  if (need_sums) p.sums = sums.mutable_data_ptr();
  parallel_tokens(residual_shift_kernels(element_type(dout, "dout")).backward, p);
  return {dx, sums};
}

std::tuple<Tensor, Tensor, Tensor> residual_shift_rms_norm_fwd(
    const Tensor& x, const Tensor& residual, const Tensor& vector, const std::optional<Tensor>& scale,
    const Tensor& norm_weight, const std::optional<Tensor>& ids, double eps, double weight_offset) {
  check_tokens(x, "x");
  check_rows(residual, "residual", shape_of(x), x.scalar_type());
  RMSNormParams p;
  const auto combined = fill_entries(p, x, vector, scale, ids, std::nullopt);
  const ScalarType acc = acc_type(x.scalar_type());
  check_contiguous(norm_weight, "norm_weight", {p.C}, acc);
  const Tensor normed = new_tokens(x), new_residual = new_tokens(x);
  const Tensor rstd = torch::stable::new_empty(x, {p.B, p.T}, acc);
  p.x = tokens(x), p.residual = tokens(residual), p.weight = norm_weight.const_data_ptr();
  p.eps = eps, p.offset = weight_offset;
  p.normed = writable_tokens(normed), p.new_residual = writable_tokens(new_residual);
  p.rstd = writable_tokens(rstd);
  parallel_tokens(residual_shift_kernels(element_type(x, "x")).norm_forward, p);
  return {normed, new_residual, rstd};
}

std::tuple<Tensor, Tensor, Tensor> residual_shift_rms_norm_bwd(
    const Tensor& dnormed, const std::optional<Tensor>& dnew_residual, const Tensor& new_residual,
    const Tensor& rstd, const Tensor& norm_weight, double weight_offset, bool need_sums,
    bool need_dweight) {
  check_tokens(new_residual, "new_residual");
  const ScalarType type = new_residual.scalar_type();
  check_rows(dnormed, "dnormed", shape_of(new_residual), type);
  RMSNormGradParams p;
  p.B = new_residual.size(0), p.T = new_residual.size(1), p.C = new_residual.size(2);
  check_tensor(rstd, "rstd", {p.B, p.T}, acc_type(type));
  check_contiguous(norm_weight, "norm_weight", {p.C}, acc_type(type));
  if (dnew_residual) {
    check_rows(*dnew_residual, "dnew_residual", shape_of(new_residual), type);
    p.dnew_residual = tokens(*dnew_residual);
  }
  const Tensor dx = new_tokens(new_residual);
  const Tensor sums = new_sums(new_residual, p, need_sums);
  const Tensor weight_sums = new_sums(new_residual, p, need_dweight);
  p.dnormed = tokens(dnormed), p.new_residual = tokens(new_residual), p.rstd = tokens(rstd);
  p.weight = norm_weight.const_data_ptr(), p.offset = weight_offset, p.dx = writable_tokens(dx);
  if (need_sums) p.sums = sums.mutable_data_ptr();
  if (need_dweight) p.weight_sums = weight_sums.mutable_data_ptr();
  parallel_tokens(residual_shift_kernels(element_type(new_residual, "new_residual")).norm_backward, p);
  return {dx, sums, weight_sums};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mmicl_cpu, m) {
  m.def(
      "residual_shift_fwd(Tensor x, Tensor vector, Tensor? scale, Tensor? adapter_ids, Tensor? strengths, "
      "bool preserve_norm) -> Tensor");
  m.def(
      "residual_shift_bwd(Tensor dout, Tensor? x, Tensor vector, Tensor? scale, Tensor? adapter_ids, "
      "Tensor? strengths, bool need_dx, bool need_sums) -> (Tensor dx, Tensor sums)");
  m.def(
      "residual_shift_rms_norm_fwd(Tensor x, Tensor residual, Tensor vector, Tensor? scale, "
      "Tensor norm_weight, Tensor? adapter_ids, float eps, float weight_offset) -> "
      "(Tensor normed, Tensor new_residual, Tensor rstd)");
  m.def(
      "residual_shift_rms_norm_bwd(Tensor dnormed, Tensor? dnew_residual, Tensor new_residual, Tensor rstd, "
      "Tensor norm_weight, float weight_offset, bool need_sums, bool need_dweight) -> "
      "(Tensor dx, Tensor sums, Tensor weight_sums)");
}

STABLE_TORCH_LIBRARY_IMPL(mmicl_cpu, CPU, m) {
  m.impl("residual_shift_fwd", TORCH_BOX(&residual_shift_fwd));
  m.impl("residual_shift_bwd", TORCH_BOX(&residual_shift_bwd));
  m.impl("residual_shift_rms_norm_fwd", TORCH_BOX(&residual_shift_rms_norm_fwd));
  m.impl("residual_shift_rms_norm_bwd", TORCH_BOX(&residual_shift_rms_norm_bwd));
}
