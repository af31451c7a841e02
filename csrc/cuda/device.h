// The instructions that kernels use, and nothing else of CUDA: inline PTX under nvcc, and elsewhere what
// tests/cuda/emulated_device.h does for them on a CPU. Shared memory is addressed as in PTX, by 32-bit addresses
// of its own space, so that the emulator sees every access. Beside each stands its section of the PTX ISA 9.0.
#pragma once

#include <cmath>
#include <cstdint>

namespace mmicl::cuda {

// Elements in memory.
struct f16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};
struct alignas(16) Vec4 {
  uint32_t x, y, z, w;
};

}  // namespace mmicl::cuda

#ifdef __CUDACC__

#define DEVICE __device__ __forceinline__
#define KERNEL(threads, blocks_per_sm) __global__ void __launch_bounds__(threads, blocks_per_sm)
#define PARAM(Params) const __grid_constant__ Params
#define UNROLL _Pragma("unroll")

namespace mmicl::cuda {

DEVICE int thread_index() { return threadIdx.x; }
DEVICE int block_x() { return blockIdx.x; }
DEVICE int block_y() { return blockIdx.y; }
DEVICE int block_z() { return blockIdx.z; }

// The block's dynamic shared memory, whose size is the launch's.
DEVICE uint32_t shared_base() {
  extern __shared__ __align__(1024) uint8_t shared[];
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

DEVICE void sync_threads() { __syncthreads(); }
DEVICE void sync_warp() { __syncwarp(); }
DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(~0u, x, mask); }

// "ex2", "lg2": 2 to the x, its logarithm, with an error of some 2^-22; subnormal results are 0.
DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DEVICE float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// "cvt": two numbers rounded to the nearest elements, the first in the lower half.
DEVICE uint32_t pack(float low, float high, f16) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
DEVICE uint32_t pack(float low, float high, bf16) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
DEVICE void unpack(uint32_t pair, float& low, float& high, f16) {
  asm("{.reg .f16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}"
      : "=f"(low), "=f"(high)
      : "r"(pair));
}
DEVICE void unpack(uint32_t pair, float& low, float& high, bf16) {
  low = __uint_as_float(pair << 16);
  high = __uint_as_float(pair & 0xffff0000u);
}

// "ld", "st".
DEVICE Vec4 load_shared(uint32_t address) {
  Vec4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}
DEVICE void store_shared(uint32_t address, uint32_t x) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(x) : "memory");
}

}  // namespace mmicl::cuda

#else
#include "emulated_device.h"
#endif
