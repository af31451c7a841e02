// Kernels are launched and tensors mapped here, on a device or, compiled by a C++ compiler, on the emulated one.
#pragma once

#include <stdexcept>
#include <string>

#include "hopper.h"

#ifdef __CUDACC__
#include <cuda_runtime.h>
#endif

namespace mmicl::cuda {

struct Grid {
  int x = 1, y = 1, z = 1;
};

// A 4-D tensor of 2-byte elements as the TMA reads it: boxes of `rows` rows and 64 columns.
struct MappedTensor {
  const void* data;
  int64_t sizes[4], strides[4];  // as of torch: outermost first, in elements
};

#ifdef __CUDACC__

inline void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

template <class Params>
void launch(void (*kernel)(const Params), Grid grid, int threads, int shared_bytes, const Params& p, void* stream) {
  const auto* address = reinterpret_cast<const void*>(kernel);
  if (shared_bytes > 48 * 1024) {
    check(cudaFuncSetAttribute(address, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  }
  kernel<<<dim3(grid.x, grid.y, grid.z), threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(p);
  check(cudaGetLastError());
}

// The driver's own function: there is no link to libcuda, so that the library loads without a driver.
inline decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
  static void* const found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result));
    if (result != cudaDriverEntryPointSuccess) throw std::runtime_error("CUDA: the driver has no tensor maps");
    return function;
  }();
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
}

inline TensorMap tensor_map(const MappedTensor& x, int rows, bool is_half) {
  TensorMap map;
  const cuuint64_t sizes[4] = {static_cast<cuuint64_t>(x.sizes[3]), static_cast<cuuint64_t>(x.sizes[2]),
                               static_cast<cuuint64_t>(x.sizes[1]), static_cast<cuuint64_t>(x.sizes[0])};
  const cuuint64_t strides[3] = {2 * static_cast<cuuint64_t>(x.strides[2]), 2 * static_cast<cuuint64_t>(x.strides[1]),
                                 2 * static_cast<cuuint64_t>(x.strides[0])};
  const cuuint32_t box[4] = {64, static_cast<cuuint32_t>(rows), 1, 1}, steps[4] = {1, 1, 1, 1};
  const CUresult result = tensor_map_encoder()(
      &map, is_half ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4,
      const_cast<void*>(x.data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) throw std::runtime_error("CUDA: a tensor map was refused: " + std::to_string(result));
  return map;
}

#else

template <class Params>
void launch(void (*kernel)(const Params&), Grid grid, int threads, int shared_bytes, const Params& p, void*) {
  emulator::launch({grid.x, grid.y, grid.z}, threads, shared_bytes, kernel, p);
}

// Refuses what the driver does.
inline TensorMap tensor_map(const MappedTensor& x, int rows, bool) {
  const auto expect = [](bool holds, const char* what) {
    if (!holds) throw std::runtime_error(std::string("a tensor map was refused: ") + what);
  };
  expect(reinterpret_cast<uintptr_t>(x.data) % 16 == 0, "its address is no multiple of 16");
  expect(rows >= 1 && rows <= 256, "a box has at most 256 rows");
  TensorMap map{static_cast<const char*>(x.data), {}, {}, {64, rows, 1, 1}};
  for (int d = 0; d < 4; ++d) {
    map.sizes[d] = x.sizes[3 - d], map.strides[d] = 2 * x.strides[3 - d];
    expect(map.sizes[d] >= 1 && map.sizes[d] <= int64_t{1} << 32, "a size is not in 1 to 2^32");
    expect(d == 0 || (map.strides[d] >= 0 && map.strides[d] % 16 == 0 && map.strides[d] < int64_t{1} << 40),
           "a stride in bytes is no multiple of 16 below 2^40");
  }
  return map;
}

#endif

}  // namespace mmicl::cuda
