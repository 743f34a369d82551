// A piece of a factor transposed: what a thread does once for each method that it has rows of.

#include "routed.h"
#include "vectors.h"

namespace pelt_fast {
namespace {

struct Transposed {
  float* to;
  Piece piece;
  int64_t pad;
};

// Columns [k, k + along) of rows [i, i + W), zeros behind the last row.
template <int W, typename T>
PELT_FAST_INLINE void square(const Transposed& g, const T* from, int64_t i, int64_t k) {
  using Vector = typename VectorOf<W>::type;
  alignas(64) float row[W];
  const int64_t below = g.piece.rows - i, along = std::min<int64_t>(W, g.piece.columns - k);
  Vector v[W];
#pragma GCC unroll 16
  for (int64_t r = 0; r < W; ++r) {
    const T* at = from + (i + r) * g.piece.stride + k;
    if (r >= below) {
      v[r] = Vector{};
    } else if (std::is_same<T, float>::value && along == W) {
      v[r] = *reinterpret_cast<const Vector*>(at);
    } else {
      for (int64_t j = 0; j < W; ++j) row[j] = j < along ? to_float(at[j]) : 0.0f;
      v[r] = *reinterpret_cast<const Vector*>(row);
    }
  }
  transpose<W>(v);
#pragma GCC unroll 16
  for (int64_t j = 0; j < W; ++j)
    if (j < along) *reinterpret_cast<Vector*>(g.to + (k + j) * g.pad + i) = v[j];
}

template <int W>
PELT_FAST_INLINE void transposed(const Transposed& g, int64_t, int64_t) {
  PELT_FAST_BY_TYPE(g.piece.factors.dtype, {
    const T* from = static_cast<const T*>(g.piece.factors.data) + g.piece.from;
    for (int64_t i = 0; i < g.pad; i += W)
      for (int64_t k = 0; k < g.piece.columns; k += W) square<W, T>(g, from, i, k);
  })
}
PELT_FAST_FOR_EACH_INSTRUCTION_SET(transposed, Transposed)

}  // namespace

void transpose_piece(float* to, const Piece& piece, int64_t pad) {
  transposed_for_this_machine({to, piece, pad}, 0, 0);
}

}  // namespace pelt_fast
