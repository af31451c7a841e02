// csrc/cuda/hopper.h on a CPU.
#pragma once

#include "emulated_device.h"

namespace mmicl::cuda {

// Of 2-byte elements with the 128-byte swizzle. Strides in bytes; that of the innermost is 2.
struct TensorMap {
  const char* base;
  int64_t sizes[4], strides[4];
  int box[4];
};

// ---- barriers in shared memory ----

inline emulator::Barrier& barrier_at(uint32_t address) {
  using namespace emulator;
  const auto found = block.barriers.find(address);
  if (found == block.barriers.end()) fail("the barrier at " + std::to_string(address) + " was not initialised");
  const Cell& x = block.cells[address / 4];
  if (block.current >= 0 && x.written > warp().clock.at[x.writer]) race("a barrier used before its initialisation is known", address / 4);
  return found->second;
}

inline void end_phase_if_complete(emulator::Barrier& b) {
  if (b.pending < 0) emulator::fail("more arrivals at a barrier than it was initialised with");
  if (b.pending || b.bytes) return;
  b.last = b.now, b.now = emulator::Clock{};
  b.phase ^= 1, b.pending = b.arrivals;
  emulator::wake(&b);
}

DEVICE void barrier_init(uint32_t barrier, int arrivals) {
  using namespace emulator;
  check_address(barrier, 8, 8, "a barrier");
  store(barrier, uint64_t{0});
  if (block.barriers.size() == kMaxBarriers) fail("more barriers than the emulator has clocks");
  Barrier& b = block.barriers[barrier];
  b = Barrier{};
  b.clock = kMaxWarps + static_cast<int>(block.barriers.size()) - 1;
  b.arrivals = b.pending = arrivals;
}
DEVICE void fence_barrier_init() {}

DEVICE void barrier_arrive_expect(uint32_t barrier, int bytes) {
  emulator::Barrier& b = barrier_at(barrier);
  b.bytes += bytes, --b.pending;
  b.now.join(emulator::warp().clock);
  emulator::tick();
  end_phase_if_complete(b);
}
DEVICE void barrier_arrive(uint32_t barrier) { barrier_arrive_expect(barrier, 0); }
DEVICE void barrier_wait(uint32_t barrier, int parity, HERE) {
  emulator::Barrier& b = barrier_at(barrier);
  while (b.phase == parity) emulator::wait_for(&b, file, line);
  emulator::warp().clock.join(b.last);
}

// ---- copies ----

inline void copy_box(uint32_t to, const TensorMap& map, const int (&corner)[4]) {
  const int rows = map.box[1] * map.box[2] * map.box[3];
  for (int r = 0; r < rows; ++r) {
    const int64_t at[3] = {corner[1] + r % map.box[1], corner[2] + r / map.box[1] % map.box[2],
                           corner[3] + r / map.box[1] / map.box[2]};
    bool inside = true;
    const char* row = map.base;
    for (int d = 0; d < 3; ++d) {
      inside = inside && at[d] >= 0 && at[d] < map.sizes[d + 1];
      row += inside ? at[d] * map.strides[d + 1] : 0;
    }
    for (int c = 0; c < map.box[0]; ++c) {
      const int64_t column = corner[0] + c;
      uint16_t x = 0;
      if (inside && column >= 0 && column < map.sizes[0]) std::memcpy(&x, row + 2 * column, 2);
      const uint32_t address = to + 2 * (r * map.box[0] + c);
      std::memcpy(emulator::block.shared() + (address ^ (address >> 3 & 0x70)), &x, 2);
    }
  }
}

DEVICE void tma_load(uint32_t to, const TensorMap& map, uint32_t barrier, int c0, int c1, int c2, int c3) {
  using namespace emulator;
  const int bytes = 2 * map.box[0] * map.box[1] * map.box[2] * map.box[3];
  check_address(to, bytes, 1024, "a copy");
  Barrier& b = barrier_at(barrier);
  // Copies are not ordered among each other: each knows what its issuer knew, and itself.
  Clock known = warp().clock;
  const uint32_t now = ++warp().clock.at[warp_index()];
  const auto copy = [=, &b, &map] {
    on_write(to, bytes, b.clock, -1, known, now);
    copy_box(to, map, {c0, c1, c2, c3});
    Clock after = known;
    after.at[b.clock] = now;
    b.now.join(after);
    b.bytes -= bytes;
    end_phase_if_complete(b);
  };
  if (options.policy == Policy::early) {
    copy();
  } else {
    block.copies.push_back(copy);
  }
}

// ---- barriers of warps, registers ----

DEVICE void named_sync(int name, int threads, HERE) { emulator::named_barrier(name, threads, true, file, line); }
DEVICE void named_arrive(int name, int threads, HERE) { emulator::named_barrier(name, threads, false, file, line); }

template <int Count>
DEVICE void more_registers(HERE) {
  static_assert(Count % 8 == 0 && Count >= 24 && Count <= 256);
  emulator::meet(nullptr, [](void**) {}, file, line);
}
template <int Count>
DEVICE void fewer_registers(HERE) {
  more_registers<Count>(file, line);
}

// ---- products ----

constexpr float kInFlight = 1.2345e33f;  // what accumulators hold meanwhile; not NaN, which would spread unseen

DEVICE void product_fence(HERE) {
  emulator::meet(nullptr, [](void**) { emulator::warp().fenced = true; }, file, line);
}
DEVICE void product_commit(HERE) {
  emulator::meet(nullptr, [](void**) { ++emulator::warp().group; }, file, line);
}

// The element (row, column) of d that is a lane's i-th: "Register Fragments" of wgmma.
constexpr int fragment_row(int lane, int i) { return lane / 4 + 8 * (i / 2 % 2); }
constexpr int fragment_column(int lane, int i) { return 8 * (i / 4) + 2 * (lane % 4) + i % 2; }

inline void land_accumulators(emulator::Accumulators& x) {
  const int F = static_cast<int>(x.rows.size()) / emulator::kLanes, N = 2 * F;
  for (int l = 0; l < emulator::kLanes; ++l) {
    for (int i = 0; i < F; ++i) {
      if (x.lanes[l][i] != kInFlight) emulator::fail("accumulators were written to while a product was in flight");
      x.lanes[l][i] = x.rows[fragment_row(l, i) * N + fragment_column(l, i)];
    }
  }
}

template <int Groups>
DEVICE void product_wait(HERE) {
  emulator::meet(
      nullptr,
      [](void**) {
        emulator::Warp& w = emulator::warp();
        std::vector<emulator::Product> left;
        for (emulator::Product& x : w.products) {
          if (x.group + Groups >= w.group) {
            left.push_back(x);
            continue;
          }
          if (!x.done) x.compute();
          x.read();
        }
        w.products = left;
        w.fenced = false;
        for (auto it = w.in_flight.begin(); it != w.in_flight.end();) {
          const auto uses = [&](const emulator::Product& x) { return x.accumulators == it->first; };
          if (std::any_of(left.begin(), left.end(), uses)) {
            ++it;
          } else {
            land_accumulators(it->second);
            it = w.in_flight.erase(it);
          }
        }
      },
      file, line);
}

template <int N>
DEVICE void pin(float (&d)[N]) {
  asm volatile("" ::"r"(d) : "memory");
}

// Where 16 bytes of an operand lie. Of rows of what is summed over (is_transposed): (k, 8 columns); else (row, 8 k).
inline uint32_t operand_address(uint64_t descriptor, bool is_transposed, int row, int chunk) {
  if (descriptor >> 62 != 1) emulator::fail("a matrix descriptor without the 128-byte swizzle");
  const uint32_t start = (descriptor & 0x3fff) << 4, leading = (descriptor >> 16 & 0x3fff) << 4,
                 stride = (descriptor >> 32 & 0x3fff) << 4;
  const uint32_t panel = is_transposed ? chunk / 8 * leading + chunk % 8 * 16 : chunk * 16;
  const uint32_t address = start + panel + row / 8 * stride + row % 8 * 128;
  return address ^ (address >> 3 & 0x70);
}

template <class T>
void read_chunk(uint32_t address, float (&x)[8], T type) {
  uint16_t bits[8];
  std::memcpy(bits, emulator::block.shared() + address, 16);
  for (int j = 0; j < 8; ++j) x[j] = to_float(bits[j], type);
}

struct ProductLane {
  float* d;
  const uint32_t* a;  // absent: in shared memory
  uint64_t a_descriptor, b_descriptor;
};

// What one warp's part of a product is given, and its effect.
template <int N, class T>
struct WarpProduct {
  int warp;
  bool is_transposed, add;
  uint64_t a_descriptor, b_descriptor;
  std::vector<const uint32_t*> a_registers;
  std::vector<uint32_t> a_values;

  int b_rows() const { return is_transposed ? 16 : N; }
  int b_chunks() const { return is_transposed ? N / 8 : 2; }
  uint32_t a_address(int row, int chunk) const { return operand_address(a_descriptor, false, 16 * (warp % 4) + row, chunk); }

  void read() const {
    for (size_t l = 0; l < a_registers.size(); ++l) {
      if (std::memcmp(a_registers[l], &a_values[4 * l], 16) != 0) emulator::fail("registers of a product in flight were written to");
    }
    const auto& known = emulator::block.warps[warp].clock;
    const auto read_one = [&](uint32_t address) {
      emulator::check_address(address, 16, 16, "a product's operand");
      emulator::on_read(address, 16, warp, -1, known);
    };
    for (int r = 0; r < b_rows(); ++r) {
      for (int c = 0; c < b_chunks(); ++c) read_one(operand_address(b_descriptor, is_transposed, r, c));
    }
    for (int r = 0; r < 16 && a_registers.empty(); ++r) {
      for (int c = 0; c < 2; ++c) read_one(a_address(r, c));
    }
  }

  void compute(std::vector<float>& rows) const {
    float a[16][16], b[16][N], chunk[8];
    if (a_registers.empty()) {
      for (int r = 0; r < 16; ++r) {
        for (int c = 0; c < 2; ++c) {
          read_chunk(a_address(r, c), chunk, T{});
          std::memcpy(&a[r][8 * c], chunk, sizeof(chunk));
        }
      }
    } else {
      for (int l = 0; l < emulator::kLanes; ++l) {
        for (int i = 0; i < 4; ++i) {
          float* pair = &a[l / 4 + 8 * (i % 2)][2 * (l % 4) + 8 * (i / 2)];
          unpack(a_values[4 * l + i], pair[0], pair[1], T{});
        }
      }
    }
    for (int r = 0; r < b_rows(); ++r) {
      for (int c = 0; c < b_chunks(); ++c) {
        read_chunk(operand_address(b_descriptor, is_transposed, r, c), chunk, T{});
        for (int j = 0; j < 8; ++j) (is_transposed ? b[r][8 * c + j] : b[8 * c + j][r]) = chunk[j];
      }
    }
    for (int m = 0; m < 16; ++m) {
      float sum[N] = {};
      for (int k = 0; k < 16; ++k) {
        for (int n = 0; n < N; ++n) sum[n] += a[m][k] * b[k][n];
      }
      for (int n = 0; n < N; ++n) rows[m * N + n] = (add ? rows[m * N + n] : 0.f) + sum[n];
    }
  }
};

// The accumulators go in flight: nobody may look at them before the wait.
template <int F>
void take_off(emulator::Accumulators& x, void** lanes) {
  constexpr int N = 2 * F;
  x.rows.resize(16 * N), x.lanes.resize(emulator::kLanes);
  for (int l = 0; l < emulator::kLanes; ++l) {
    x.lanes[l] = static_cast<ProductLane*>(lanes[l])->d;
    for (int i = 0; i < F; ++i) {
      x.rows[fragment_row(l, i) * N + fragment_column(l, i)] = x.lanes[l][i];
      x.lanes[l][i] = kInFlight;
    }
  }
}

template <int F, class T>
void issue_product(void** lanes, bool is_transposed, bool add) {
  using namespace emulator;
  Warp& w = warp();
  const auto* first = static_cast<ProductLane*>(lanes[0]);
  WarpProduct<2 * F, T> x{warp_index(), is_transposed, add, first->a_descriptor, first->b_descriptor, {}, {}};
  for (int l = 0; l < kLanes; ++l) {
    const auto* own = static_cast<ProductLane*>(lanes[l]);
    if (own->b_descriptor != x.b_descriptor || own->a_descriptor != x.a_descriptor) fail("lanes give a product different descriptors");
    if (!own->a) continue;
    x.a_registers.push_back(own->a);
    x.a_values.insert(x.a_values.end(), own->a, own->a + 4);
  }
  const bool flies = w.in_flight.count(first->d) > 0;
  if (!w.fenced && !(flies && x.a_registers.empty())) fail("registers of a product were not fenced since the last wait");
  Accumulators& accumulators = w.in_flight[first->d];
  if (!flies) take_off<F>(accumulators, lanes);
  x.read();
  Product issued{[=, &accumulators] { x.compute(accumulators.rows); }, [=] { x.read(); }, w.group, first->d, false};
  // In the order of issue: none before one that is not done.
  if ((w.products.empty() || w.products.back().done) && at_once()) issued.compute(), issued.done = true;
  w.products.push_back(issued);
  ++w.products_issued;
}

template <int F, class T>
DEVICE void product_shared(float (&d)[F], uint64_t a, uint64_t b, bool add, T, HERE) {
  ProductLane mine{d, nullptr, a, b};
  emulator::meet(&mine, [=](void** lanes) { issue_product<F, T>(lanes, false, add); }, file, line);
}
template <int F, class T>
DEVICE void product_registers(float (&d)[F], const uint32_t (&a)[4], uint64_t b, T, HERE) {
  ProductLane mine{d, a, 0, b};
  emulator::meet(&mine, [=](void** lanes) { issue_product<F, T>(lanes, true, true); }, file, line);
}

}  // namespace mmicl::cuda
