// Hopper's asynchronous instructions: copies of the tensor memory accelerator (TMA), the barriers in shared memory
// that they arrive at, and products of whole warpgroups (wgmma). Beside device.h, and as there in two forms.
#pragma once

#include "device.h"

namespace mmicl::cuda {

// Rows of 128 bytes in shared memory, from a multiple of 1024 on: the 16-byte chunk c of row r lies at chunk
// c ^ (r % 8). "Swizzling Modes": 128 bytes.
DEVICE uint32_t swizzled(int row, int chunk) {
  return static_cast<uint32_t>(row * 128 + ((chunk ^ (row & 7)) << 4));
}

// "Matrix Descriptor Format": a matrix in shared memory with that swizzle, 8 rows 1024 bytes after the last 8. `leading` is the
// distance in bytes of panels of 64 elements where rows are what is summed over; else it does not matter.
DEVICE uint64_t matrix_descriptor(uint32_t address, uint32_t leading) {
  return static_cast<uint64_t>((address & 0x3ffff) >> 4) | static_cast<uint64_t>(leading >> 4) << 16 |
         static_cast<uint64_t>(1024 >> 4) << 32 | static_cast<uint64_t>(1) << 62;
}
// As far on as that many bytes.
DEVICE uint64_t advanced(uint64_t descriptor, uint32_t bytes) { return descriptor + (bytes >> 4); }

}  // namespace mmicl::cuda

#ifdef __CUDACC__

#include <cuda.h>

namespace mmicl::cuda {

using TensorMap = CUtensorMap;

// ---- "mbarrier": barriers in shared memory. A phase ends when all have arrived and all expected bytes are there ----

DEVICE void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
DEVICE void fence_barrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEVICE void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
DEVICE void barrier_arrive_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Until the phase of that parity has ended; of a new barrier phase 0 is on.
DEVICE void barrier_wait(uint32_t barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "AGAIN:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra DONE;\n"
      "bra AGAIN;\n"
      "DONE:\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// "cp.async.bulk.tensor": one box of a 4-D tensor into shared memory; what lies outside of the tensor is 0.
DEVICE void tma_load(uint32_t to, const TensorMap& map, uint32_t barrier, int c0, int c1, int c2, int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, "
      "%6}], [%2];" ::"r"(to),
      "l"(&map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}

// ---- "barrier": of warps, named 0 to 15. 0 is sync_threads' ----

DEVICE void named_sync(int name, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(name), "r"(threads) : "memory");
}
DEVICE void named_arrive(int name, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(name), "r"(threads) : "memory");
}

// "setmaxnreg": of a warpgroup, whose registers others may have.
template <int Count>
DEVICE void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Count));
}
template <int Count>
DEVICE void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Count));
}

// ---- "wgmma": products of a warpgroup, d = a b or d += a b in fp32. Asynchronous: fence, products, commit, wait ----

DEVICE void product_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void product_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most that many of the last groups are not done.
template <int Groups>
DEVICE void product_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Groups) : "memory");
}
// The compiler may not move an access to them across this.
template <int N>
DEVICE void pin(float (&d)[N]) {
  UNROLL for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

#define D4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define D16(d, i) D4(d, i), D4(d, i + 4), D4(d, i + 8), D4(d, i + 12)
#define D32(d) D16(d, 0), D16(d, 16)
#define D64(d) D32(d), D16(d, 32), D16(d, 48)
#define R32                                                                                              \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
  "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define R64                                                                                                    \
  R32                                                                                                          \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52," \
  " %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define PREDICATE(add) "{\n.reg .pred adds;\nsetp.ne.b32 adds, " add ", 0;\n"
#define PRODUCT(N, type) "wgmma.mma_async.sync.aligned.m64n" N "k16.f32." type "." type " "

// product_shared: d [64, 128] of a [64, 16] and b [128, 16], both rows of 16 in shared memory.
// product_registers: d [64, 128 or 64] of a in registers and b [16, 128 or 64] in shared memory.
#define PRODUCTS(T, type)                                                                                     \
  DEVICE void product_shared(float (&d)[64], uint64_t a, uint64_t b, bool add, T) {                           \
    asm volatile(PREDICATE("%66") PRODUCT("128", type) "{" R64 "}, %64, %65, adds, 1, 1, 0, 0;\n}"            \
                 : D64(d)                                                                                     \
                 : "l"(a), "l"(b), "r"(static_cast<int>(add)));                                               \
  }                                                                                                           \
  DEVICE void product_registers(float (&d)[64], const uint32_t (&a)[4], uint64_t b, T) {                      \
    asm volatile(PREDICATE("%69") PRODUCT("128", type) "{" R64 "}, {%64, %65, %66, %67}, %68, adds, 1, 1, 1;\n}" \
                 : D64(d)                                                                                     \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(1));                               \
  }                                                                                                           \
  DEVICE void product_registers(float (&d)[32], const uint32_t (&a)[4], uint64_t b, T) {                      \
    asm volatile(PREDICATE("%37") PRODUCT("64", type) "{" R32 "}, {%32, %33, %34, %35}, %36, adds, 1, 1, 1;\n}" \
                 : D32(d)                                                                                     \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(1));                               \
  }
PRODUCTS(f16, "f16")
PRODUCTS(bf16, "bf16")

#undef D4
#undef D16
#undef D32
#undef D64
#undef R32
#undef R64
#undef PREDICATE
#undef PRODUCT
#undef PRODUCTS

}  // namespace mmicl::cuda

#else
#include "emulated_hopper.h"
#endif
