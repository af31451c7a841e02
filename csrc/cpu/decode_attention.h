// Attention of a few queries: every key and value is read once. A task is one key head of one batch row, with all
// the queries that read it, and one part of its keys.
#pragma once

#include <cstdint>

#include "attention.h"

namespace mmicl {

struct DecodeParams : AttentionParams {
  void* partial;  // [tasks(), rows(), D + kSums] acc
};

constexpr int64_t kPartKeys = 1024;
constexpr int64_t kBlockKeys = 64;

inline int64_t rows(const DecodeParams& p) { return p.H / p.G * p.T; }
inline int64_t parts(const DecodeParams& p) {
  return p.S <= kPartKeys ? 1 : (p.S + kPartKeys - 1) / kPartKeys;
}
inline int64_t tasks(const DecodeParams& p) { return p.B * p.G * parts(p); }
// Numbers of acc that a thread needs: queries, and a block of keys and values.
inline int64_t scratch_size(const DecodeParams& p) { return (rows(p) + 2 * kBlockKeys) * p.D; }

struct DecodeKernels {
  void (*attend)(const DecodeParams&, void* scratch, int64_t begin, int64_t end);  // tasks
  void (*combine)(const DecodeParams&, int64_t begin, int64_t end);                // B * G, after attend
};

const DecodeKernels& decode_kernels(ElementType type);

extern const DecodeKernels kDecodeBaseline[4];
extern const DecodeKernels kDecodeAvx2[4];
extern const DecodeKernels kDecodeAvx512[4];

}  // namespace mmicl
