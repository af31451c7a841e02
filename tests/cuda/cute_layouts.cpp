// The emulator's fragments, operand addresses and swizzle, and our matrix descriptors, held against CuTe's. On the host.
#include <cute/atom/mma_atom.hpp>
#include <cute/tensor.hpp>

#include <cstdio>

#include "hopper.h"

namespace {

using namespace cute;
namespace mm = mmicl::cuda;
constexpr int kTile = 128, kPanel = kTile * 128;  // rows of 128 bytes; a tile of 128 columns is two panels
int differences = 0, checks = 0;

void expect(bool same, const char* what, int a, int b) {
  ++checks;
  if (!same && differences++ < 10) std::printf("%s differ at %d, %d\n", what, a, b);
}

// wgmma's accumulators: CuTe's layout has thread and element to row + 64 column.
template <int N, class Operation>
void check_accumulators() {
  for (int thread = 0; thread < 128; ++thread) {
    for (int i = 0; i < N / 2; ++i) {
      const int row = 16 * (thread / 32) + mm::fragment_row(thread % 32, i), column = mm::fragment_column(thread % 32, i);
      expect(typename MMA_Traits<Operation>::CLayout{}(thread, i) == row + 64 * column, "accumulators", thread, i);
    }
  }
}

// wgmma's left operand in registers: the element at (row, column) as the emulator takes it, in pairs.
void check_left_operand() {
  using Layout = MMA_Traits<SM90_64x128x16_F32BF16BF16_RS<GMMA::Major::K, GMMA::Major::MN>>::ALayout;
  for (int thread = 0; thread < 128; ++thread) {
    for (int i = 0; i < 8; ++i) {
      const int pair = i / 2, lane = thread % 32;
      const int row = 16 * (thread / 32) + lane / 4 + 8 * (pair % 2), column = 2 * (lane % 4) + 8 * (pair / 2) + i % 2;
      expect(Layout{}(thread, i) == row + 64 * column, "left operands", thread, i);
    }
  }
}

// Where products read a tile from, 16 columns (of keys) or rows (of values) of it at a time.
void check_operands() {
  const auto shape = Shape<Int<kTile>, Int<kTile>>{};
  const auto keys =
      as_position_independent_swizzle_layout(tile_to_shape(GMMA::Layout_K_SW128_Atom<bfloat16_t>{}, shape));
  const auto values =
      as_position_independent_swizzle_layout(tile_to_shape(GMMA::Layout_MN_SW128_Atom<bfloat16_t>{}, shape, Step<_2, _1>{}));
  for (int step = 0; step < kTile / 16; ++step) {
    const uint64_t by_row = mm::advanced(mm::matrix_descriptor(0, 16), step / 4 * kPanel + step % 4 * 32);
    for (int row = 0; row < kTile; ++row) {
      for (int chunk = 0; chunk < 2; ++chunk) {
        const int address = mm::operand_address(by_row, false, row, chunk);
        expect(address == 2 * int(keys(row, step * 16 + 8 * chunk)), "rows in shared memory", row, step);
      }
    }
    const uint64_t by_column = mm::advanced(mm::matrix_descriptor(0, kPanel), step * 2048);
    for (int row = 0; row < 16; ++row) {
      for (int chunk = 0; chunk < kTile / 8; ++chunk) {
        const int address = mm::operand_address(by_column, true, row, chunk);
        expect(address == 2 * int(values(chunk * 8, step * 16 + row)), "columns in shared memory", row, step);
      }
    }
  }
  for (int row = 0; row < kTile; ++row) {
    for (int chunk = 0; chunk < 8; ++chunk) {
      expect(int(mm::swizzled(row, chunk)) == 2 * int(keys(row, 8 * chunk)), "swizzles", row, chunk);
    }
  }
}

// The descriptors but for the address, which has none here. CuTe calls the leading distance of rows 1, of no meaning.
template <GMMA::Major kMajor, class Atom, class Order>
uint64_t descriptor(Atom atom, Order order) {
  static bfloat16_t memory[kTile * kTile];
  const auto layout = tile_to_shape(atom, Shape<Int<kTile>, Int<kTile>>{}, order);
  const auto part = local_tile(make_tensor(make_smem_ptr(memory), layout), Shape<Int<kTile>, _16>{}, make_coord(0, 0));
  return SM90::GMMA::make_gmma_desc<kMajor>(part).desc_ & ~uint64_t{0x3fff};
}
void check_descriptors() {
  const uint64_t leading = uint64_t{0x3fff} << 16;
  const uint64_t keys = descriptor<GMMA::Major::K>(GMMA::Layout_K_SW128_Atom<bfloat16_t>{}, Step<_1, _2>{});
  expect((keys & ~leading) == (mm::matrix_descriptor(0, 16) & ~leading), "descriptors of rows", 0, 0);
  const uint64_t values = descriptor<GMMA::Major::MN>(GMMA::Layout_MN_SW128_Atom<bfloat16_t>{}, Step<_2, _1>{});
  expect(values == mm::matrix_descriptor(0, kPanel), "descriptors of columns", 0, 0);
}

}  // namespace

int main() {
  check_accumulators<128, SM90_64x128x16_F32BF16BF16_SS<GMMA::Major::K, GMMA::Major::K>>();
  check_accumulators<64, SM90_64x64x16_F32BF16BF16_RS<GMMA::Major::K, GMMA::Major::MN>>();
  check_left_operand();
  check_operands();
  check_descriptors();
  std::printf("%d of %d differ\n", differences, checks);
  return differences > 0;
}
