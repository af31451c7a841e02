// Large pages for large outputs. No torch here.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace mmicl {

// Call it on memory that was just allocated and is about to be written as a whole. From 32 MiB on glibc
// asks the kernel for every block and gives it back when freed (it keeps smaller ones), so that each
// call would take a page fault for each 4 KiB, which costs more than the copy. Where the administrator lets
// programs ask for large pages ("madvise", the usual setting), a fault brings 2 MiB. The advice ends with
// the block; a kernel that does not take it changes nothing.
inline void advise_large_pages(void* data, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kOwnMapping = uintptr_t{32} << 20, kLargePage = uintptr_t{2} << 20;
  if (static_cast<uintptr_t>(bytes) < kOwnMapping) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kLargePage - 1) / kLargePage * kLargePage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kLargePage * kLargePage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace mmicl
