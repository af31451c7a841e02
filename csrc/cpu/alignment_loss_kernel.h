// The kernels themselves. Included once per instruction set, as attention_shift_kernel.h is, and without
// standard library templates for the same reason.

#include <cstdint>

#include "alignment_loss.h"

namespace mmicl {
namespace MMICL_ISA {

#include "vec.h"
#include "columns.h"

template <class U>
MMICL_INLINE const U* target(const AlignmentRows& p, int64_t n) {
  return static_cast<const U*>(p.targets) + n * p.stride_targets;
}

template <class T, class U>
void forward(const SquaresParams& p, int64_t begin, int64_t end) {
  acc_t<T>*d = static_cast<acc_t<T>*>(p.d), *s = static_cast<acc_t<T>*>(p.s);
  for (int64_t n = begin; n < end; ++n) {
    const int64_t r = p.index[n];
    if (r < 0 || r >= p.R) {
      d[n] = s[n] = 0;
      continue;
    }
    const T* x = row<T>(p.states, r / p.T, r % p.T);
    const U* y = target<U>(p, n);
    Sum<vec_t<T>> differences, both;
    for_columns(p.C, [&](auto block, int i) MMICL_LAMBDA {
      const auto own = block.load(x), target = lanes_of<T>(block.load(y)), difference = own - target;
      differences.parts[i] += difference * difference;
      both.parts[i] += own * own + target * target;
    });
    d[n] = differences.total(), s[n] = both.total();
  }
}

// A use whose dd and ds are 0 is left out, whatever its row holds: it has no part in the loss.
template <class T, class U>
void backward(const SquaresGradParams& p, int64_t begin, int64_t end) {
  const acc_t<T>*dd = static_cast<const acc_t<T>*>(p.dd), *ds = static_cast<const acc_t<T>*>(p.ds);
  const auto is_off = [&](int64_t n) MMICL_LAMBDA { return dd[n] == 0 && ds[n] == 0; };
  for (int64_t r = begin; r < end; ++r) {
    T* dx = static_cast<T*>(p.dstates) + r * p.C;
    const int64_t *use = p.order + p.starts[r], *last = p.order + p.starts[r + 1];
    while (use < last && is_off(*use)) ++use;
    if (use == last) {
      __builtin_memset(dx, 0, p.C * sizeof(T));
      continue;
    }
    const T* x = row<T>(p.states, r / p.T, r % p.T);
    for_columns(p.C, [&](auto block, int) MMICL_LAMBDA {
      const auto own = block.load(x);
      vec_t<T> grad = {};
      for (const int64_t* n = use; n < last; ++n) {
        if (is_off(*n)) continue;
        const auto difference = own - lanes_of<T>(block.load(target<U>(p, *n)));
        grad += 2 * dd[*n] * difference + 2 * ds[*n] * own;
      }
      block.store(dx, grad);
    });
  }
}

// Named unlike those of the other ops: the linker would merge variables of one name.
template <class T>
constexpr AlignmentLossKernels kAlignmentLossKernels = {
    {forward<T, float>, forward<T, double>, forward<T, bf16>, forward<T, f16>},
    {backward<T, float>, backward<T, double>, backward<T, bf16>, backward<T, f16>},
};

}  // namespace MMICL_ISA

const AlignmentLossKernels MMICL_TABLE[4] = {
    MMICL_ISA::kAlignmentLossKernels<float>,
    MMICL_ISA::kAlignmentLossKernels<double>,
    MMICL_ISA::kAlignmentLossKernels<MMICL_ISA::bf16>,
    MMICL_ISA::kAlignmentLossKernels<MMICL_ISA::f16>,
};

}  // namespace mmicl
