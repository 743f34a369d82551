// Products of a few rows: what they share.
#pragma once

#include "arguments.h"

namespace pelt_fast {

constexpr int64_t kMaxFew = 8;  // rows of x: with more, the library's GEMM is as fast

// Σ a b over n elements: four sums, so that no addition waits for the one before.
template <int W>
PELT_FAST_INLINE float dot_of(const float* a, const float* b, int64_t n) {
  using Vector = typename VectorOf<W>::type;
  Vector total[4] = {};
  int64_t j = 0;
  for (; j + 4 * W <= n; j += 4 * W)
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v)
      total[v] += *reinterpret_cast<const Vector*>(a + j + v * W) *
                  *reinterpret_cast<const Vector*>(b + j + v * W);
  for (; j + W <= n; j += W)
    total[0] += *reinterpret_cast<const Vector*>(a + j) * *reinterpret_cast<const Vector*>(b + j);
  total[0] += total[1] + (total[2] + total[3]);
  float sum = 0;
  for (int i = 0; i < W; ++i) sum += total[0][i];
  for (; j < n; ++j) sum += a[j] * b[j];
  return sum;
}

// Rows as fp32 (rows, wide), zeros behind.
template <typename T>
void widen(float* to, const Rows<void>& from, int64_t rows, int64_t columns, int64_t wide) {
  for (int64_t i = 0; i < rows; ++i) {
    const T* row = static_cast<const T*>(from.data) + i * from.stride;
    for (int64_t k = 0; k < columns; ++k) to[i * wide + k] = to_float(row[k]);
    std::fill_n(to + i * wide + columns, wide - columns, 0.0f);
  }
}

}  // namespace pelt_fast
