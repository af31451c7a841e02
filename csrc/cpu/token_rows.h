// Where the rows of a [B, T, C] tensor lie. No torch here.
#pragma once

#include <cstdint>

namespace mmicl {

// The rows of a [B, T, C] tensor, or its row scalars [B, T]. Strides in elements.
template <class Void>
struct TokenRows {
  Void* data = nullptr;
  int64_t stride_b = 0, stride_t = 0;
};
using ConstTokens = TokenRows<const void>;
using MutableTokens = TokenRows<void>;

}  // namespace mmicl
