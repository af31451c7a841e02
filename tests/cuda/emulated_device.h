// csrc/cuda/device.h on a CPU.
#pragma once

#include "emulator.h"

#define DEVICE inline
#define KERNEL(threads, blocks_per_sm) inline void
#define PARAM(Params) const Params&
#define UNROLL
// Where the kernel says it, for what lanes that part are told.
#define HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace mmicl::cuda {

DEVICE int thread_index() { return emulator::block.current; }
DEVICE int block_x() { return emulator::block.index.x; }
DEVICE int block_y() { return emulator::block.index.y; }
DEVICE int block_z() { return emulator::block.index.z; }
DEVICE uint32_t shared_base() { return 0; }

DEVICE void sync_threads(HERE) { emulator::named_barrier(0, emulator::block.threads, true, file, line); }
DEVICE void sync_warp(HERE) {
  emulator::meet(nullptr, [](void**) { ++emulator::warp().epoch; }, file, line);
}
DEVICE float shuffle_xor(float x, int mask, HERE) {
  struct Lane {
    float in, out;
    int mask;
  } mine{x, 0, mask};
  emulator::meet(
      &mine,
      [](void** lanes) {
        for (int l = 0; l < emulator::kLanes; ++l) {
          auto* own = static_cast<Lane*>(lanes[l]);
          own->out = static_cast<Lane*>(lanes[l ^ own->mask])->in;
        }
      },
      file, line);
  return mine.out;
}

DEVICE float exp2_approx(float x) { return std::exp2(x); }
DEVICE float log2_approx(float x) { return std::log2(x); }

DEVICE float to_float(uint16_t bits, f16) {
  _Float16 x;
  std::memcpy(&x, &bits, 2);
  return static_cast<float>(x);
}
DEVICE float to_float(uint16_t bits, bf16) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float x;
  std::memcpy(&x, &wide, 4);
  return x;
}
DEVICE uint16_t rounded(float x, f16) {
  const _Float16 y = static_cast<_Float16>(x);
  uint16_t bits;
  std::memcpy(&bits, &y, 2);
  return bits;
}
DEVICE uint16_t rounded(float x, bf16) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
template <class T>
DEVICE uint32_t pack(float low, float high, T type) {
  return rounded(low, type) | static_cast<uint32_t>(rounded(high, type)) << 16;
}
template <class T>
DEVICE void unpack(uint32_t pair, float& low, float& high, T type) {
  low = to_float(static_cast<uint16_t>(pair), type);
  high = to_float(static_cast<uint16_t>(pair >> 16), type);
}

DEVICE Vec4 load_shared(uint32_t address) { return emulator::load<Vec4>(address); }
DEVICE void store_shared(uint32_t address, uint32_t x) { emulator::store(address, x); }

}  // namespace mmicl::cuda
