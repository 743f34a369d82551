// s = drop(x) aᵀ + bias, and its backward in one pass over x and dx.
//
// Shapes   x, base, dx (M, K); a (R, K); bias (R); s, ds (M, R); da (R, K). R <= kMaxRank.
// Maths    s = (mask * x) aᵀ + bias
//          dx = base + mask * (ds a);  da = dsᵀ (mask * x), parts of rows added in their order
// Traffic  forward x read once; backward x and base read, dx written once. The mask is drawn in
//          registers, once each way.

#include <torch/csrc/stable/library.h>

#include "arguments.h"
#include "blocks.h"

namespace pelt_fast {
namespace {

struct Down {
  Rows<void> x, s;
  const float *a, *bias;  // (K, padded R), (padded R)
  int64_t rows, width, rank;
  ScalarType dtype;
  Mask mask;
};

template <int W, typename T>
PELT_FAST_INLINE void down_one(const Down& g, const Block& block) {
  alignas(64) Tile s;
  const int64_t pad = padded(g.rank);
  for (int i = 0; i < kRows; ++i) std::memcpy(s[i], g.bias, pad * sizeof(float));
  down_block<W, T>(s, g.x, g.a, pad, g.mask, block);
  store_narrow<T>(s, g.s, block, g.rank);
}

// Blocks [first, last).
template <int W>
PELT_FAST_INLINE void down(const Down& g, int64_t first, int64_t last) {
  for (int64_t b = first; b < last; ++b) {
    PELT_FAST_BY_TYPE(g.dtype, down_one<W, T>(g, block_of(b, g.rows, g.width)))
  }
}
PELT_FAST_FOR_EACH_INSTRUCTION_SET(down, Down)

struct DownBackward {
  Rows<void> x, ds, base, dx;  // base and dx may be missing
  const float* a;              // (padded R, padded K)
  float* parts;                // (parts, padded R, padded K), or missing
  int64_t rows, width, rank, part_rows;
  ScalarType dtype;
  Mask mask;
};

template <int W, typename T>
PELT_FAST_INLINE void down_backward_one(const DownBackward& g, float* part, const Block& block) {
  alignas(64) Tile ds;
  load_narrow<T>(ds, g.ds, block, g.rank);
  down_backward_block<W, T>(ds, g.rank, padded(g.rank), g.a, g.base, g.dx, g.x, part, g.mask,
                            block);
}

// Parts [first, last) of the rows.
template <int W>
PELT_FAST_INLINE void down_backward(const DownBackward& g, int64_t first, int64_t last) {
  const int64_t size = padded(g.rank) * padded(g.width);
  for (int64_t p = first; p < last; ++p) {
    float* part = cleared(g.parts, p, size);
    for (int64_t b = p * g.part_rows / kRows; b < end_of_part(p, g.part_rows, g.rows); ++b) {
      PELT_FAST_BY_TYPE(g.dtype, down_backward_one<W, T>(g, part, block_of(b, g.rows, g.width)))
    }
  }
}
PELT_FAST_FOR_EACH_INSTRUCTION_SET(down_backward, DownBackward)

Tensor rank_down_(Tensor s, Tensor x, Tensor a, std::optional<Tensor> bias,
                  std::optional<Tensor> seed, int64_t threshold, double keep_scale) {
  const ScalarType dtype = check_activation("x", x);
  check_rows("x", x, -1, -1, dtype);
  const int64_t rows = x.size(0), width = x.size(1),
                rank = check_rank(s.dim() == 2 ? s.size(1) : 0);
  check_rows("s", s, rows, rank, dtype);
  check_weight("a", a, rank, width);
  check_vector("bias", bias, rank);
  const int64_t pad = padded(rank);
  const Buffer weight = packed(a, true, width, pad), start = packed_vector(bias, pad);
  const Mask mask = mask_of(seed, threshold, keep_scale);
  const Down g{rows_of<void>(x),
               rows_of<void>(s),
               weight.get(),
               start.get(),
               rows,
               width,
               rank,
               dtype,
               mask};
  run(down_for_this_machine, g, blocks_of(rows), 1);
  return s;
}

void rank_down_backward_(Tensor ds, std::optional<Tensor> x, std::optional<Tensor> a,
                         std::optional<Tensor> base, std::optional<Tensor> dx,
                         std::optional<Tensor> da, std::optional<Tensor> seed, int64_t threshold,
                         double keep_scale) {
  const ScalarType dtype = check_activation("ds", ds);
  check_rows("ds", ds, -1, -1, dtype);
  PELT_FAST_CHECK(dx.has_value() == a.has_value(), "a and dx must come together");
  PELT_FAST_CHECK(da.has_value() == x.has_value(), "x and da must come together");
  PELT_FAST_CHECK(dx.has_value() || da.has_value(), "dx or da must be given");
  const int64_t rows = ds.size(0), rank = check_rank(ds.size(1));
  const Tensor& wide_one = dx.has_value() ? *dx : *x;
  const int64_t width = wide_one.dim() == 2 ? wide_one.size(1) : 0;
  if (base.has_value()) check_rows("base", *base, rows, width, dtype);
  const int64_t pad = padded(rank), wide = padded(width), part_rows = rows_of_part(rows, rank);
  const int64_t count = (rows + part_rows - 1) / part_rows;
  const Mask mask = mask_of(seed, threshold, keep_scale);
  DownBackward g{{},   rows_of<void>(ds), {},    {},  nullptr, nullptr, rows, width,
                 rank, part_rows,         dtype, mask};
  Buffer weight, parts;
  if (dx.has_value()) {
    check_rows("dx", *dx, rows, width, dtype);
    check_weight("a", *a, rank, width);
    weight = packed(*a, false, pad, wide);
    g.a = weight.get();
    g.dx = rows_of<void>(*dx);
    if (base.has_value()) g.base = rows_of<void>(*base);
  }
  if (da.has_value()) {
    check_rows("x", *x, rows, width, dtype);
    g.x = rows_of<void>(*x);
    check_weight("da", *da, rank, width);
    PELT_FAST_CHECK(da->is_contiguous(), "da must be contiguous");
    parts = buffer(count * pad * wide);
    g.parts = parts.get();
  }
  run(down_backward_for_this_machine, g, count, 1);
  if (da.has_value()) add_parts(*da, parts.get(), count, pad * wide, wide, 1);
}

}  // namespace
}  // namespace pelt_fast

STABLE_TORCH_LIBRARY_FRAGMENT(pelt_fast_cpp, m) {
  m.def(
      "rank_down_(Tensor(a!) s, Tensor x, Tensor a, Tensor? bias, Tensor? seed, int threshold,"
      " float keep_scale) -> Tensor(a!)");
  m.def(
      "rank_down_backward_(Tensor ds, Tensor? x, Tensor? a, Tensor? base, Tensor(a!)? dx,"
      " Tensor(b!)? da, Tensor? seed, int threshold, float keep_scale) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pelt_fast_cpp, CPU, m) {
  m.impl("rank_down_", TORCH_BOX(&pelt_fast::rank_down_));
  m.impl("rank_down_backward_", TORCH_BOX(&pelt_fast::rank_down_backward_));
}
