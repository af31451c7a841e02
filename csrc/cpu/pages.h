// Large pages for large outputs. No torch here.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace mmicl {

// Call it on memory that was just allocated and is about to be written as a whole. Large blocks are often
// fresh pages: from 32 MiB on glibc asks the kernel for each and gives it back when it is freed, and so it
// does with the end of its heap once enough lies free there. A page fault for each 4 KiB then costs more
// than the copy. Where programs may ask for large pages ("madvise" in transparent_hugepage/enabled, the
// usual setting) a fault brings 2 MiB; elsewhere nothing changes. No such page reaches beyond the block, so
// nothing grows. The advice lasts while the memory is mapped, in the heap perhaps longer than the block.
inline void advise_large_pages(void* data, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kLargeBlock = uintptr_t{8} << 20, kLargePage = uintptr_t{2} << 20;
  if (static_cast<uintptr_t>(bytes) < kLargeBlock) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kLargePage - 1) / kLargePage * kLargePage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kLargePage * kLargePage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace mmicl
