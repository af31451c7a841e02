// prefix_splice on CPU: where every row of a batch comes from, the copies, and their gradients. No torch.
//
//   request r = [bank rows of its demonstrations, in order; its own prompt]
//   dbank[n] = the sum of dout's rows over all uses of n, in the order of the uses
//
// Letters: R requests, K ids, M demonstrations, N bank rows, B batch rows of L rows each, C model dim.
// A place is a batch row's first row among the B L rows, and a position in that batch row; a token of it is
// there if its position lies in [0, L). What is dropped is at kDropped.
#pragma once

#include <cstdint>
#include <vector>

#include "attention_shift.h"

namespace mmicl {

constexpr int64_t kDropped = -(int64_t{1} << 48);
constexpr int64_t kIgnoredLabel = -100;

// int32 or int64 numbers. Stride in elements.
struct Integers {
  const void* data = nullptr;  // may be absent
  int64_t size = 0, stride = 1;
  bool wide = false;

  int64_t operator[](int64_t i) const {
    i *= stride;
    return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

// Which demonstrations each request names, and which bank rows they are.
struct Demonstrations {
  Integers offsets, demo_ids, cu_demos;  // [M + 1], [K], [R + 1]
  int64_t N = 0;

  int64_t requests() const { return cu_demos.size - 1; }
};

// Where the prompts are among R rows of T tokens, or among T tokens with cu_prompt.
struct Prompts {
  Integers start, end, cu_prompt;  // [R], [R], [R + 1]; each may be absent
  int64_t T = 0;
};

enum class SpliceLayout { left, right, packed };

struct SpliceShape {
  SpliceLayout layout = SpliceLayout::left;
  int64_t L = 0, max_length = 0;
};

// What there is one of per id or request, all contiguous.
struct SplicePlaces {
  int64_t* demos = nullptr;       // [2, K]
  int64_t* prompts = nullptr;     // [2, R]; in place, where the fused tokens end
  int32_t* cu_seqlens = nullptr;  // [R + 1]; not in place
};

enum class RowKind { padding, fused, own, kept };  // kept: not written to

// Rows of a tensor, from begin to the begin of the next run, that lie beside each other in their source too.
struct Run {
  RowKind kind;
  int64_t begin, source;  // source: the row that the first one comes from
  int64_t position;       // of the first one in its request
};

// Runs in ascending order that cover all rows; the last one is empty and begins behind them.
using Runs = std::vector<Run>;

// These throw std::invalid_argument, Python's ValueError, where an id, a bound or a length is out of range.
Runs plan_splice(const Demonstrations&, const Prompts&, const SpliceShape&, const SplicePlaces&);
Runs plan_in_place(const Demonstrations&, const Integers& starts, int64_t B, int64_t L, const SplicePlaces&);
Runs plan_prompt_grad(const Prompts&, const int64_t* prompt_places, int64_t R, int64_t rows,  // of dprompt
                      int64_t B, int64_t L);                                                    // of dout

// The rows of a [B, T, C] tensor. Strides in bytes.
template <class Char>
struct ByteRows {
  Char* data = nullptr;
  int64_t T = 0, stride_b = 0, stride_t = 0;

  Char* row(int64_t i) const { return data + i / T * stride_b + i % T * stride_t; }
};
using ConstByteRows = ByteRows<const char>;
using MutableByteRows = ByteRows<char>;

// One row of C elements, in another dtype; scale is one number, where there is one.
using ConvertRow = void (*)(void* out, const void* in, const void* scale, int64_t C);
// The sum of n rows.
using SumRows = void (*)(void* out, const void* const* rows, int64_t n, int64_t C);

struct RowSource {
  ConstByteRows rows;
  ConvertRow convert = nullptr;  // absent: copied as they are
  const char* scale = nullptr;   // of row 0; absent: none
  int64_t stride_scale = 0;      // in bytes
};

struct RowCopies {
  MutableByteRows out;
  int64_t C = 0, row_bytes = 0;  // of a row of out
  RowSource fused, own;
};

struct TokenFields {
  int64_t *attention_mask = nullptr, *position_ids = nullptr, *labels = nullptr;  // [B, L]; labels or absent
  Integers own_labels;                                                            // as the prompts' rows
};

// Both do the rows [begin, end), to be split over threads at will.
void copy_rows(const RowCopies&, const Runs&, int64_t begin, int64_t end);
void write_fields(const TokenFields&, const Runs&, int64_t begin, int64_t end);

struct BankGrad {
  Integers offsets, demo_ids;       // [M + 1], [K]
  const int64_t* places = nullptr;  // [2, K]
  ConstByteRows dout;
  int64_t B = 0, L = 0, C = 0;
  int64_t copies = 1;  // batch rows that belong to one request
  char* dbank = nullptr;
  int64_t N = 0, row_bytes = 0;  // of dbank
  SumRows sum = nullptr;
  bool same_type = false;  // of dout and dbank
};

// The uses that were not dropped: of demonstration d, in order, those from first[d] to first[d + 1].
struct Uses {
  std::vector<int64_t> offsets, first, uses;
};

Uses find_uses(const BankGrad&);                                          // throws as above
void sum_uses(const BankGrad&, const Uses&, int64_t begin, int64_t end);  // bank rows

struct PrefixSpliceKernels {
  ConvertRow convert[4];     // by the input's type
  ConvertRow dequantise[4];  // from int8, by the scale's type
  SumRows sum[4];            // by the rows' type
};

const PrefixSpliceKernels& prefix_splice_kernels(ElementType out);

// One table per translation unit, indexed by the type of what is written.
extern const PrefixSpliceKernels kPrefixSpliceBaseline[4];
extern const PrefixSpliceKernels kPrefixSpliceAvx2[4];
extern const PrefixSpliceKernels kPrefixSpliceAvx512[4];

}  // namespace mmicl
