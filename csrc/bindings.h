// What the files that know torch (bindings*.cpp) share: dtypes of tensors, rows of new ones.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "checks.h"
#include "cpu/attention_shift.h"
#include "cpu/pages.h"

namespace mmicl {

inline void check_device(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.is_cpu(), name, " must be a CPU tensor");
}

inline ElementType element_type(const Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return ElementType::f32;
    case ScalarType::Double: return ElementType::f64;
    case ScalarType::BFloat16: return ElementType::bf16;
    case ScalarType::Half: return ElementType::f16;
    default:
      STD_TORCH_CHECK(false, name, " has dtype ", torch::headeronly::toString(x.scalar_type()),
                      ", expected float32, float64, bfloat16 or float16");
  }
}

inline void check_floating_rows(const Tensor& x, const char* name, int64_t dims) {
  STD_TORCH_CHECK(x.dim() == dims, name, " has ", x.dim(), " dims, expected ", dims);
  element_type(x, name);
  check_rows(x, name, shape_of(x), x.scalar_type());
}

// ---- dtypes and new tensors ----

inline ScalarType acc_type(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline int64_t itemsize(const Tensor& x) { return static_cast<int64_t>(x.element_size()); }

inline Tensor new_rows(const Tensor& like, const Shape& shape, ScalarType type) {
  const Tensor rows = torch::stable::new_empty(like, shape, type);
  advise_large_pages(rows.mutable_data_ptr(), rows.numel() * itemsize(rows));
  return rows;
}

inline ConstRows rows(const Tensor& x) {
  return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}
inline MutableRows writable_rows(const Tensor& x) {
  return {x.mutable_data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}

// Not by torch::stable::new_empty, which goes through the dispatcher: 4 us, as long as a decoded token's shift.
inline Tensor empty_strided(const Shape& sizes, const Shape& strides, int32_t type) {
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(), type,
                                                         aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

// [B, H, T, D] over memory ordered [B, T, H, D], which is what an output projection reads; or this itself.
inline Tensor empty_heads_last(const Tensor& like, bool tokens_first = false) {
  Shape shape = shape_of(like);
  const auto size = [&](int64_t i) { return std::max<int64_t>(1, shape[i]); };  // as torch's strides
  const int64_t H = size(1), T = size(2), D = size(3);
  Shape strides{T * H * D, D, H * D, 1};
  if (tokens_first) std::swap(shape[1], shape[2]), std::swap(strides[1], strides[2]);
  int32_t type;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &type));
  return empty_strided(shape, strides, type);
}

// ---- what operators share ----

// attention_shift_fwd: out shifted, into result, which may be out; of rows like q's, lse in acc.
void shift_attention(const ConstRows& out, const MutableRows& result, const ConstRows& lse, const Tensor& q,
                     const Tensor& weight, const Tensor& bias, const Tensor& shift,
                     const std::optional<Tensor>& ids, const std::optional<Tensor>& prefix);

// Threads get about 32k elements each or stay out of it, as in ATen.
template <class Body>
void parallel_rows(int64_t rows, int64_t C, Body body) {
  torch::stable::parallel_for(0, rows, 1 + 32768 / std::max<int64_t>(1, C), body);
}

}  // namespace mmicl
