// Vectors whose lanes change places: a square of them transposed, the sums of many at once, and the
// dot products that are made of such sums.
#pragma once

#include "tile.h"

namespace pelt_fast {

template <int W>
struct PlacesOf {
  typedef int type __attribute__((vector_size(4 * W)));
};

// Of each 2 x 2 square of pieces H long in a and b, those off the diagonal change places.
template <int W, int H>
PELT_FAST_INLINE void swap_pieces(typename VectorOf<W>::type& a, typename VectorOf<W>::type& b) {
#if defined(__clang__)
  for (int j = 0; j < W; ++j)
    if ((j & H) == 0) {
      const float above = a[j + H];
      a[j + H] = b[j];
      b[j] = above;
    }
#else
  typename PlacesOf<W>::type low = {}, high = {};
#pragma GCC unroll 16
  for (int j = 0; j < W; ++j) {
    low[j] = (j & H) == 0 ? j : W + j - H;
    high[j] = (j & H) == 0 ? j + H : W + j;
  }
  const auto first = a;
  a = __builtin_shuffle(first, b, low);
  b = __builtin_shuffle(first, b, high);
#endif
}

// Rows and columns of W vectors change places.
template <int W, int H = W / 2>
PELT_FAST_INLINE void transpose(typename VectorOf<W>::type (&v)[W]) {
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i)
    if ((i & H) == 0) swap_pieces<W, H>(v[i], v[i + H]);
  if constexpr (H > 1) transpose<W, H / 2>(v);
}

// A vector of the sums of W vectors, each in its lane.
template <int W, int H = W / 2>
PELT_FAST_INLINE typename VectorOf<W>::type sums_of(typename VectorOf<W>::type (&v)[W]) {
#pragma GCC unroll 16
  for (int i = 0; i < H; ++i) {
    swap_pieces<W, H>(v[i], v[i + H]);
    v[i] += v[i + H];
  }
  if constexpr (H > 1) return sums_of<W, H / 2>(v);
  return v[0];
}

constexpr int kGroup =
    3;  // rows of x in one call of dots: twelve sums of four dots keep both units busy

// sums[row + i][r] += Σ x[i] d[r] over `count` numbers, for `rank` rows of d: MR rows of x by NR of d
// at a time. Rows past the last are the last again, and their sums are not kept.
template <int W, int MR, int NR>
PELT_FAST_INLINE void dots_of(Tile& sums, int row, int rows, const float* const* x, const float* d,
                              int64_t stride, int64_t rank, int64_t count) {
  using Vector = typename VectorOf<W>::type;
  constexpr int kWhole = (MR * NR + W - 1) / W * W;
  const float *left[MR], *right[NR];
  for (int a = 0; a < MR; ++a) left[a] = x[std::min(a, rows - 1)];
  for (int64_t r = 0; r < rank; r += NR) {
    for (int b = 0; b < NR; ++b) right[b] = d + std::min<int64_t>(r + b, rank - 1) * stride;
    Vector sum[kWhole] = {};
    int64_t k = 0;
    for (; k + W <= count; k += W) {
      Vector u[MR];
#pragma GCC unroll 4
      for (int a = 0; a < MR; ++a) u[a] = *reinterpret_cast<const Vector*>(left[a] + k);
#pragma GCC unroll 16
      for (int b = 0; b < NR; ++b) {
        const Vector v = *reinterpret_cast<const Vector*>(right[b] + k);
#pragma GCC unroll 4
        for (int a = 0; a < MR; ++a) sum[b * MR + a] += v * u[a];
      }
    }
#pragma GCC unroll 4
    for (int first = 0; first < kWhole; first += W) {
      Vector some[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) some[i] = sum[first + i];
      const Vector found = sums_of<W>(some);
      for (int i = 0; i < W; ++i) {
        const int a = (first + i) % MR, b = (first + i) / MR;
        if (a >= rows || b >= NR || r + b >= rank) continue;
        float rest = found[i];
        for (int64_t j = k; j < count; ++j) rest += left[a][j] * right[b][j];
        sums[row + a][r + b] += rest;
      }
    }
  }
}

// The same for at most kGroup rows of x.
template <int W>
PELT_FAST_INLINE void dots(Tile& sums, int row, int rows, const float* const* x, const float* d,
                           int64_t stride, int64_t rank, int64_t count) {
  if (rows > 1) return dots_of<W, kGroup, 4>(sums, row, rows, x, d, stride, rank, count);
  dots_of<W, 1, 8>(sums, row, rows, x, d, stride, rank, count);
}

}  // namespace pelt_fast
