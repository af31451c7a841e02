// Attention, and shifted attention in one call: checks, tensors to params. The arguments are those of
// mmicl_kernels.ops.shifted_attention, with the parameters stacked and in acc.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <initializer_list>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "bindings.h"
#include "cpu/attention_backward.h"
#include "cpu/decode_attention.h"
#include "cpu/tile_attention.h"

namespace {

using namespace mmicl;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kFarthest = int64_t{1} << 29;  // of positions, as in options.py

// ---- what queries see ----

// Of [B] integers the one of row b, between low and high; without any the given one.
int64_t bound(const OptionalTensor& x, const char* name, int64_t b, int64_t B, int64_t absent, int64_t low,
              int64_t high) {
  if (!x) return absent;
  const bool is_long = x->scalar_type() == ScalarType::Long;
  if (b == 0) check_tensor(*x, name, {B}, is_long ? ScalarType::Long : ScalarType::Int);
  const int64_t at = b * x->stride(0);
  const int64_t value = is_long ? static_cast<const int64_t*>(x->const_data_ptr())[at]
                                : static_cast<const int32_t*>(x->const_data_ptr())[at];
  return std::min(std::max(value, low), high);
}

void fill_mask(AttentionParams& p, const Tensor& mask) {
  const Shape whole{p.B, p.H, p.T, p.S};
  STD_TORCH_CHECK(mask.is_cpu() && mask.dim() == 4, "mask must be a 4-D CPU tensor");
  for (int64_t i = 0; i < 4; ++i) {
    STD_TORCH_CHECK(mask.size(i) == 1 || mask.size(i) == whole[i], "mask has shape ",
                    to_string(shape_of(mask)), ", expected one broadcastable to ", to_string(whole));
  }
  const auto stride = [&](int64_t i) { return mask.size(i) == 1 ? 0 : mask.stride(i); };
  p.mask = mask.const_data_ptr();
  p.mask_b = stride(0), p.mask_h = stride(1), p.mask_t = stride(2), p.mask_s = stride(3);
  if (mask.scalar_type() == ScalarType::Bool) {
    p.mask_type = MaskType::boolean;
    return;
  }
  constexpr MaskType kTypes[] = {MaskType::f32, MaskType::f64, MaskType::bf16, MaskType::f16};
  p.mask_type = kTypes[static_cast<int>(element_type(mask, "mask"))];
}

// One past the last key that a bool mask shows to any query: a static cache has empty rows behind.
int64_t seen_keys(const Tensor& mask) {
  STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Bool, "mask ends the keys, expected one of bool");
  const auto sizes = mask.sizes();
  const int64_t S = sizes[3];
  int64_t seen = 0;
  const bool* data = static_cast<const bool*>(mask.const_data_ptr());
  for (int64_t b = 0; b < sizes[0]; ++b) {
    for (int64_t h = 0; h < sizes[1]; ++h) {
      for (int64_t t = 0; t < sizes[2]; ++t) {
        const bool* row = data + b * mask.stride(0) + h * mask.stride(1) + t * mask.stride(2);
        for (int64_t j = S; j > seen; --j) {
          if (row[(j - 1) * mask.stride(3)]) seen = j;
        }
      }
    }
  }
  return seen;
}

// ---- ops ----

// The product of sizes that expanded tensors may have made larger than any memory.
int64_t elements(std::initializer_list<int64_t> sizes) {
  int64_t product = 1;
  for (const int64_t size : sizes) {
    STD_TORCH_CHECK(!__builtin_mul_overflow(product, size, &product) && product < (int64_t{1} << 56),
                    "q and k have too many elements");
  }
  return product;
}

// What queries see.
struct Visibility {
  bool causal = false;
  std::optional<int64_t> window, q_start;
  OptionalTensor q_starts, kv_start, kv_end, mask;
  bool all_keys = false, mask_ends_keys = false;
};

void attend_few(const AttentionParams& given, ElementType type) {
  DecodeParams p{given, nullptr};
  const int64_t sums = elements({p.B, p.G, parts(p), rows(p), p.D + kSums});
  const std::unique_ptr<double[]> memory(new double[sums]);
  p.partial = memory.get();
  const DecodeKernels& kernels = decode_kernels(type);
  const int64_t products = std::max<int64_t>(1, 2 * rows(p) * p.D * std::min(p.S, kPartKeys));
  torch::stable::parallel_for(0, tasks(p), 1 + 131072 / products, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<double[]> scratch(new double[scratch_size(p)]);
    kernels.attend(p, scratch.get(), begin, end);
  });
  const int64_t added = std::max<int64_t>(1, rows(p) * p.D * parts(p));
  torch::stable::parallel_for(0, p.B * p.G, 1 + 32768 / added,
                              [&](int64_t begin, int64_t end) { kernels.combine(p, begin, end); });
}

void attend_many(const AttentionParams& given, ElementType type) {
  const TileParams p{given, tile_queries(given)};
  const TileKernels& kernels = tile_kernels(type);
  const int64_t products = std::max<int64_t>(1, 2 * p.rows() * p.D * std::min(p.S, kPartKeys));
  torch::stable::parallel_for(0, p.tasks(), 1 + 131072 / products, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<double[]> scratch(new double[tile_scratch_size(p)]);
    kernels.attend(p, scratch.get(), begin, end);
  });
}

// Contiguous, in acc.
Tensor new_scalars(const Tensor& q, const Shape& shape) {
  Shape strides(shape.size(), 1);
  for (int64_t i = shape.size() - 2; i >= 0; --i) strides[i] = strides[i + 1] * std::max<int64_t>(1, shape[i + 1]);
  const bool is_double = acc_type(q.scalar_type()) == ScalarType::Double;
  return empty_strided(shape, strides, is_double ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32());
}

Tensor new_lse(const Tensor& q) { return new_scalars(q, {q.size(0), q.size(1), q.size(2)}); }

MutableRows scalars(const Tensor& lse) {
  return {lse.mutable_data_ptr(), lse.stride(0), lse.stride(1), lse.stride(2)};
}

// Shapes, rows, mask and scale; of double or float elements.
AttentionParams checked(const Tensor& q, const Tensor& k, const Tensor& v, double scale,
                        std::optional<double> softcap, const OptionalTensor& mask) {
  AttentionParams p;
  check_floating_rows(q, "q", 4);
  STD_TORCH_CHECK(k.dim() == 4, "k has ", k.dim(), " dims, expected [B, G, S, D]");
  p.B = q.size(0), p.H = q.size(1), p.T = q.size(2), p.D = q.size(3), p.G = k.size(1), p.S = k.size(2);
  STD_TORCH_CHECK(p.G > 0 && p.H % p.G == 0, "k has ", p.G, " heads, expected a divisor of ", p.H);
  check_rows(k, "k", {p.B, p.G, p.S, p.D}, q.scalar_type());
  check_rows(v, "v", {p.B, p.G, p.S, p.D}, q.scalar_type());
  p.q = rows(q), p.k = rows(k), p.v = rows(v);
  p.scale = scale, p.softcap = softcap.value_or(0);
  if (mask) fill_mask(p, *mask);
  elements({p.B, p.H, p.T});
  return p;
}

// Which keys queries may see, in memory that is returned.
std::vector<int64_t> fill_bounds(AttentionParams& p, const Visibility& visible) {
  // Where the mask ends them, a row's own keys are in use even if they are hidden.
  const bool ends = visible.mask && visible.mask_ends_keys;
  const int64_t in_use = ends ? std::max(seen_keys(*visible.mask), p.T) : p.S;
  const int64_t window = std::clamp<int64_t>(visible.window.value_or(1), 1, kFarthest * 4);
  std::vector<int64_t> bounds(p.B * (2 * p.T + 1));
  int64_t *first = bounds.data(), *last = first + p.B * p.T, *gate_end = last + p.B * p.T;
  for (int64_t b = 0; b < p.B; ++b) {
    const int64_t begin = bound(visible.kv_start, "kv_start", b, p.B, 0, 0, p.S);
    const int64_t end = bound(visible.kv_end, "kv_end", b, p.B, p.S, 0, p.S);
    const int64_t absent = std::clamp(visible.q_start.value_or(end - p.T), -kFarthest, std::max(kFarthest, p.S));
    const int64_t position = bound(visible.q_starts, "q_start", b, p.B, absent, -kFarthest, kFarthest);
    for (int64_t t = b * p.T; t < (b + 1) * p.T; ++t) {
      const int64_t own = position + t - b * p.T;
      first[t] = visible.window ? std::max(begin, own - window + 1) : begin;
      last[t] = visible.causal ? std::min(end, own + 1) : end;
    }
    gate_end[b] = std::min(end, in_use);
  }
  p.first = first, p.last = last, p.gate_end = gate_end;
  return bounds;
}

// lse and the gate's: lse itself, but over all keys.
using Logarithms = std::tuple<Tensor, Tensor>;

Logarithms attend(const MutableRows& out, const Tensor& q, const Tensor& k, const Tensor& v, double scale,
                  std::optional<double> softcap, const Visibility& visible, bool few) {
  AttentionParams p = checked(q, k, v, scale, softcap, visible.mask);
  const Tensor lse = new_lse(q), gate_lse = visible.all_keys ? new_lse(q) : lse;
  if (p.B * p.H * p.T == 0) return {lse, gate_lse};
  const std::vector<int64_t> bounds = fill_bounds(p, visible);
  p.out = out, p.lse = scalars(lse);
  if (visible.all_keys) p.gate_lse = scalars(gate_lse);
  if (few) {
    attend_few(p, element_type(q, "q"));
  } else {
    attend_many(p, element_type(q, "q"));
  }
  return {lse, gate_lse};
}

void shift_in_place(const MutableRows& out, const Tensor& lse, const Tensor& q, const Tensor& weight,
                    const Tensor& bias, const Tensor& shift, const OptionalTensor& adapter_ids,
                    const OptionalTensor& prefix) {
  const MutableRows gate = scalars(lse);
  shift_attention({out.data, out.stride_b, out.stride_h, out.stride_t}, out,
                  {gate.data, gate.stride_b, gate.stride_h, gate.stride_t}, q, weight, bias, shift, adapter_ids,
                  prefix);
}

std::tuple<Tensor, Tensor, Tensor> attention_fwd(
    const Tensor& q, const Tensor& k, const Tensor& v, double scale, std::optional<double> softcap, bool causal,
    std::optional<int64_t> window, std::optional<int64_t> q_start, const OptionalTensor& q_starts,
    const OptionalTensor& kv_start, const OptionalTensor& kv_end, const OptionalTensor& mask, bool all_keys,
    int64_t few_queries) {
  const Visibility visible{causal, window, q_start, q_starts, kv_start, kv_end, mask, all_keys, false};
  check_floating_rows(q, "q", 4);
  const Tensor out = empty_heads_last(q);
  auto [lse, gate_lse] = attend(writable_rows(out), q, k, v, scale, softcap, visible, q.size(2) <= few_queries);
  return {out, lse, gate_lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_bwd(
    const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& base, const Tensor& lse,
    double scale, std::optional<double> softcap, bool causal, std::optional<int64_t> window,
    std::optional<int64_t> q_start, const OptionalTensor& q_starts, const OptionalTensor& kv_start,
    const OptionalTensor& kv_end, const OptionalTensor& mask) {
  STD_TORCH_CHECK(!mask || mask->scalar_type() == ScalarType::Bool, "mask is added to the scores, expected bool");
  const Visibility visible{causal, window, q_start, q_starts, kv_start, kv_end, mask, false, false};
  AttentionBackwardParams p{checked(q, k, v, scale, softcap, mask)};
  const std::vector<int64_t> bounds = fill_bounds(p, visible);
  check_rows(dout, "dout", shape_of(q), q.scalar_type());
  check_rows(base, "base", shape_of(q), q.scalar_type());
  check_tensor(lse, "lse", {p.B, p.H, p.T}, acc_type(q.scalar_type()));
  const Tensor delta = new_lse(q), dq = empty_heads_last(q), dk = empty_heads_last(k), dv = empty_heads_last(v);
  p.dout = rows(dout), p.base = rows(base), p.given_lse = rows(lse), p.delta = scalars(delta);
  p.dq = writable_rows(dq), p.dk = writable_rows(dk), p.dv = writable_rows(dv);
  p.parts = backward_parts(p);

  // By torch, whose profiler and hooks of memory see it.
  const Tensor partial = new_scalars(q, {elements({p.parts, p.B, p.H, p.T, in_panels(p.D)})});
  p.partial = partial.mutable_data_ptr();
  const AttentionBackwardKernels& kernels = attention_backward_kernels(element_type(q, "q"));
  const int64_t rows = p.B * p.H * p.T;
  parallel_rows(rows, p.D, [&](int64_t begin, int64_t end) { kernels.find_delta(p, begin, end); });
  torch::stable::parallel_for(0, p.tasks(), 1, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<double[]> scratch(new double[backward_scratch_size(p)]);
    kernels.attend(p, scratch.get(), begin, end);
  });
  parallel_rows(rows, p.D, [&](int64_t begin, int64_t end) { kernels.add_parts(p, begin, end); });
  return {dq, dk, dv};
}

std::tuple<Tensor, Tensor> shifted_attention_inference(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& weight, const Tensor& bias,
    const Tensor& shift, const OptionalTensor& adapter_ids, const OptionalTensor& prefix, double scale,
    std::optional<double> softcap, bool causal, std::optional<int64_t> window, std::optional<int64_t> q_start,
    const OptionalTensor& q_starts, const OptionalTensor& kv_start, const OptionalTensor& kv_end,
    const OptionalTensor& mask, bool all_keys, int64_t few_queries) {
  auto [out, lse, gate_lse] = attention_fwd(q, k, v, scale, softcap, causal, window, q_start, q_starts, kv_start,
                                            kv_end, mask, all_keys, few_queries);
  shift_in_place(writable_rows(out), gate_lse, q, weight, bias, shift, adapter_ids, prefix);
  return {out, lse};
}

// [B, T, H, D], as a projection reads it.
Tensor shifted_attention_step(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& weight,
                              const Tensor& bias, const Tensor& shift, const OptionalTensor& adapter_ids,
                              const OptionalTensor& prefix, double scale, std::optional<double> softcap,
                              std::optional<int64_t> window, const OptionalTensor& mask, bool all_keys) {
  Visibility visible;
  visible.window = window, visible.mask = mask, visible.all_keys = all_keys;
  check_floating_rows(q, "q", 4);
  visible.mask_ends_keys = all_keys && k.dim() == 4 && k.size(2) > q.size(2);
  const Tensor tokens = empty_heads_last(q, true);
  const MutableRows out{tokens.mutable_data_ptr(), tokens.stride(0), tokens.stride(2), tokens.stride(1)};
  auto [lse, gate_lse] = attend(out, q, k, v, scale, softcap, visible, true);
  shift_in_place(out, gate_lse, q, weight, bias, shift, adapter_ids, prefix);
  return tokens;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mmicl_cpu, m) {
  m.def(
      "attention_fwd(Tensor q, Tensor k, Tensor v, float scale, float? softcap, bool causal, int? window, "
      "int? q_start, Tensor? q_starts, Tensor? kv_start, Tensor? kv_end, Tensor? mask, bool all_keys, "
      "int few_queries) -> (Tensor out, Tensor lse, Tensor gate_lse)");
  m.def(
      "attention_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor base, Tensor lse, float scale, "
      "float? softcap, bool causal, int? window, int? q_start, Tensor? q_starts, Tensor? kv_start, "
      "Tensor? kv_end, Tensor? mask) -> (Tensor dq, Tensor dk, Tensor dv)");
}

STABLE_TORCH_LIBRARY_IMPL(mmicl_cpu, CPU, m) {
  m.impl("attention_fwd", TORCH_BOX(&attention_fwd));
  m.impl("attention_bwd", TORCH_BOX(&attention_bwd));
}

// Their schemas are in mmicl_kernels/ops/shifted_attention/_cpp.py, with what compiled graphs need to know.
STABLE_TORCH_LIBRARY_IMPL(mmicl, CPU, m) {
  m.impl("shifted_attention_inference", TORCH_BOX(&shifted_attention_inference));
  m.impl("shifted_attention_step", TORCH_BOX(&shifted_attention_step));
}
