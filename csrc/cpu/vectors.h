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

template <int W>
struct BitsOf {
  typedef uint16_t narrow __attribute__((vector_size(2 * W), aligned(2), may_alias));
  typedef uint32_t wide __attribute__((vector_size(4 * W)));
};

template <int W>
PELT_FAST_INLINE typename BitsOf<W>::wide bits_of(const void* p) {
  return __builtin_convertvector(*static_cast<const typename BitsOf<W>::narrow*>(p),
                                 typename BitsOf<W>::wide);
}

template <typename To, typename From>
PELT_FAST_INLINE To same_bits(const From& from) {
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// W numbers in fp32.
template <int W>
PELT_FAST_INLINE typename VectorOf<W>::type widened(const float* p) {
  return *reinterpret_cast<const typename VectorOf<W>::type*>(p);
}
template <int W>
PELT_FAST_INLINE typename VectorOf<W>::type widened(const BFloat16* p) {
  const typename BitsOf<W>::wide bits = bits_of<W>(p) << 16;
  return same_bits<typename VectorOf<W>::type>(bits);
}
template <int W>
PELT_FAST_INLINE typename VectorOf<W>::type widened(const Half* p) {
  using Bits = typename BitsOf<W>::wide;
  using Vector = typename VectorOf<W>::type;
  const Bits half = bits_of<W>(p), size = (half & 0x7FFF) << 13, sign = (half & 0x8000) << 16;
  const Vector scaled = same_bits<Vector>(size) * 0x1p112f;  // the bias of the exponent, 127 - 15
  const Bits not_finite = same_bits<Bits>(size >= (0x7C00u << 13)) & 0x7F800000;
  const Bits bits = same_bits<Bits>(scaled) | sign | not_finite;
  return same_bits<Vector>(bits);
}

constexpr int kGroup =
    3;  // rows of x in one call of dots: twelve sums of four dots keep both units busy

// sums[row + i][at + r] += Σ x[i] d[r] over `count` numbers, for `rank` rows of d: MR rows of x by
// NR of d at a time. Rows past the last are the last again, and their sums are not kept.
template <int W, int MR, int NR, typename T>
PELT_FAST_INLINE void dots_of(Tile& sums, int64_t row, int64_t rows, int64_t at,
                              const float* const* x, const T* d, int64_t stride, int64_t rank,
                              int64_t count) {
  using Vector = typename VectorOf<W>::type;
  constexpr int kWhole = (MR * NR + W - 1) / W * W;
  const float* left[MR];
  const T* right[NR];
  for (int a = 0; a < MR; ++a) left[a] = x[std::min<int64_t>(a, rows - 1)];
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
        const Vector v = widened<W>(right[b] + k);
        __builtin_prefetch(right[b] + NR * stride + k);  // short rows end before it is foreseen
#pragma GCC unroll 4
        for (int a = 0; a < MR; ++a) sum[b * MR + a] += v * u[a];
      }
    }
    if (k < count) {  // what is left, with zeros behind
      Vector u[MR] = {};
      for (int a = 0; a < MR; ++a) std::memcpy(&u[a], left[a] + k, (count - k) * sizeof(float));
#pragma GCC unroll 16
      for (int b = 0; b < NR; ++b) {
        T rest[W] = {};
        std::memcpy(rest, right[b] + k, (count - k) * sizeof(T));
        const Vector v = widened<W>(rest);
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
        if (a < rows && b < NR && r + b < rank) sums[row + a][at + r + b] += found[i];
      }
    }
  }
}

// The same for at most kGroup rows of x.
template <int W, typename T>
PELT_FAST_INLINE void dots(Tile& sums, int64_t row, int64_t rows, int64_t at, const float* const* x,
                           const T* d, int64_t stride, int64_t rank, int64_t count) {
  if (rows > 1) return dots_of<W, kGroup, 4>(sums, row, rows, at, x, d, stride, rank, count);
  dots_of<W, 1, 8>(sums, row, rows, at, x, d, stride, rank, count);
}

}  // namespace pelt_fast
