// What the files that know torch (*.cu) share. They are the library _C_cuda, through libtorch's stable ABI; compiled
// by a C++ compiler, with tests/cuda beside it, they register the same operators for CPU tensors, emulated.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "../checks.h"
#include "launch.h"
#include "virtual_keys.h"

// Another name for a library with a fault planted in it, beside the right one.
#ifndef MMICL_LIBRARY
#define MMICL_LIBRARY mmicl_cuda
#endif
#define REGISTER_SCHEMAS(library, m) STABLE_TORCH_LIBRARY_FRAGMENT(library, m)
#define REGISTER_KERNELS(library, key, m) STABLE_TORCH_LIBRARY_IMPL(library, key, m)
#ifdef __CUDACC__
#define MMICL_KEY CUDA
#else
#define MMICL_KEY CPU
#endif

namespace mmicl {

inline void check_device(const Tensor& x, const char* name) {
#ifdef __CUDACC__
  STD_TORCH_CHECK(x.is_cuda(), name, " must be a CUDA tensor");
#else
  STD_TORCH_CHECK(x.is_cpu(), name, " must be a CPU tensor: this is the emulator");
#endif
}

namespace cuda {

using OptionalTensor = std::optional<Tensor>;

// The stream that kernels over these tensors run on; their device is the current one meanwhile.
class Stream {
 public:
#ifdef __CUDACC__
  explicit Stream(const Tensor& x) : guard_(x.get_device_index()) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream_));
  }
  operator void*() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_;
#else
  explicit Stream(const Tensor&) {}
  operator void*() const { return nullptr; }
#endif
};

// [B, H, T, D] over memory ordered [B, T, H, D], which is what an output projection reads.
inline Tensor empty_heads_last(const Tensor& like) {
  const Shape shape = shape_of(like);
  return torch::stable::transpose(torch::stable::new_empty(like, {shape[0], shape[2], shape[1], shape[3]}), 1, 2);
}

template <class T>
const T* data_or_null(const OptionalTensor& x) {
  return x ? static_cast<const T*>(x->const_data_ptr()) : nullptr;
}

// Of H heads and queries [B, T].
inline VirtualKeys virtual_keys(const Tensor& weight, const Tensor& bias, const Tensor& shift, const OptionalTensor& ids,
                                const OptionalTensor& prefix, int64_t B, int64_t H, int64_t T, int64_t D) {
  STD_TORCH_CHECK(weight.dim() == 4, "weight has ", weight.dim(), " dims, expected [A, P, N, D]");
  const int64_t A = weight.size(0), P = weight.size(1), N = weight.size(2);
  STD_TORCH_CHECK(P > 0 && H % P == 0, "weight has ", P, " heads, expected a divisor of ", H);
  STD_TORCH_CHECK(N >= 1, "weight has no keys");
  STD_TORCH_CHECK(A >= 1, "weight has no adapters");
  check_contiguous(weight, "weight", {A, P, N, D}, ScalarType::Float);
  check_contiguous(bias, "bias", {A, P, N}, ScalarType::Float);
  check_contiguous(shift, "shift", {A, P, N, D}, ScalarType::Float);
  VirtualKeys keys{};
  keys.weight = static_cast<const float*>(weight.const_data_ptr());
  keys.bias = static_cast<const float*>(bias.const_data_ptr());
  keys.shift = static_cast<const float*>(shift.const_data_ptr());
  if (ids) {
    const bool per_query = ids->dim() == 2;
    check_tensor(*ids, "adapter_ids", per_query ? Shape{B, T} : Shape{B}, ScalarType::Int);
    keys.adapter_ids = data_or_null<int32_t>(ids);
    keys.stride_ids_b = ids->stride(0), keys.stride_ids_t = per_query ? ids->stride(1) : 0;
  }
  if (prefix) {
    check_tensor(*prefix, "prefix", {A}, ScalarType::Bool);
    keys.prefix = data_or_null<bool>(prefix), keys.stride_prefix = prefix->stride(0);
  }
  keys.P = P, keys.N = N, keys.D = D, keys.heads_per_key = H / P;
  return keys;
}

}  // namespace cuda
}  // namespace mmicl
