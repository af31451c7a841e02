// residual_shift and residual_shift_rms_norm: schemas, checks, tensors to params. The arguments are those of
// the functions of the same names in mmicl_kernels/ops/residual_shift*/_torch.py.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

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

// Ids and strengths [B, K], or of every token [B, T, K].
void fill_ids(EntryParams& p, const Tensor& ids, const std::optional<Tensor>& strengths, ScalarType acc) {
  STD_TORCH_CHECK(ids.dim() == 2 || ids.dim() == 3, "adapter_ids has ", ids.dim(),
                  " dims, expected [B, K] or [B, T, K]");
  p.per_token = ids.dim() == 3;
  p.K = ids.size(ids.dim() - 1);
  const Shape shape = p.per_token ? Shape{p.B, p.T, p.K} : Shape{p.B, p.K};
  check_tensor(ids, "adapter_ids", shape, ScalarType::Int);
  p.adapter_ids = static_cast<const int32_t*>(ids.const_data_ptr());
  p.stride_ids_b = ids.stride(0), p.stride_ids_k = ids.stride(ids.dim() - 1);
  p.stride_ids_t = p.per_token ? ids.stride(1) : 0;
  for (int64_t b = 0; b < p.B; ++b) {
    for (int64_t t = 0; t < (p.per_token ? p.T : 1); ++t) {
      for (int64_t k = 0; k < p.K; ++k) {
        const int32_t id = p.adapter_ids[b * p.stride_ids_b + t * p.stride_ids_t + k * p.stride_ids_k];
        STD_TORCH_CHECK(id >= -1 && id < p.A, "adapter_ids of batch row ", b, " has ", id,
                        ", expected -1 or 0 to ", p.A - 1);
      }
    }
  }
  if (strengths) {
    check_contiguous(*strengths, "strengths", shape, acc);
    p.strengths = strengths->const_data_ptr();
  }
}

void fill_sizes(EntryParams& p, const Tensor& x) { p.B = x.size(0), p.T = x.size(1), p.C = x.size(2); }

void fill_vector(EntryParams& p, const Tensor& vector, ScalarType acc) {
  STD_TORCH_CHECK(vector.dim() == 2, "vector has ", vector.dim(), " dims, expected [A, C]");
  p.A = vector.size(0), p.stride_vector = p.C;
  check_contiguous(vector, "vector", {p.A, p.C}, acc);
  p.vector = vector.const_data_ptr();
}

void fill_entries(EntryParams& p, const Tensor& like, const Tensor& vector,
                  const std::optional<Tensor>& scale, const std::optional<Tensor>& ids,
                  const std::optional<Tensor>& strengths) {
  const ScalarType acc = acc_type(like.scalar_type());
  fill_sizes(p, like);
  fill_vector(p, vector, acc);
  if (scale) {
    const bool shared = scale->dim() == 1 && scale->size(0) == 1;
    check_contiguous(*scale, "scale", {shared ? 1 : p.A}, acc);
    p.scale = scale->const_data_ptr(), p.stride_scale = shared ? 0 : 1;
  }
  if (ids) return fill_ids(p, *ids, strengths, acc);
  STD_TORCH_CHECK(p.A == 1 || p.A == p.B, "vector has ", p.A, " rows, expected 1 or ", p.B);
  if (p.A == 1) p.stride_vector = 0;
}

// The layout of x where that is dense, else contiguous.
Tensor new_tokens(const Tensor& x) {
  const int64_t B = x.size(0), T = x.size(1), C = x.size(2);
  const bool is_turned = C > 0 && x.stride(2) == 1 && x.stride(0) == C && x.stride(1) == B * C;
  int32_t type;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &type));
  const int64_t width = std::max<int64_t>(1, C);  // as torch's strides of what is empty
  const Shape turned{width, std::max<int64_t>(1, B) * width, 1};
  const Shape plain{std::max<int64_t>(1, T) * width, width, 1};
  return empty_strided({B, T, C}, is_turned && !x.is_contiguous() ? turned : plain, type);
}

// The sums of tiles, or what there is for each token, as [B, N, C] in the accumulation type; or empty.
Tensor new_sums(const Tensor& like, const EntryParams& p, bool needed) {
  const ScalarType acc = acc_type(like.scalar_type());
  if (!needed) return torch::stable::new_empty(like, {0}, acc);
  return torch::stable::new_empty(like, {p.B, p.per_token ? p.T : tiles_per_sequence(p), p.C}, acc);
}

template <class Kernel, class Params>
void parallel_tokens(Kernel kernel, const Params& p) {
  const int64_t elements = std::max<int64_t>(1, std::min(p.T, kTileTokens) * p.C);
  torch::stable::parallel_for(0, token_tiles(p), (32768 + elements - 1) / elements,
                              [&](int64_t begin, int64_t end) {
                                std::vector<double> combined(p.K > 1 ? p.C : 0);  // of floats or doubles
                                Params own = p;
                                own.combined = combined.data();
                                kernel(own, begin, end);
                              });
}

Tensor residual_shift_fwd(const Tensor& x, const Tensor& vector, const std::optional<Tensor>& scale,
                          const std::optional<Tensor>& ids, const std::optional<Tensor>& strengths,
                          bool preserve_norm) {
  check_tokens(x, "x");
  ResidualShiftParams p;
  fill_entries(p, x, vector, scale, ids, strengths);
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
  fill_entries(p, dout, vector, scale, ids, strengths);
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
    const Tensor& norm_weight, const std::optional<Tensor>& ids, const std::optional<Tensor>& strengths,
    double eps, double weight_offset) {
  check_tokens(x, "x");
  check_rows(residual, "residual", shape_of(x), x.scalar_type());
  RMSNormParams p;
  fill_entries(p, x, vector, scale, ids, strengths);
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
  fill_sizes(p, new_residual);
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

// The sums of an adapter's tokens, of entries in the order of [B, T, K], in parts of some 32.
std::tuple<Tensor, Tensor> adapter_sums(const Tensor& dd, const Tensor& ids,
                                        const std::optional<Tensor>& strengths, int64_t A) {
  check_tokens(dd, "dd");
  const ScalarType acc = acc_type(dd.scalar_type());
  AdapterSumsParams p;
  fill_sizes(p, dd);
  p.A = A;
  fill_ids(p, ids, strengths, acc);
  STD_TORCH_CHECK(p.per_token, "adapter_ids has 2 dims, expected [B, T, K]");
  std::vector<int64_t> starts(A + 2), order(p.B * p.T * p.K);
  const auto for_entries = [&](auto body) {
    for (int64_t i = 0; i < static_cast<int64_t>(order.size()); ++i) {
      const int64_t token = i / p.K;
      const int32_t id = p.adapter_ids[token / p.T * p.stride_ids_b + token % p.T * p.stride_ids_t +
                                       i % p.K * p.stride_ids_k];
      if (id >= 0) body(i, id);
    }
  };
  for_entries([&](int64_t, int32_t id) { ++starts[id + 2]; });
  for (int64_t a = 1; a < A; ++a) starts[a + 1] += starts[a];
  for_entries([&](int64_t i, int32_t id) { order[starts[id + 1]++] = i; });
  p.order = order.data(), p.starts = starts.data();
  p.parts = 1 + static_cast<int64_t>(order.size()) / (kTileTokens * std::max<int64_t>(1, A));
  p.dd = tokens(dd);
  const Tensor sums = torch::stable::new_empty(dd, {A, p.parts, p.C}, acc);
  const Tensor used = torch::stable::new_empty(ids, {A, 1});
  p.sums = sums.mutable_data_ptr();
  for (int64_t a = 0; a < A; ++a) {
    static_cast<int32_t*>(used.mutable_data_ptr())[a] = starts[a] < starts[a + 1] ? a : -1;
  }
  const auto kernel = residual_shift_kernels(element_type(dd, "dd")).adapter_sums;
  torch::stable::parallel_for(0, A * p.parts, 1 + 32768 / std::max<int64_t>(1, kTileTokens * p.C),
                              [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  return {sums, used};
}

Tensor entry_products(const Tensor& dd, const Tensor& vector, const Tensor& ids) {
  check_tokens(dd, "dd");
  const ScalarType acc = acc_type(dd.scalar_type());
  EntryProductsParams p;
  fill_sizes(p, dd);
  fill_vector(p, vector, acc);
  fill_ids(p, ids, std::nullopt, acc);
  STD_TORCH_CHECK(p.per_token, "adapter_ids has 2 dims, expected [B, T, K]");
  p.dd = tokens(dd);
  const Tensor products = torch::stable::new_empty(dd, {p.B, p.T, p.K}, acc);
  p.products = products.mutable_data_ptr();
  const auto kernel = residual_shift_kernels(element_type(dd, "dd")).entry_products;
  parallel_rows(p.B * p.T, p.C, [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  return products;
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
      "Tensor norm_weight, Tensor? adapter_ids, Tensor? strengths, float eps, float weight_offset) -> "
      "(Tensor normed, Tensor new_residual, Tensor rstd)");
  m.def(
      "residual_shift_rms_norm_bwd(Tensor dnormed, Tensor? dnew_residual, Tensor new_residual, Tensor rstd, "
      "Tensor norm_weight, float weight_offset, bool need_sums, bool need_dweight) -> "
      "(Tensor dx, Tensor sums, Tensor weight_sums)");
  m.def(
      "adapter_sums(Tensor dd, Tensor adapter_ids, Tensor? strengths, int A) -> (Tensor sums, Tensor used)");
  m.def("entry_products(Tensor dd, Tensor vector, Tensor adapter_ids) -> Tensor");
}

// Its schema is in mmicl_kernels/ops/residual_shift/_op.py, with what compiled graphs need to know.
STABLE_TORCH_LIBRARY_IMPL(mmicl, CPU, m) {
  m.impl("residual_shift_inference", TORCH_BOX(&residual_shift_fwd));
}

STABLE_TORCH_LIBRARY_IMPL(mmicl_cpu, CPU, m) {
  m.impl("residual_shift_fwd", TORCH_BOX(&residual_shift_fwd));
  m.impl("residual_shift_bwd", TORCH_BOX(&residual_shift_bwd));
  m.impl("residual_shift_rms_norm_fwd", TORCH_BOX(&residual_shift_rms_norm_fwd));
  m.impl("residual_shift_rms_norm_bwd", TORCH_BOX(&residual_shift_rms_norm_bwd));
  m.impl("adapter_sums", TORCH_BOX(&adapter_sums));
  m.impl("entry_products", TORCH_BOX(&entry_products));
}
