// Tiles of a tall matrix in fp32, and products of tiles: what every CPU op is made of.
//
// A block of kRows rows is worked on tile by tile, kColumns columns at a time, in fp32 whatever
// the tensor's type. Ranks are padded to kPad with zeros, tiles at the edges with zeros: no
// product has a remainder.
#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "instruction_set.h"
#include "philox.h"

namespace pelt_fast {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

constexpr int kRows = 64;
constexpr int kColumns = 128;
constexpr int kPad = 16;
constexpr int kMaxRank = 128;

using Tile = float[kRows][kColumns];  // ranks fit as well: kMaxRank is kColumns

inline int64_t padded(int64_t n, int64_t to = kPad) { return (n + to - 1) / to * to; }

template <int W>
struct VectorOf {
  typedef float type __attribute__((vector_size(4 * W), aligned(4), may_alias));
};

PELT_FAST_INLINE float to_float(float x) { return x; }
PELT_FAST_INLINE float to_float(Half x) { return static_cast<float>(x); }
PELT_FAST_INLINE float to_float(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.x) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

PELT_FAST_INLINE void assign(float& out, float x) { out = x; }
PELT_FAST_INLINE void assign(Half& out, float x) { out = Half(x); }
PELT_FAST_INLINE void assign(BFloat16& out, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1)) >> 16;
  out.x = static_cast<uint16_t>(x == x ? rounded : 0x7FC0u);
}

// c (MR, NV W) += a (MR, k) b (k, NV W), or aᵀ where a lies as (k, MR). The product is summed from
// zero and then added: a long sum over many blocks rounds once a block, not once a row.
template <int W, int MR, int NV, bool Transposed>
PELT_FAST_INLINE void micro(float* c, int64_t ldc, const float* a, int64_t lda, const float* b,
                            int64_t ldb, int64_t k) {
  using Vector = typename VectorOf<W>::type;
  Vector sum[MR][NV];
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) sum[i][v] = Vector{};
  for (int64_t p = 0; p < k; ++p) {
    Vector row[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) row[v] = *reinterpret_cast<const Vector*>(b + p * ldb + v * W);
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
      const float factor = Transposed ? a[p * lda + i] : a[i * lda + p];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) sum[i][v] += factor * row[v];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) *reinterpret_cast<Vector*>(c + i * ldc + v * W) += sum[i][v];
}

// Columns [first, n) of the product that fill panels of NV vectors; returns where it stopped.
template <int W, int MR, int NV, bool Transposed>
PELT_FAST_INLINE int64_t panels(int64_t first, float* c, int64_t ldc, const float* a, int64_t lda,
                                const float* b, int64_t ldb, int64_t m, int64_t n, int64_t k) {
  for (; first + NV * W <= n; first += NV * W)
    for (int64_t i = 0; i < m; i += MR)
      micro<W, MR, NV, Transposed>(c + i * ldc + first, ldc, Transposed ? a + i : a + i * lda, lda,
                                   b + first, ldb, k);
  return first;
}

// c (m, n) += a (m, k) b (k, n); m a multiple of 8, n of kPad.
template <int W, bool Transposed = false>
PELT_FAST_INLINE void product(float* c, int64_t ldc, const float* a, int64_t lda, const float* b,
                              int64_t ldb, int64_t m, int64_t n, int64_t k) {
  int64_t at = 0;
  if (W == 16) at = panels<W, 4, 4, Transposed>(at, c, ldc, a, lda, b, ldb, m, n, k);
  at = panels<W, W == 16 ? 8 : 4, 2, Transposed>(at, c, ldc, a, lda, b, ldb, m, n, k);
  panels<W, 8, 1, Transposed>(at, c, ldc, a, lda, b, ldb, m, n, k);
}

// Runs the call with T the type of `dtype`: float32, bfloat16, else float16 (check_activation).
#define PELT_FAST_BY_TYPE(dtype, ...)                                \
  if ((dtype) == ::torch::headeronly::ScalarType::Float) {           \
    using T = float;                                                 \
    __VA_ARGS__;                                                     \
  } else if ((dtype) == ::torch::headeronly::ScalarType::BFloat16) { \
    using T = ::pelt_fast::BFloat16;                                 \
    __VA_ARGS__;                                                     \
  } else {                                                           \
    using T = ::pelt_fast::Half;                                     \
    __VA_ARGS__;                                                     \
  }

// A tensor of rows, the last dimension contiguous.
template <typename T>
struct Rows {
  T* data;
  int64_t stride;
};

// Zeros behind the columns up to kPad, and in the rows behind.
template <typename T>
PELT_FAST_INLINE void load(Tile& tile, const T* x, int64_t stride, int rows, int columns) {
  const auto pad = static_cast<int>(padded(columns));
  for (int i = 0; i < kRows; ++i) {
    const int width = i < rows ? columns : 0;
    for (int j = 0; j < width; ++j) tile[i][j] = to_float(x[i * stride + j]);
    for (int j = width; j < pad; ++j) tile[i][j] = 0;
  }
}

PELT_FAST_INLINE void clear(Tile& tile, int64_t columns, int64_t rows = kRows) {
  for (int64_t i = 0; i < rows; ++i) std::memset(tile[i], 0, columns * sizeof(float));
}

// 0 or 1 / (1 - p) for kColumns elements of row `row` of a tensor `width` wide, from `column` on.
PELT_FAST_INLINE void draw_row(float* to, const Mask& mask, int64_t width, int64_t row,
                               int64_t column) {
  uint16_t lanes[2 * kColumns];
  const auto threshold = static_cast<uint16_t>(mask.threshold);
  const float kept = mask.scale;
  const uint64_t start = static_cast<uint64_t>(row) * width + column;
  const int skip = static_cast<int>(start % kLanes);
  if (skip == 0) {
    draw_lanes<kColumns / kLanes>(mask.seed, start / kLanes, lanes);
  } else {
    draw_lanes<2 * kColumns / kLanes>(mask.seed, start / kLanes, lanes);
  }
  const uint16_t* from = lanes + skip;
#pragma GCC unroll 1
  for (int j = 0; j < kColumns; ++j) to[j] = from[j] >= threshold ? kept : 0.0f;
}

PELT_FAST_INLINE void multiply(Tile& tile, const Tile& factor, int rows) {
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < kColumns; ++j) tile[i][j] *= factor[i][j];
}

// out = base + tile, or tile alone.
template <typename T>
PELT_FAST_INLINE void store(const Tile& tile, const T* base, int64_t base_stride, T* out,
                            int64_t stride, int rows, int columns) {
  for (int i = 0; i < rows; ++i) {
    T* place = out + i * stride;
    if (base == nullptr) {
      for (int j = 0; j < columns; ++j) assign(place[j], tile[i][j]);
    } else {
      const T* from = base + i * base_stride;
#pragma GCC ivdep
      for (int j = 0; j < columns; ++j) assign(place[j], to_float(from[j]) + tile[i][j]);
    }
  }
}

// out = base + start in every row; either may be missing.
PELT_FAST_INLINE void begin(float* out, int64_t stride, const float* base, int64_t base_stride,
                            const float* start, int rows, int columns) {
  if (base == out && start == nullptr) return;
  for (int i = 0; i < rows; ++i) {
    float* row = out + i * stride;
    const float* from = base == nullptr ? start : base + i * base_stride;
    if (from == nullptr) {
      std::memset(row, 0, columns * sizeof(float));
    } else if (base == nullptr || start == nullptr) {
      std::memcpy(row, from, columns * sizeof(float));
    } else {
#pragma GCC ivdep
      for (int j = 0; j < columns; ++j) row[j] = from[j] + start[j];
    }
  }
}

// Sum and maximum of a row of n floats, n a multiple of kPad, in vectors: in the order written no
// compiler would.
template <int W>
PELT_FAST_INLINE float sum_of(const float* row, int64_t n) {
  using Vector = typename VectorOf<W>::type;
  Vector total = {};
  for (int64_t j = 0; j < n; j += W) total += *reinterpret_cast<const Vector*>(row + j);
  float sum = 0;
  for (int j = 0; j < W; ++j) sum += total[j];
  return sum;
}

// sums[j] += the sum of a tile's column j, from zero.
template <int W>
PELT_FAST_INLINE void add_columns(float* sums, const Tile& tile, int rows, int64_t columns) {
  using Vector = typename VectorOf<W>::type;
  for (int64_t j = 0; j < columns; j += W) {
    Vector total = {};
    for (int i = 0; i < rows; ++i) total += *reinterpret_cast<const Vector*>(&tile[i][j]);
    *reinterpret_cast<Vector*>(sums + j) += total;
  }
}

template <int W>
PELT_FAST_INLINE float most_of(const float* row, int64_t n) {
  using Vector = typename VectorOf<W>::type;
  Vector most = *reinterpret_cast<const Vector*>(row);
  for (int64_t j = W; j < n; j += W) {
    const Vector next = *reinterpret_cast<const Vector*>(row + j);
    most = next > most ? next : most;
  }
  float highest = most[0];
  for (int j = 1; j < W; ++j) highest = most[j] > highest ? most[j] : highest;
  return highest;
}

template <int W>
PELT_FAST_INLINE float dot(const float* a, const float* b, int64_t n) {
  using Vector = typename VectorOf<W>::type;
  Vector total = {};
  for (int64_t j = 0; j < n; j += W)
    total += *reinterpret_cast<const Vector*>(a + j) * *reinterpret_cast<const Vector*>(b + j);
  float sum = 0;
  for (int j = 0; j < W; ++j) sum += total[j];
  return sum;
}

// Rows that one partial sum covers: of the shape alone, never of the threads, so that sums are the
// same on any number of them.
inline int64_t rows_of_part(int64_t rows, int64_t rank) {
  return padded(std::max<int64_t>({512, 4 * rank, (rows + 63) / 64}), kRows);
}

}  // namespace pelt_fast
