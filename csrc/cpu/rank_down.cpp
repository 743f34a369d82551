// s = drop(x) aᵀ + bias, and its backward in one pass over x and dx.
//
// Shapes   x, base, dx (M, K); a (R, K); bias (R); s, ds (M, R); da (R, K). R <= kMaxRank.
// Maths    s = (mask * x) aᵀ + bias
//          dx = base + mask * (ds a);  da = dsᵀ (mask * x), parts of rows added in their order
// Traffic  forward x read once; backward x and base read, dx written once. The mask is drawn in
//          registers, once each way.

#include <torch/csrc/stable/library.h>

#include "arguments.h"

namespace pelt_fast {
namespace {

struct Down {
  Rows<void> x, s;
  const float *a, *bias;  // (K, padded R), (padded R)
  int64_t rows, width, rank;
  ScalarType dtype;
  bool drop;
  Mask mask;
};

template <int W, typename T>
PELT_FAST_INLINE void down_blocks(const Down& g, int64_t first, int64_t last) {
  alignas(64) Tile s, tile, factor;
  const int64_t pad = padded(g.rank);
  for (int64_t row = first * kRows; row < std::min(last * kRows, g.rows); row += kRows) {
    const int rows = static_cast<int>(std::min<int64_t>(kRows, g.rows - row));
    for (int i = 0; i < kRows; ++i) std::memcpy(s[i], g.bias, pad * sizeof(float));
    for (int64_t column = 0; column < g.width; column += kColumns) {
      const int columns = static_cast<int>(std::min<int64_t>(kColumns, g.width - column));
      const T* x = static_cast<const T*>(g.x.data) + row * g.x.stride + column;
      const float *from = &tile[0][0], *a = g.a + column * pad;
      int64_t stride = kColumns;
      if (std::is_same<T, float>::value && !g.drop && rows == kRows) {
        from = reinterpret_cast<const float*>(x);
        stride = g.x.stride;
      } else {
        load(tile, x, g.x.stride, rows, columns);
        if (g.drop) {
          draw(factor, g.mask, g.width, row, column, rows);
          multiply(tile, factor, rows);
        }
      }
      product<W>(&s[0][0], kColumns, from, stride, a, pad, kRows, pad, columns);
    }
    store<T>(s, nullptr, 0, static_cast<T*>(g.s.data) + row * g.s.stride, g.s.stride, rows,
             static_cast<int>(g.rank));
  }
}

template <int W>
PELT_FAST_INLINE void down(const Down& g, int64_t first, int64_t last) {
  PELT_FAST_BY_TYPE(g.dtype, down_blocks<W, T>(g, first, last))
}
PELT_FAST_AT_LEVEL(down, Down)

struct DownBackward {
  Rows<void> x, ds, base, dx;  // base and dx may be missing
  const float* a;              // (padded R, padded K)
  float* parts;                // (parts, padded R, padded K), or missing
  int64_t rows, width, rank, part_rows;
  ScalarType dtype;
  bool drop;
  Mask mask;
};

template <int W, typename T>
PELT_FAST_INLINE void down_backward_block(const DownBackward& g, int64_t row, float* part) {
  alignas(64) Tile ds, tile, factor;
  const int64_t pad = padded(g.rank), wide = padded(g.width);
  const int rows = static_cast<int>(std::min<int64_t>(kRows, g.rows - row));
  load(ds, static_cast<const T*>(g.ds.data) + row * g.ds.stride, g.ds.stride, rows,
       static_cast<int>(g.rank));
  for (int64_t column = 0; column < g.width; column += kColumns) {
    const int columns = static_cast<int>(std::min<int64_t>(kColumns, g.width - column));
    const int64_t whole = padded(columns);
    if (g.drop) draw(factor, g.mask, g.width, row, column, rows);
    const T* base = static_cast<const T*>(g.base.data);
    if (base != nullptr) base += row * g.base.stride + column;
    T* dx = static_cast<T*>(g.dx.data);
    if (dx != nullptr) dx += row * g.dx.stride + column;
    if (dx != nullptr && fits_in_place<T>(rows, columns) && !g.drop) {
      auto* place = reinterpret_cast<float*>(dx);
      begin(place, g.dx.stride, reinterpret_cast<const float*>(base), g.base.stride, nullptr,
            columns);
      product<W>(place, g.dx.stride, &ds[0][0], kColumns, g.a + column, wide, kRows, whole, g.rank);
    } else if (dx != nullptr) {
      clear(tile, whole);
      product<W>(&tile[0][0], kColumns, &ds[0][0], kColumns, g.a + column, wide, kRows, whole,
                 g.rank);
      if (g.drop) multiply(tile, factor, rows);
      store<T>(tile, base, g.base.stride, dx, g.dx.stride, rows, columns);
    }
    if (part != nullptr) {
      load(tile, static_cast<const T*>(g.x.data) + row * g.x.stride + column, g.x.stride, rows,
           columns);
      if (g.drop) multiply(tile, factor, rows);
      product<W, true>(part + column, wide, &ds[0][0], kColumns, &tile[0][0], kColumns, pad, whole,
                       rows);
    }
  }
}

template <int W>
PELT_FAST_INLINE void down_backward(const DownBackward& g, int64_t first, int64_t last) {
  const int64_t size = padded(g.rank) * padded(g.width);
  for (int64_t p = first; p < last; ++p) {
    float* part = g.parts == nullptr ? nullptr : g.parts + p * size;
    if (part != nullptr) std::fill_n(part, size, 0.0f);
    const int64_t end = std::min((p + 1) * g.part_rows, g.rows);
    for (int64_t row = p * g.part_rows; row < end; row += kRows) {
      PELT_FAST_BY_TYPE(g.dtype, down_backward_block<W, T>(g, row, part))
    }
  }
}
PELT_FAST_AT_LEVEL(down_backward, DownBackward)

Tensor rank_down_(Tensor s, Tensor x, Tensor a, std::optional<Tensor> bias,
                  std::optional<Tensor> seed, int64_t threshold, double keep_scale) {
  const ScalarType dtype = check_activation("x", x);
  check_rows("x", x, -1, -1, dtype);
  const int64_t rows = x.size(0), width = x.size(1), rank = check_rank(s.dim() == 2 ? s.size(1) : 0);
  check_rows("s", s, rows, rank, dtype);
  check_weight("a", a, rank, width);
  check_vector("bias", bias, rank);
  const int64_t pad = padded(rank);
  const Buffer weight = packed(a, true, width, pad), start = packed_vector(bias, pad);
  const Mask mask = mask_of(seed, threshold, keep_scale);
  const Down g{rows_of<void>(x), rows_of<void>(s), weight.get(), start.get(), rows, width, rank,
               dtype, mask.threshold > 0, mask};
  run(down_at_level, g, (rows + kRows - 1) / kRows, 1);
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
  DownBackward g{{}, rows_of<void>(ds), {}, {}, nullptr, nullptr, rows, width, rank,
                 part_rows, dtype, mask.threshold > 0, mask};
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
  run(down_backward_at_level, g, count, 1);
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
