// A low-rank update of a few rows, over the layer's output: LoRA in a decoder's step.
//
// Shapes   x (M, K), a (R, K), b (N, R), s (M, R), y (M, N); M <= kMaxFew, rows contiguous
// Maths    s = x aᵀ, rounded to x's dtype;  y += scale s bᵀ, summed in fp32
// Traffic  a and b read once, where they are: packing them would cost more than the products.

#include <torch/csrc/stable/library.h>

#include "few_rows.h"

namespace pelt_fast {
namespace {

struct RankFew {
  Rows<void> x, s, y;
  Rows<float> a, b;
  const float* wide;  // x, then s, as fp32 (M, K) and (M, R)
  float scale;
  int64_t rows, depth, width, rank;
  ScalarType dtype;
};

// Columns [first, last) of s.
template <int W, typename T>
PELT_FAST_INLINE void down(const RankFew& g, int64_t first, int64_t last) {
  for (int64_t i = 0; i < g.rows; ++i)
    for (int64_t r = first; r < last; ++r)
      assign(static_cast<T*>(g.s.data)[i * g.s.stride + r],
             dot_of<W>(g.wide + i * g.depth, g.a.data + r * g.a.stride, g.depth));
}

// Columns [first, last) of y.
template <int W, typename T>
PELT_FAST_INLINE void up(const RankFew& g, int64_t first, int64_t last) {
  for (int64_t i = 0; i < g.rows; ++i) {
    T* y = static_cast<T*>(g.y.data) + i * g.y.stride;
    const float* s = g.wide + i * g.rank;
    for (int64_t n = first; n < last; ++n)
      assign(y[n], to_float(y[n]) + g.scale * dot_of<W>(s, g.b.data + n * g.b.stride, g.rank));
  }
}

template <int W>
PELT_FAST_INLINE void few_down(const RankFew& g, int64_t first, int64_t last) {
  PELT_FAST_BY_TYPE(g.dtype, down<W, T>(g, first, last))
}
PELT_FAST_FOR_EACH_INSTRUCTION_SET(few_down, RankFew)

template <int W>
PELT_FAST_INLINE void few_up(const RankFew& g, int64_t first, int64_t last) {
  PELT_FAST_BY_TYPE(g.dtype, up<W, T>(g, first, last))
}
PELT_FAST_FOR_EACH_INSTRUCTION_SET(few_up, RankFew)

int64_t grain(int64_t depth) { return std::max<int64_t>(1, 65536 / std::max<int64_t>(1, depth)); }

void rank_few_rows_(Tensor y, Tensor s, Tensor x, Tensor a, Tensor b, double scale) {
  const ScalarType dtype = check_activation("x", x);
  check_rows("x", x, -1, -1, dtype);
  const int64_t rows = x.size(0), depth = x.size(1), rank = a.dim() == 2 ? a.size(0) : 0;
  PELT_FAST_CHECK(rows <= kMaxFew, "x must have at most ", kMaxFew, " rows, got ", rows);
  check_rows("a", a, rank, depth, ScalarType::Float);
  check_rows("b", b, -1, rank, ScalarType::Float);
  check_rows("s", s, rows, rank, dtype);
  check_rows("y", y, rows, b.size(0), dtype);
  RankFew g{};
  g.x = rows_of<void>(x), g.s = rows_of<void>(s), g.y = rows_of<void>(y);
  g.a = rows_of<float>(a), g.b = rows_of<float>(b);
  g.scale = static_cast<float>(scale), g.dtype = dtype;
  g.rows = rows, g.depth = depth, g.width = b.size(0), g.rank = rank;
  const Buffer wide = buffer(rows * std::max(depth, rank));
  PELT_FAST_BY_TYPE(dtype, widen<T>(wide.get(), g.x, rows, depth, depth))
  g.wide = wide.get();
  run(few_down_for_this_machine, g, rank, grain(rows * depth));
  PELT_FAST_BY_TYPE(dtype, widen<T>(wide.get(), g.s, rows, rank, rank))
  run(few_up_for_this_machine, g, g.width, grain(rows * rank));
}

}  // namespace
}  // namespace pelt_fast

STABLE_TORCH_LIBRARY_FRAGMENT(pelt_fast_cpp, m) {
  m.def(
      "rank_few_rows_(Tensor(a!) y, Tensor(b!) s, Tensor x, Tensor a, Tensor b, float scale)"
      " -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pelt_fast_cpp, CPU, m) {
  m.impl("rank_few_rows_", TORCH_BOX(&pelt_fast::rank_few_rows_));
}
