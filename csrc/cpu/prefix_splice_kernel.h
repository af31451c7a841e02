// Rows from one dtype to another, and sums of rows. Included once per instruction set, as
// attention_shift_kernel.h is, and without standard library templates for the same reason.

#include <cstdint>

#include "prefix_splice.h"

namespace mmicl {
namespace MMICL_ISA {

#include "vec.h"

typedef int8_t i8x8 __attribute__((vector_size(8)));

template <class To, class From>
void convert(void* out, const void* in, const void*, int64_t C) {
  To* y = static_cast<To*>(out);
  const From* x = static_cast<const From*>(in);
  int64_t c = 0;
  for (; c + kLanes <= C; c += kLanes) store(y + c, lanes_of<To>(load(x + c)));
  if (c < C) store_tail(y + c, lanes_of<To>(load_tail(x + c, C - c)), C - c);
}

// A product in float (double for double), rounded once.
template <class To, class Scale>
void dequantise(void* out, const void* in, const void* scale, int64_t C) {
  To* y = static_cast<To*>(out);
  const int8_t* x = static_cast<const int8_t*>(in);
  const acc_t<To> a = acc_t<To>(load_tail(static_cast<const Scale*>(scale), 1)[0]);
  int64_t c = 0;
  for (; c + kLanes <= C; c += kLanes) store(y + c, a * lanes_of<To>(read<i8x8>(x + c)));
  if (c < C) {
    int8_t lanes[kLanes] = {};
    __builtin_memcpy(lanes, x + c, C - c);
    store_tail(y + c, a * lanes_of<To>(read<i8x8>(lanes)), C - c);
  }
}

template <class To, class From>
void sum(void* out, const void* const* rows, int64_t n, int64_t C) {
  To* y = static_cast<To*>(out);
  int64_t c = 0;
  for (; c + kLanes <= C; c += kLanes) {
    vec_t<From> total = {};
    for (int64_t i = 0; i < n; ++i) total += load(static_cast<const From*>(rows[i]) + c);
    store(y + c, lanes_of<To>(total));
  }
  if (c < C) {
    vec_t<From> total = {};
    for (int64_t i = 0; i < n; ++i) total += load_tail(static_cast<const From*>(rows[i]) + c, C - c);
    store_tail(y + c, lanes_of<To>(total), C - c);
  }
}

// Named unlike those of the other ops: the linker would merge variables of one name.
template <class To>
constexpr PrefixSpliceKernels kPrefixSpliceKernels = {
    {convert<To, float>, convert<To, double>, convert<To, bf16>, convert<To, f16>},
    {dequantise<To, float>, dequantise<To, double>, dequantise<To, bf16>, dequantise<To, f16>},
    {sum<To, float>, sum<To, double>, sum<To, bf16>, sum<To, f16>},
};

}  // namespace MMICL_ISA

const PrefixSpliceKernels MMICL_TABLE[4] = {
    MMICL_ISA::kPrefixSpliceKernels<float>,
    MMICL_ISA::kPrefixSpliceKernels<double>,
    MMICL_ISA::kPrefixSpliceKernels<MMICL_ISA::bf16>,
    MMICL_ISA::kPrefixSpliceKernels<MMICL_ISA::f16>,
};

}  // namespace mmicl
