// Every instruction of csrc/cuda twice: by our wrapper (ours_*), and by CuTe's or the CUDA toolkit's (theirs_*).
// Their machine code must be the same.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cuda/ptx>
#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/mma_sm90_gmma.hpp>
#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>

#include "hopper.h"

using namespace mmicl::cuda;
using cute::SM90::GMMA::Major;
using cute::SM90::GMMA::ScaleOut;
using cutlass::arch::NamedBarrier;
using cutlass::arch::ReservedNamedBarriers;

// Generic pointers to shared memory, of which the wrappers of others make addresses again.
__device__ uint64_t& barrier_in(uint32_t address) {
  return *static_cast<uint64_t*>(__cvta_shared_to_generic(address));
}

#define OURS(name, ...) extern "C" __global__ void ours_##name(__VA_ARGS__)
#define THEIRS(name, ...) extern "C" __global__ void theirs_##name(__VA_ARGS__)

// ---- barriers ----

OURS(barrier_init, uint32_t b, int n) { barrier_init(b, n); }
THEIRS(barrier_init, uint32_t b, int n) { cute::initialize_barrier(barrier_in(b), n); }
OURS(fence_barrier_init) { fence_barrier_init(); }
THEIRS(fence_barrier_init) { cutlass::arch::fence_barrier_init(); }
OURS(barrier_arrive, uint32_t b) { barrier_arrive(b); }
THEIRS(barrier_arrive, uint32_t b) { cute::arrive_barrier(barrier_in(b)); }
OURS(barrier_arrive_expect, uint32_t b, int n) { barrier_arrive_expect(b, n); }
THEIRS(barrier_arrive_expect, uint32_t b, int n) { cute::set_barrier_transaction_bytes(barrier_in(b), n); }
OURS(barrier_wait, uint32_t b, int parity) { barrier_wait(b, parity); }
THEIRS(barrier_wait, uint32_t b, int parity) { cute::wait_barrier(barrier_in(b), parity); }
OURS(named_sync, int name, int n) { named_sync(name, n); }
THEIRS(named_sync, int name, int n) { NamedBarrier::sync(n, static_cast<ReservedNamedBarriers>(name)); }
OURS(named_arrive, int name, int n) { named_arrive(name, n); }
THEIRS(named_arrive, int name, int n) { NamedBarrier::arrive(n, static_cast<ReservedNamedBarriers>(name)); }
OURS(sync_threads) { sync_threads(); }
THEIRS(sync_threads) { __syncthreads(); }
OURS(sync_warp, int* x) { x[0] = 1, sync_warp(), x[1] = x[0]; }
THEIRS(sync_warp, int* x) { x[0] = 1, __syncwarp(), x[1] = x[0]; }

// ---- copies, registers ----

OURS(tma_load, const __grid_constant__ TensorMap map, uint32_t to, uint32_t b, int c0, int c1, int c2, int c3) {
  tma_load(to, map, b, c0, c1, c2, c3);
}
THEIRS(tma_load, const __grid_constant__ TensorMap map, uint32_t to, uint32_t b, int c0, int c1, int c2, int c3) {
  const int32_t corner[4] = {c0, c1, c2, c3};
  cuda::ptx::cp_async_bulk_tensor(cuda::ptx::space_cluster, cuda::ptx::space_global, __cvta_shared_to_generic(to), &map,
                                  corner, &barrier_in(b));
}
OURS(more_registers) { more_registers<240>(); }
THEIRS(more_registers) { cutlass::arch::warpgroup_reg_alloc<240>(); }
OURS(fewer_registers) { fewer_registers<24>(); }
THEIRS(fewer_registers) { cutlass::arch::warpgroup_reg_dealloc<24>(); }

// ---- products. Accumulators come from memory and go there, so that each kernel has one ----

#define TIMES4(f, i) f(i) f(i + 1) f(i + 2) f(i + 3)
#define TIMES16(f, i) TIMES4(f, i) TIMES4(f, i + 4) TIMES4(f, i + 8) TIMES4(f, i + 12)
#define TIMES32(f) TIMES16(f, 0) TIMES16(f, 16)
#define TIMES64(f) TIMES32(f) TIMES16(f, 32) TIMES16(f, 48)
#define ACCUMULATOR(i) , d[i]

#define AROUND(N, product)                           \
  float d[N];                                        \
  UNROLL for (int i = 0; i < N; ++i) d[i] = x[i];    \
  product;                                           \
  UNROLL for (int i = 0; i < N; ++i) x[i] = d[i]
#define LEFT const uint32_t a[4] = {p[0], p[1], p[2], p[3]}

#define PRODUCTS(T, NAME)                                                                                            \
  OURS(product_shared_##T, float* x, uint64_t a, uint64_t b, int add) { AROUND(64, product_shared(d, a, b, add, T{})); } \
  THEIRS(product_shared_##T, float* x, uint64_t a, uint64_t b, int add) {                                            \
    using Product = cute::SM90::GMMA::MMA_64x128x16_F32##NAME##NAME##_SS<Major::K, Major::K>;                        \
    AROUND(64, Product::fma(a, b TIMES64(ACCUMULATOR), add ? ScaleOut::One : ScaleOut::Zero));                        \
  }                                                                                                                  \
  OURS(product_registers_128_##T, float* x, const uint32_t* p, uint64_t b) {                                         \
    LEFT;                                                                                                            \
    AROUND(64, product_registers(d, a, b, T{}));                                                                     \
  }                                                                                                                  \
  THEIRS(product_registers_128_##T, float* x, const uint32_t* p, uint64_t b) {                                       \
    using Product = cute::SM90::GMMA::MMA_64x128x16_F32##NAME##NAME##_RS<Major::K, Major::MN>;                       \
    LEFT;                                                                                                            \
    AROUND(64, Product::fma(a[0], a[1], a[2], a[3], b TIMES64(ACCUMULATOR), ScaleOut::One));                         \
  }                                                                                                                  \
  OURS(product_registers_64_##T, float* x, const uint32_t* p, uint64_t b) {                                          \
    LEFT;                                                                                                            \
    AROUND(32, product_registers(d, a, b, T{}));                                                                     \
  }                                                                                                                  \
  THEIRS(product_registers_64_##T, float* x, const uint32_t* p, uint64_t b) {                                        \
    using Product = cute::SM90::GMMA::MMA_64x64x16_F32##NAME##NAME##_RS<Major::K, Major::MN>;                        \
    LEFT;                                                                                                            \
    AROUND(32, Product::fma(a[0], a[1], a[2], a[3], b TIMES32(ACCUMULATOR), ScaleOut::One));                         \
  }
PRODUCTS(f16, F16)
PRODUCTS(bf16, BF16)

// A fence, a product, its commit and its wait.
#define GUARDED(fence, commit, wait) \
  LEFT;                              \
  AROUND(32, fence; product_registers(d, a, b, f16{}); commit; wait; pin(d))
OURS(product_fences, float* x, const uint32_t* p, uint64_t b) {
  GUARDED(product_fence(), product_commit(), product_wait<0>());
}
THEIRS(product_fences, float* x, const uint32_t* p, uint64_t b) {
  GUARDED(cute::warpgroup_arrive(), cute::warpgroup_commit_batch(), cute::warpgroup_wait<0>());
}

// ---- numbers and memory ----

OURS(exp2, float* x) { *x = exp2_approx(*x); }
THEIRS(exp2, float* x) { *x = exp2f(*x); }  // by -use_fast_math
OURS(log2, float* x) { *x = log2_approx(*x); }
THEIRS(log2, float* x) { *x = log2f(*x); }
OURS(pack_f16, uint32_t* y, float low, float high) { *y = pack(low, high, f16{}); }
THEIRS(pack_f16, __half2* y, float low, float high) { *y = __floats2half2_rn(low, high); }
OURS(pack_bf16, uint32_t* y, float low, float high) { *y = pack(low, high, bf16{}); }
THEIRS(pack_bf16, __nv_bfloat162* y, float low, float high) { *y = __floats2bfloat162_rn(low, high); }
OURS(unpack_f16, float* y, uint32_t* x) { unpack(*x, y[0], y[1], f16{}); }
THEIRS(unpack_f16, float* y, uint32_t* x) {
  const uint32_t bits = *x;
  __half2 pair;
  memcpy(&pair, &bits, sizeof(pair));
  y[0] = __low2float(pair), y[1] = __high2float(pair);
}
OURS(load_shared, Vec4* y, uint32_t address) { *y = load_shared(address); }
THEIRS(load_shared, uint4* y, uint32_t address) { *y = *static_cast<uint4*>(__cvta_shared_to_generic(address)); }
OURS(store_shared, uint32_t address, uint32_t x) { store_shared(address, x); }
THEIRS(store_shared, uint32_t address, uint32_t x) {
  *static_cast<uint32_t*>(__cvta_shared_to_generic(address)) = x;
}
OURS(shuffle_xor, float* x) { *x = shuffle_xor(*x, 2); }
THEIRS(shuffle_xor, float* x) { *x = __shfl_xor_sync(0xffffffff, *x, 2); }
