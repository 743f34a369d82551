// What the ops on a few rows share: a decoder's step.
#pragma once

#include "arguments.h"

namespace pelt_fast {

constexpr int64_t kMaxFew = 8;  // rows of x: with more, the library's GEMM is as fast

// Rows as fp32 (rows, wide), zeros behind.
template <typename T>
void widen(float* to, const Rows<void>& from, int64_t rows, int64_t columns, int64_t wide) {
  for (int64_t i = 0; i < rows; ++i) {
    const T* row = static_cast<const T*>(from.data) + i * from.stride;
    for (int64_t k = 0; k < columns; ++k) to[i * wide + k] = to_float(row[k]);
    std::fill_n(to + i * wide + columns, wide - columns, 0.0f);
  }
}

inline void check_few(const Tensor& x) {
  PELT_FAST_CHECK(x.size(0) <= kMaxFew, "x must have at most ", kMaxFew, " rows, got ", x.size(0));
}

}  // namespace pelt_fast
