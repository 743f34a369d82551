// What the ops on a few rows share: a decoder's step.
#pragma once

#include "arguments.h"
#include "vectors.h"

namespace pelt_fast {

constexpr int64_t kMaxFew = 32;  // rows of x; passes.py says how many are worth it
constexpr int64_t kUnit = 16;    // rows of a weight in one unit of work

// Rows as contiguous fp32.
template <typename T>
void widen(float* to, const Rows<void>& from, int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows; ++i) {
    const T* row = static_cast<const T*>(from.data) + i * from.stride;
    for (int64_t k = 0; k < columns; ++k) to[i * columns + k] = to_float(row[k]);
  }
}

constexpr int64_t kNear = 4096;  // bytes of a row of w; a strip of rows stays in the nearest cache

// sums (rows, count) = x (rows, depth) by rows [first, first + count) of w, and the bias.
template <int W, typename T>
PELT_FAST_INLINE void products(Tile& sums, const float* x, int64_t rows, int64_t depth,
                               const Rows<void>& w, const void* bias, int64_t first,
                               int64_t count) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < count; ++j)
      sums[i][j] = bias == nullptr ? 0.0f : to_float(static_cast<const T*>(bias)[first + j]);
  const int64_t strip = rows == 1 ? 8 : 4;  // as dots takes them
  const int64_t part = rows > kGroup ? kNear / sizeof(T) : std::max<int64_t>(depth, 1);
  for (int64_t j = 0; j < count; j += strip)
    for (int64_t k = 0; k < depth; k += part) {
      const T* d = static_cast<const T*>(w.data) + (first + j) * w.stride + k;
      const int64_t some = std::min(strip, count - j), columns = std::min(part, depth - k);
      for (int64_t i = 0; i < rows; i += kGroup) {
        const int64_t many = std::min<int64_t>(kGroup, rows - i);
        const float* left[kGroup];
        for (int64_t a = 0; a < many; ++a) left[a] = x + (i + a) * depth + k;
        dots<W>(sums, i, many, j, left, d, w.stride, some, columns);
      }
    }
}

inline void check_few(const Tensor& x) {
  PELT_FAST_CHECK(x.size(0) <= kMaxFew, "x must have at most ", kMaxFew, " rows, got ", x.size(0));
}

}  // namespace pelt_fast
