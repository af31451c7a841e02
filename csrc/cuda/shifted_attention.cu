// shifted_attention_fwd: checks, tensors to params, the kernel for a dtype and a head dim.

#include "shifted_attention.h"

#include <algorithm>
#include <tuple>

#include "bindings.h"

namespace {

using namespace mmicl;
using namespace mmicl::cuda;

HeadStrides head_strides(const Tensor& x) { return {x.stride(0), x.stride(1), x.stride(2)}; }

// A dim of size 1 may have any stride in torch, and none that the driver refuses here.
MappedTensor mapped(const Tensor& x) {
  MappedTensor map{x.const_data_ptr(), {}, {}};
  for (int d = 0; d < 4; ++d) {
    map.sizes[d] = x.size(d);
    map.strides[d] = x.size(d) > 1 ? x.stride(d) : 8;
  }
  return map;
}

const int32_t* bounds(const OptionalTensor& x, const char* name, int64_t B) {
  if (x) check_contiguous(*x, name, {B}, ScalarType::Int);
  return data_or_null<int32_t>(x);
}

template <class T, int D>
void run(ShiftedAttentionParams& p, const Tensor& q, const Tensor& k, const Tensor& v) {
  const bool is_half = q.scalar_type() == ScalarType::Half;
  const Stream stream(q);
  p.q = tensor_map(mapped(q), kTileRows<D>, is_half);
  p.k = tensor_map(mapped(k), kTileKeys, is_half);
  p.v = tensor_map(mapped(v), kTileKeys, is_half);
  const Grid grid{p.H, (p.T + kTileRows<D> - 1) / kTileRows<D>, static_cast<int>(q.size(0))};
  launch(shifted_attention_kernel<T, D>, grid, kThreads<D>, Shared<D>::kBytes, p, stream);
}

using Results = std::tuple<Tensor, Tensor, Tensor>;

Results shifted_attention_fwd(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& weight,
                              const Tensor& bias, const Tensor& shift, const OptionalTensor& ids,
                              const OptionalTensor& prefix, double scale, bool causal, std::optional<int64_t> q_start,
                              const OptionalTensor& q_starts, const OptionalTensor& kv_start,
                              const OptionalTensor& kv_end, bool attended) {
  STD_TORCH_CHECK(q.dim() == 4, "q has ", q.dim(), " dims, expected [B, H, T, D]");
  STD_TORCH_CHECK(k.dim() == 4, "k has ", k.dim(), " dims, expected [B, G, S, D]");
  const int64_t B = q.size(0), H = q.size(1), T = q.size(2), D = q.size(3), G = k.size(1), S = k.size(2);
  const ScalarType type = q.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Half || type == ScalarType::BFloat16, "q has dtype ",
                  torch::headeronly::toString(type), ", expected float16 or bfloat16");
  STD_TORCH_CHECK(D == 64 || D == 128, "q has head dim ", D, ", expected 64 or 128");
  STD_TORCH_CHECK(B > 0 && H > 0 && T > 0 && S > 0, "q has shape ", to_string(shape_of(q)), " and k ",
                  to_string(shape_of(k)), ", expected none that is empty");
  STD_TORCH_CHECK(G > 0 && H % G == 0, "q has ", H, " heads, expected a multiple of the ", G, " of k");
  STD_TORCH_CHECK(std::max(T, S) < (int64_t{1} << 30) && B <= 65535, "T, S or B is too large");
  STD_TORCH_CHECK(scale > 0, "scale is ", scale, ", expected one above 0");
  check_rows(q, "q", {B, H, T, D}, type);
  check_rows(k, "k", {B, G, S, D}, type);
  check_rows(v, "v", {B, G, S, D}, type);

  const Tensor out = empty_heads_last(q), lse = torch::stable::new_empty(q, {B, H, T}, ScalarType::Float);
  const Tensor before = attended ? empty_heads_last(q) : torch::stable::new_empty(q, {0});
  ShiftedAttentionParams p{};
  p.out = out.mutable_data_ptr(), p.stride_out = head_strides(out);
  if (attended) p.attended = before.mutable_data_ptr(), p.stride_attended = head_strides(before);
  p.lse = static_cast<float*>(lse.mutable_data_ptr());
  p.keys = virtual_keys(weight, bias, shift, ids, prefix, B, H, T, D);
  p.H = H, p.G = G, p.T = T, p.S = S;
  p.causal = causal, p.has_q_start = q_start.has_value(), p.q_start = q_start.value_or(0);
  p.q_starts = bounds(q_starts, "q_starts", B);
  p.kv_start = bounds(kv_start, "kv_start", B), p.kv_end = bounds(kv_end, "kv_end", B);
  p.scale = scale;
  const bool is_half = type == ScalarType::Half;
  if (D == 64) {
    is_half ? run<f16, 64>(p, q, k, v) : run<bf16, 64>(p, q, k, v);
  } else {
    is_half ? run<f16, 128>(p, q, k, v) : run<bf16, 128>(p, q, k, v);
  }
  return {out, lse, before};
}

}  // namespace

REGISTER_SCHEMAS(MMICL_LIBRARY, m) {
  m.def(
      "shifted_attention_fwd(Tensor q, Tensor k, Tensor v, Tensor weight, Tensor bias, Tensor shift, "
      "Tensor? adapter_ids, Tensor? prefix, float scale, bool causal, int? q_start, Tensor? q_starts, "
      "Tensor? kv_start, Tensor? kv_end, bool attended) -> (Tensor out, Tensor lse, Tensor attended)");
}

REGISTER_KERNELS(MMICL_LIBRARY, MMICL_KEY, m) {
  m.impl("shifted_attention_fwd", TORCH_BOX(&shifted_attention_fwd));
}
