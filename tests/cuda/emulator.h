// Runs the blocks of a CUDA grid on a CPU, one after the other: threads are fibers, warps meet where their lanes
// must, shared memory is watched. What it does to a kernel that relies on luck:
//
//  - fibers run in a random order between the points where they must meet;
//  - asynchronous copies and products take effect as late as the kernel allows, or at once, or at random;
//  - shared memory begins as NaN, and the accumulators of a product in flight hold a number of no meaning;
//  - every access to shared memory is checked for bounds, alignment and order, by vector clocks of the warps and of
//    what each barrier's copies wrote, and inside a warp by lane.
//
// Global memory is the process's own: AddressSanitizer sees to that.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <map>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulator {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class Policy { random, early, late };  // when asynchronous work takes effect
struct Options {
  uint64_t seed = 0;
  Policy policy = Policy::random;
};
inline Options options;

struct Index {
  int x = 0, y = 0, z = 0;
};

constexpr int kLanes = 32, kMaxWarps = 16, kMaxBarriers = 32, kClocks = kMaxWarps + kMaxBarriers;
constexpr int kMaxShared = 227 * 1024;
constexpr size_t kStack = 128 * 1024, kGuard = 4096;

// What is known to have happened: of each warp, and of the copies that each barrier in shared memory counts.
struct Clock {
  uint32_t at[kClocks] = {};
  void join(const Clock& other) {
    for (int i = 0; i < kClocks; ++i) at[i] = at[i] < other.at[i] ? other.at[i] : at[i];
  }
};

// Of 4 bytes of shared memory: the last write, and the last read of every warp. `epoch` tells what a warp's lanes
// did before and after a sync: a shuffle, at which they meet too, orders no memory.
struct Cell {
  int8_t writer = -1, writing_lane = -1, reader = -1, reading_lane = -1;
  uint32_t written = 0, write_epoch = 0, read_epoch = 0;
  uint32_t read[kMaxWarps] = {};
};

struct Barrier {  // in shared memory
  int clock = 0, arrivals = 0, pending = 0;
  int64_t bytes = 0;
  int phase = 0;
  Clock now, last;
};
struct NamedBarrier {
  int arrived = 0;
  uint64_t generation = 0;
  Clock now, last;
};

// One wgmma of a warp. `compute` has its effect on the accumulators, `read` records its reads.
struct Product {
  std::function<void()> compute, read;
  uint64_t group;
  const float* accumulators;
  bool done;
};
// The accumulators of a warp that are in flight: 16 rows of N, and where each lane has its own.
struct Accumulators {
  std::vector<float> rows;
  std::vector<float*> lanes;
};

struct Warp {
  Clock clock;
  uint32_t epoch = 0;
  const char* meets_at = nullptr;  // what the lanes that came first are at
  int line = 0, arrived = 0;
  void* arguments[kLanes] = {};
  std::vector<Product> products;
  uint64_t group = 0, products_issued = 0;
  bool fenced = false;
  std::map<const float*, Accumulators> in_flight;
};

struct Fiber {
  ucontext_t context;
  char* stack = nullptr;
  bool done = false;
  const void* waits_for = nullptr;  // absent: ready
  const char* file = "";
  int line = 0;
  void* fake_stack = nullptr;
};

struct Block {
  Index index;
  int threads = 0, shared_bytes = 0;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<uint8_t> memory = std::vector<uint8_t>(kMaxShared + 1024);
  std::vector<Cell> cells;
  std::map<uint32_t, Barrier> barriers;
  NamedBarrier named[16];
  std::vector<std::function<void()>> copies;  // of the TMA, in flight
  std::mt19937_64 random;
  std::function<void()> kernel;
  ucontext_t scheduler;
  int current = -1;
  std::exception_ptr error;
  const void* host_stack = nullptr;
  size_t host_stack_size = 0;

  uint8_t* shared() { return reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(memory.data()) + 1023) & ~uintptr_t{1023}); }
};

inline Block block;

inline int lane() { return block.current % kLanes; }
inline int warp_index() { return block.current / kLanes; }
inline Warp& warp() { return block.warps[warp_index()]; }
inline Fiber& fiber() { return block.fibers[block.current]; }
inline bool at_once() {
  return options.policy == Policy::early || (options.policy == Policy::random && block.random() % 2);
}
inline void tick() { ++warp().clock.at[warp_index()]; }

[[noreturn]] inline void fail(const std::string& what) {
  std::string where = " (block " + std::to_string(block.index.x) + ", " + std::to_string(block.index.y) + ", " + std::to_string(block.index.z);
  if (block.current >= 0) where += "; warp " + std::to_string(warp_index()) + ", lane " + std::to_string(lane());
  throw Error(what + where + ")");
}

// ---- fibers ----

inline void to_scheduler(bool last = false) {
  Fiber& f = fiber();
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(last ? nullptr : &f.fake_stack, block.host_stack, block.host_stack_size);
#endif
  swapcontext(&f.context, &block.scheduler);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(f.fake_stack, nullptr, nullptr);
#endif
  (void)last;
}

inline void to_fiber(int thread) {
  block.current = thread;
  Fiber& f = block.fibers[thread];
#ifdef __SANITIZE_ADDRESS__
  void* own;
  __sanitizer_start_switch_fiber(&own, f.stack, kStack);
#endif
  swapcontext(&block.scheduler, &f.context);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(own, nullptr, nullptr);
#endif
  block.current = -1;
}

// Until somebody wakes those that wait for it.
inline void wait_for(const void* what, const char* file, int line) {
  Fiber& f = fiber();
  f.waits_for = what, f.file = file, f.line = line;
  to_scheduler();
}
inline void wake(const void* what) {
  for (Fiber& f : block.fibers) {
    if (f.waits_for == what) f.waits_for = nullptr;
  }
}

inline void fiber_main() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &block.host_stack, &block.host_stack_size);
#endif
  try {
    block.kernel();
  } catch (...) {
    block.error = std::current_exception();
  }
  fiber().done = true;
  to_scheduler(true);
  std::abort();  // nobody goes on with what is done
}

// All lanes of a warp come to the same call before one of them does `work`, given each lane's argument.
template <class Work>
void meet(void* argument, Work work, const char* file, int line) {
  Warp& w = warp();
  if (w.arrived == 0) w.meets_at = file, w.line = line;
  if (w.line != line || std::strcmp(w.meets_at, file) != 0) {
    fail(std::string("lanes of a warp part: ") + file + ":" + std::to_string(line) + " and " + w.meets_at + ":" + std::to_string(w.line));
  }
  w.arguments[lane()] = argument;
  if (++w.arrived < kLanes) return wait_for(&w, file, line);
  w.arrived = 0;
  work(w.arguments);
  wake(&w);
}

// ---- shared memory ----

inline void check_address(uint32_t address, int bytes, int alignment, const char* what) {
  if (address % alignment) fail(std::string(what) + ": misaligned shared address " + std::to_string(address));
  if (static_cast<int64_t>(address) + bytes > block.shared_bytes) {
    fail(std::string(what) + ": shared address " + std::to_string(address) + " is out of bounds");
  }
}

[[noreturn]] inline void race(const char* what, int64_t cell) {
  fail(std::string("race: ") + what + " at shared address " + std::to_string(4 * cell));
}

// By a lane, or, asynchronously, for a warp: lane -1.
inline void on_read(uint32_t address, int bytes, int w, int lane, const Clock& known) {
  const uint32_t epoch = block.warps[w].epoch;
  for (uint32_t i = address / 4; i < (address + bytes + 3) / 4; ++i) {
    Cell& x = block.cells[i];
    if (x.writer >= 0 && x.written > known.at[x.writer]) race("a read of what may not be written yet", i);
    if (x.writing_lane >= 0 && lane < 0) race("an asynchronous read of what a thread wrote, without a proxy fence", i);
    if (x.writer == w && x.writing_lane >= 0 && x.writing_lane != lane && x.write_epoch == epoch) race("a read of what another lane wrote, without sync_warp", i);
    x.read[w] = known.at[w];
    const bool others_read = x.reader == w && x.read_epoch == epoch && x.reading_lane != lane && lane >= 0;
    x.reader = w, x.reading_lane = others_read ? kLanes : lane, x.read_epoch = epoch;
  }
}
// By a lane of warp `w`, or by copies whose clock is `w` and which know of themselves that `now`: lane -1.
inline void on_write(uint32_t address, int bytes, int w, int lane, const Clock& known, uint32_t now) {
  for (uint32_t i = address / 4; i < (address + bytes + 3) / 4; ++i) {
    Cell& x = block.cells[i];
    if (x.writer >= 0 && x.written > known.at[x.writer]) race("a write over what may not be written yet", i);
    for (int u = 0; u < kMaxWarps; ++u) {
      if (x.read[u] > known.at[u]) race("a write over what may be read still", i);
    }
    if (lane >= 0) {
      const uint32_t epoch = block.warps[w].epoch;
      if (x.writer == w && x.writing_lane >= 0 && x.writing_lane != lane && x.write_epoch == epoch) race("two lanes write", i);
      if (x.reader == w && x.reading_lane >= 0 && x.reading_lane != lane && x.read_epoch == epoch) race("a write over what another lane reads, without sync_warp", i);
      x.write_epoch = epoch;
    }
    x.writer = w, x.writing_lane = lane, x.written = now;
  }
}

template <class T>
T load(uint32_t address) {
  check_address(address, sizeof(T), sizeof(T), "a load");
  on_read(address, sizeof(T), warp_index(), lane(), warp().clock);
  T x;
  std::memcpy(&x, block.shared() + address, sizeof(T));
  return x;
}
template <class T>
void store(uint32_t address, T x) {
  check_address(address, sizeof(T), sizeof(T), "a store");
  on_write(address, sizeof(T), warp_index(), lane(), warp().clock, warp().clock.at[warp_index()]);
  std::memcpy(block.shared() + address, &x, sizeof(T));
}

// ---- barriers of warps ----

inline void named_barrier(int name, int threads, bool waits, const char* file, int line) {
  if (name < 0 || name > 15) fail("there is no named barrier " + std::to_string(name));
  NamedBarrier& b = block.named[name];
  b.now.join(warp().clock);
  const uint64_t generation = b.generation;
  if (++b.arrived == threads) {
    b.arrived = 0, b.last = b.now, b.now = Clock{}, ++b.generation;
    wake(&b);
  }
  if (waits) {
    while (b.generation == generation) wait_for(&b, file, line);
    warp().clock.join(b.last);
    ++warp().epoch;
  }
  tick();
}

// ---- launch ----

inline void begin_block() {
  const int warps = block.threads / kLanes;
  while (static_cast<int>(block.fibers.size()) < block.threads) {
    Fiber f;
    void* memory = mmap(nullptr, kGuard + kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw Error("no memory for a fiber's stack");
    mprotect(memory, kGuard, PROT_NONE);
    f.stack = static_cast<char*>(memory) + kGuard;
    block.fibers.push_back(f);
  }
  for (int i = 0; i < static_cast<int>(block.fibers.size()); ++i) {
    Fiber& f = block.fibers[i];
    f.done = i >= block.threads, f.waits_for = nullptr, f.fake_stack = nullptr;
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(f.stack, kStack);
#endif
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack, f.context.uc_stack.ss_size = kStack, f.context.uc_link = nullptr;
    makecontext(&f.context, fiber_main, 0);
  }
  block.warps.assign(warps, Warp{});
  for (int w = 0; w < warps; ++w) block.warps[w].clock.at[w] = 1;
  block.cells.assign(block.shared_bytes / 4 + 1, Cell{});
  block.barriers.clear(), block.copies.clear();
  for (NamedBarrier& b : block.named) b = NamedBarrier{};
  std::memset(block.shared(), 0xff, block.shared_bytes);
  block.error = nullptr, block.current = -1;
}

inline void land_a_copy() {
  const size_t i = block.random() % block.copies.size();
  const auto copy = block.copies[i];
  block.copies.erase(block.copies.begin() + i);
  copy();
}

// One warp's lanes run until each waits; false if there is none that can.
inline bool run_a_warp() {
  const int warps = block.threads / kLanes, first = block.random() % warps;
  for (int k = 0; k < warps; ++k) {
    const int w = (first + k) % warps, shift = block.random() % kLanes;
    bool progress = false;
    for (int j = 0; j < kLanes; ++j) {
      const int i = w * kLanes + (j + shift) % kLanes;
      if (block.fibers[i].done || block.fibers[i].waits_for) continue;
      progress = true;
      to_fiber(i);
      if (block.error) std::rethrow_exception(block.error);
    }
    if (progress) return true;
  }
  return false;
}

[[noreturn]] inline void deadlock() {
  std::string text = "deadlock:";
  for (int i = 0; i < block.threads; i += kLanes) {
    for (int l = 0; l < kLanes; ++l) {
      const Fiber& f = block.fibers[i + l];
      if (f.done) continue;
      text += " warp " + std::to_string(i / kLanes) + " lane " + std::to_string(l) + " at " + f.file + ":" + std::to_string(f.line);
      break;
    }
  }
  fail(text);
}

inline void end_block() {
  for (const Warp& w : block.warps) {
    if (!w.in_flight.empty()) fail("products are not waited for");
  }
  for (size_t w = 0; w < block.warps.size(); ++w) {
    if (block.warps[w].products_issued != block.warps[w / 4 * 4].products_issued) fail("warps of a warpgroup issued different products");
  }
  for (const NamedBarrier& b : block.named) {
    if (b.arrived) fail("threads are left at a named barrier");
  }
  for (const auto& [address, b] : block.barriers) {
    if (b.bytes) fail("copies to the barrier at " + std::to_string(address) + " are not waited for");
  }
}

inline void run_block() {
  begin_block();
  const auto is_alive = [](const Fiber& f) { return !f.done; };
  while (std::any_of(block.fibers.begin(), block.fibers.end(), is_alive)) {
    if (options.policy == Policy::random && !block.copies.empty() && block.random() % 4 == 0) land_a_copy();
    if (run_a_warp()) continue;
    if (block.copies.empty()) deadlock();
    land_a_copy();
  }
  while (!block.copies.empty()) land_a_copy();
  end_block();
}

template <class Kernel, class Params>
void launch(Index grid, int threads, int shared_bytes, Kernel kernel, const Params& p) {
  if (threads % kLanes || threads > kLanes * kMaxWarps) throw Error("a block of " + std::to_string(threads) + " threads");
  if (shared_bytes > kMaxShared) throw Error("a block with " + std::to_string(shared_bytes) + " bytes of shared memory");
  block.threads = threads, block.shared_bytes = shared_bytes;
  block.kernel = [&] { kernel(p); };
  block.random.seed(options.seed);
  for (int z = 0; z < grid.z; ++z) {
    for (int y = 0; y < grid.y; ++y) {
      for (int x = 0; x < grid.x; ++x) {
        block.index = {x, y, z};
        run_block();
      }
    }
  }
}

}  // namespace emulator
