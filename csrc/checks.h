// Checks of tensors that both libraries share, that of the C++ kernels and that of the CUDA ones.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <string>
#include <vector>

namespace mmicl {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Shape = std::vector<int64_t>;

// ---- checks: a kernel reads memory only as these allow ----

inline std::string to_string(const Shape& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

inline Shape shape_of(const Tensor& x) {
  const auto sizes = x.sizes();
  return Shape(sizes.begin(), sizes.end());
}

inline void check_device(const Tensor& x, const char* name);  // each library's own

inline void check_tensor(const Tensor& x, const char* name, const Shape& shape, ScalarType type) {
  check_device(x, name);
  STD_TORCH_CHECK(shape_of(x) == shape, name, " has shape ", to_string(shape_of(x)), ", expected ",
                  to_string(shape));
  STD_TORCH_CHECK(x.scalar_type() == type, name, " has dtype ", torch::headeronly::toString(x.scalar_type()),
                  ", expected ", torch::headeronly::toString(type));
}

inline void check_contiguous(const Tensor& x, const char* name, const Shape& shape, ScalarType type) {
  check_tensor(x, name, shape, type);
  STD_TORCH_CHECK(x.is_contiguous(), name, " must be contiguous");
}

inline void check_rows(const Tensor& x, const char* name, const Shape& shape, ScalarType type) {
  check_tensor(x, name, shape, type);
  const int64_t last = x.dim() - 1;
  STD_TORCH_CHECK(x.size(last) <= 1 || x.stride(last) == 1, name, " has last stride ", x.stride(last),
                  ", expected 1");
}

// Threads would race on an expanded tensor.
inline void check_writable(const Tensor& x, const char* name) {
  for (int64_t i = 0; i < x.dim(); ++i) {
    STD_TORCH_CHECK(x.size(i) <= 1 || x.stride(i) != 0, name, " is written to, but its elements along dim ",
                    i, " share memory");
  }
}

}  // namespace mmicl
