// Schemas, checks, tensors to params. Only bindings* know torch, through libtorch's stable ABI, so that one
// binary serves every torch from TORCH_TARGET_VERSION on. Here: attention_shift; others have their own files.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "bindings.h"
#include "cpu/attention_shift.h"

namespace {

using namespace mmicl;

// ---- checks of values ----

// Of [B] or, for each query its own, [B, T].
void check_ids(const std::optional<Tensor>& ids, int64_t B, int64_t T, int64_t A) {
  if (!ids) {
    STD_TORCH_CHECK(A >= 1 || B == 0, "weight has no adapters");
    return;
  }
  const bool per_query = ids->dim() == 2;
  check_tensor(*ids, "adapter_ids", per_query ? Shape{B, T} : Shape{B}, ScalarType::Int);
  const auto* data = static_cast<const int32_t*>(ids->const_data_ptr());
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t t = 0; t < (per_query ? T : 1); ++t) {
      const int32_t id = data[b * ids->stride(0) + (per_query ? t * ids->stride(1) : 0)];
      STD_TORCH_CHECK(id >= -1 && id < A, "adapter_ids[", b, per_query ? ", " + std::to_string(t) : "", "] is ",
                      id, ", expected -1 or 0 to ", A - 1);
    }
  }
}

// ---- tensors to params ----

void fill_shift(ShiftParams& p, const Tensor& like, const Tensor& weight, const std::optional<Tensor>& ids) {
  p.B = like.size(0), p.H = like.size(1), p.T = like.size(2), p.D = like.size(3);
  STD_TORCH_CHECK(weight.dim() == 4, "weight has ", weight.dim(), " dims, expected [A, P, N, D]");
  p.A = weight.size(0), p.P = weight.size(1), p.N = weight.size(2);
  STD_TORCH_CHECK(p.H == 0 || (p.P > 0 && p.H % p.P == 0), "weight has ", p.P, " heads, expected a divisor of ",
                  p.H);
  STD_TORCH_CHECK(p.N >= 1 && p.N <= kMaxKeys, "weight has ", p.N, " keys, expected 1 to ", kMaxKeys);
  check_contiguous(weight, "weight", {p.A, p.P, p.N, p.D}, acc_type(like.scalar_type()));
  check_ids(ids, p.B, p.T, p.A);
  p.weight = weight.const_data_ptr();
  if (ids) {
    p.adapter_ids = static_cast<const int32_t*>(ids->const_data_ptr());
    p.ids_per_query = ids->dim() == 2;
    p.stride_ids = ids->stride(0), p.stride_ids_t = p.ids_per_query ? ids->stride(1) : 0;
  }
}

void fill_gate(GateParams& p, const ConstRows& lse, const Tensor& q, const Tensor& weight, const Tensor& bias,
               const Tensor& shift, const std::optional<Tensor>& ids, const std::optional<Tensor>& prefix) {
  STD_TORCH_CHECK(q.dim() == 4, "q has ", q.dim(), " dims, expected [B, H, T, D]");
  element_type(q, "q");
  fill_shift(p, q, weight, ids);
  const ScalarType acc = acc_type(q.scalar_type());
  check_rows(q, "q", shape_of(q), q.scalar_type());
  check_contiguous(bias, "bias", {p.A, p.P, p.N}, acc);
  check_contiguous(shift, "shift", {p.A, p.P, p.N, p.D}, acc);
  if (prefix) {
    check_tensor(*prefix, "prefix", {p.A}, ScalarType::Bool);
    p.prefix = static_cast<const bool*>(prefix->const_data_ptr()), p.stride_prefix = prefix->stride(0);
  }
  p.q = rows(q), p.lse = lse;
  p.bias = bias.const_data_ptr(), p.shift = shift.const_data_ptr();
}

// Threads get about 32k elements each or stay out of it, as in ATen.
template <class Kernel, class Params>
void parallel_tiles(Kernel kernel, const Params& p) {
  const int64_t elements = std::max<int64_t>(1, std::min(p.T, kTileRows) * p.D);
  torch::stable::parallel_for(0, tiles(p), (32768 + elements - 1) / elements,
                              [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

}  // namespace

namespace mmicl {

void shift_attention(const ConstRows& out, const MutableRows& result, const ConstRows& lse, const Tensor& q,
                     const Tensor& weight, const Tensor& bias, const Tensor& shift,
                     const std::optional<Tensor>& ids, const std::optional<Tensor>& prefix) {
  ForwardParams p;
  fill_gate(p, lse, q, weight, bias, shift, ids, prefix);
  p.out = out, p.result = result;
  parallel_tiles(attention_shift_kernels(element_type(q, "q")).forward, p);
}

}  // namespace mmicl

namespace {

// ---- ops ----

// out, or its gradient, and lse are of the queries.
void check_attention(const Tensor& out, const char* name, const Tensor& lse, const Tensor& q) {
  STD_TORCH_CHECK(out.dim() == 4, name, " has ", out.dim(), " dims, expected [B, H, T, D]");
  STD_TORCH_CHECK(q.dim() == 4, "q has ", q.dim(), " dims, expected [B, H, T, D]");
  element_type(q, "q");
  check_tensor(lse, "lse", {q.size(0), q.size(1), q.size(2)}, acc_type(q.scalar_type()));
  check_rows(out, name, shape_of(q), q.scalar_type());
}

Tensor attention_shift_fwd(const Tensor& out, const Tensor& lse, const Tensor& q, const Tensor& weight,
                           const Tensor& bias, const Tensor& shift, const std::optional<Tensor>& ids,
                           const std::optional<Tensor>& prefix) {
  check_attention(out, "out", lse, q);
  Tensor result = empty_heads_last(out);
  shift_attention(rows(out), writable_rows(result), rows(lse), q, weight, bias, shift, ids, prefix);
  return result;
}

void attention_shift_fwd_(const Tensor& out, const Tensor& lse, const Tensor& q, const Tensor& weight,
                          const Tensor& bias, const Tensor& shift, const std::optional<Tensor>& ids,
                          const std::optional<Tensor>& prefix) {
  check_attention(out, "out", lse, q);
  check_writable(out, "out");
  shift_attention(rows(out), writable_rows(out), rows(lse), q, weight, bias, shift, ids, prefix);
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients attention_shift_bwd(const Tensor& dout, const Tensor& lse, const Tensor& q, const Tensor& weight,
                              const Tensor& bias, const Tensor& shift, const std::optional<Tensor>& ids,
                              const std::optional<Tensor>& prefix, const std::optional<Tensor>& a,
                              bool need_dq) {
  BackwardParams p;
  check_attention(dout, "dout", lse, q);
  fill_gate(p, rows(lse), q, weight, bias, shift, ids, prefix);
  STD_TORCH_CHECK(a || !prefix, "a is None, expected the attention output beside a prefix");
  if (a) check_rows(*a, "a", shape_of(q), q.scalar_type());

  const Tensor dg = torch::stable::new_empty(lse, {p.B, p.H, p.T, p.N});
  const Tensor dq = need_dq ? empty_heads_last(q) : torch::stable::new_empty(q, {0});
  const Tensor base = a ? empty_heads_last(q) : torch::stable::new_empty(q, {0});
  const bool several = !p.is_one_key();
  const Tensor total = torch::stable::new_empty(lse, several ? Shape{p.B, p.H, p.T} : Shape{0});
  const Tensor lift = torch::stable::new_empty(lse, prefix ? Shape{p.B, p.H, p.T} : Shape{0});
  const Tensor dweight = torch::stable::new_zeros(weight, {p.A, p.P, p.N, p.D});
  const Tensor dbias = torch::stable::new_zeros(weight, {p.A, p.P, p.N});
  const Tensor dshift = torch::stable::new_zeros(weight, {p.A, p.P, p.N, p.D});
  const Tensor partial = torch::stable::new_empty(
      weight, several ? Shape{p.B, p.H, p.T, p.N} : Shape{tiles(p), 2 * p.D + 1});

  p.dout = rows(dout), p.dg = writable_rows(dg);
  if (need_dq) p.dq = writable_rows(dq);
  if (a) p.a = rows(*a), p.base = writable_rows(base);
  if (several) p.total = writable_rows(total);
  if (prefix) p.lift = writable_rows(lift);
  p.partial = partial.mutable_data_ptr(), p.dweight = dweight.mutable_data_ptr();
  p.dbias = dbias.mutable_data_ptr(), p.dshift = dshift.mutable_data_ptr();

  const AttentionShiftKernels& kernels = attention_shift_kernels(element_type(q, "q"));
  parallel_tiles(kernels.backward, p);
  const int64_t group = p.H / std::max<int64_t>(1, p.P);
  const int64_t sums = several ? p.B * p.T * p.N * group : p.B * tiles_per_row(p);
  const int64_t per_head = std::max<int64_t>(1, 2 * p.D * sums);
  torch::stable::parallel_for(0, p.P, (32768 + per_head - 1) / per_head,
                              [&](int64_t begin, int64_t end) { kernels.reduce(p, begin, end); });
  return {dg, total, dq, base, lift, dweight, dbias, dshift};
}

void add_gate_grad_(const Tensor& dq, const Tensor& dg, const Tensor& weight,
                    const std::optional<Tensor>& ids) {
  STD_TORCH_CHECK(dq.dim() == 4, "dq has ", dq.dim(), " dims, expected [B, H, T, D]");
  GateGradParams p;
  const ElementType type = element_type(dq, "dq");
  fill_shift(p, dq, weight, ids);
  check_rows(dq, "dq", shape_of(dq), dq.scalar_type());
  check_writable(dq, "dq");
  check_rows(dg, "dg", {p.B, p.H, p.T, p.N}, acc_type(dq.scalar_type()));
  p.dq = writable_rows(dq), p.dg = rows(dg);
  parallel_tiles(attention_shift_kernels(type).add_gate_grad, p);
}

std::string instruction_set() { return isa(); }

}  // namespace

STABLE_TORCH_LIBRARY(mmicl_cpu, m) {
  m.def(
      "attention_shift_fwd(Tensor out, Tensor lse, Tensor q, Tensor weight, Tensor bias, Tensor shift, "
      "Tensor? adapter_ids, Tensor? prefix) -> Tensor");
  m.def(
      "attention_shift_fwd_(Tensor(a!) out, Tensor lse, Tensor q, Tensor weight, Tensor bias, Tensor shift, "
      "Tensor? adapter_ids, Tensor? prefix) -> ()");
  m.def(
      "attention_shift_bwd(Tensor dout, Tensor lse, Tensor q, Tensor weight, Tensor bias, Tensor shift, "
      "Tensor? adapter_ids, Tensor? prefix, Tensor? a, bool need_dq) -> "
      "(Tensor dg, Tensor total, Tensor dq, Tensor base, Tensor lift, Tensor dweight, Tensor dbias, Tensor dshift)");
  m.def("add_gate_grad_(Tensor(a!) dq, Tensor dg, Tensor weight, Tensor? adapter_ids) -> ()");
  m.def("isa() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(mmicl_cpu, CPU, m) {
  m.impl("attention_shift_fwd", TORCH_BOX(&attention_shift_fwd));
  m.impl("attention_shift_fwd_", TORCH_BOX(&attention_shift_fwd_));
  m.impl("attention_shift_bwd", TORCH_BOX(&attention_shift_bwd));
  m.impl("add_gate_grad_", TORCH_BOX(&add_gate_grad_));
}

STABLE_TORCH_LIBRARY_IMPL(mmicl_cpu, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&instruction_set));
}
