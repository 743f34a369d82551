// The product of a few rows with a large weight, stored either way: a decoder's step.
//
// Shapes   x (M, K), w (K, N), bias (N) or none, out (M, N); M <= kMaxFew. Rows of x and out are
//          contiguous, and either the rows or the columns of w.
// Maths    out = x w + bias in fp32. Where the rows of w are contiguous: parts of K that the shape
//          alone chooses, added in their order, so that the result is the same on any number of
//          threads. Where its columns are: one dot product for each element of out.
// Traffic  w read once, in the order of its memory. Nothing else is large: K N elements of w are
//          the floor.

#include <torch/csrc/stable/library.h>

#include "few.h"

namespace pelt_fast {
namespace {

constexpr int64_t kDepth = 4;    // rows of w in one pass over rows of sums
constexpr int64_t kSums = 6144;  // sums that stay in the nearest cache for all of these

struct FewRows {
  Rows<void> out, w;  // w: its rows, or its columns
  const void* bias;   // or null
  const float* x;     // (M, K)
  float* parts;       // (parts, M, N)
  int64_t rows, depth, width, part_depth;
  ScalarType dtype;
};

// Rows of w in fp32: themselves, or copied to `to`, whose rows are `pitch` apart.
PELT_FAST_INLINE Rows<const float> wide_rows(const float* w, int64_t stride, float*, int64_t,
                                             int64_t, int64_t) {
  return {w, stride};
}
template <typename T>
PELT_FAST_INLINE Rows<const float> wide_rows(const T* w, int64_t stride, float* to, int64_t pitch,
                                             int64_t count, int64_t columns) {
  for (int64_t i = 0; i < count; ++i)
    for (int64_t j = 0; j < columns; ++j) to[i * pitch + j] = to_float(w[i * stride + j]);
  return {to, pitch};
}

// NR rows of sums += as many of x (kDepth elements each) by kDepth rows of w.
template <int NR>
PELT_FAST_INLINE void add_rows(float* sums, int64_t stride, const float* x, int64_t depth,
                               const Rows<const float>& w, int64_t width) {
  const float *w0 = w.data, *w1 = w0 + w.stride, *w2 = w1 + w.stride, *w3 = w2 + w.stride;
  const float *next_x = x + (NR - 1) * depth, x0 = x[0], x1 = x[1], x2 = x[2], x3 = x[3];
  const float y0 = next_x[0], y1 = next_x[1], y2 = next_x[2], y3 = next_x[3];
  float* next = sums + (NR - 1) * stride;
#pragma GCC ivdep
  for (int64_t j = 0; j < width; ++j) {
    sums[j] += x0 * w0[j] + x1 * w1[j] + x2 * w2[j] + x3 * w3[j];
    if constexpr (NR == 2) next[j] += y0 * w0[j] + y1 * w1[j] + y2 * w2[j] + y3 * w3[j];
  }
}

// sums (M, width) += elements [k, k + count) of x by `count` rows of w. These stay in cache for all
// of x.
PELT_FAST_INLINE void add_depth(float* sums, const FewRows& g, int64_t k, int64_t count,
                                const Rows<const float>& w, int64_t width) {
  const float* x = g.x + k;
  int64_t i = 0;
  if (count == kDepth) {
    for (; i + 2 <= g.rows; i += 2)
      add_rows<2>(sums + i * g.width, g.width, x + i * g.depth, g.depth, w, width);
    for (; i < g.rows; ++i)
      add_rows<1>(sums + i * g.width, g.width, x + i * g.depth, g.depth, w, width);
  }
  for (; i < g.rows; ++i)
    for (int64_t p = 0; p < count; ++p) {
      const float* row = w.data + p * w.stride;
      const float a = x[i * g.depth + p];
#pragma GCC ivdep
      for (int64_t j = 0; j < width; ++j) sums[i * g.width + j] += a * row[j];
    }
}

template <typename T>
PELT_FAST_INLINE void part_of(const FewRows& g, int64_t part) {
  alignas(64) float wide[kDepth * kSums];
  const int64_t first = part * g.part_depth, last = std::min(first + g.part_depth, g.depth);
  float* sums = g.parts + part * g.rows * g.width;
  std::fill_n(sums, g.rows * g.width, 0.0f);
  const int64_t block = kSums / g.rows / kPad * kPad;
  for (int64_t j = 0; j < g.width; j += block)
    for (int64_t k = first; k < last; k += kDepth) {
      const int64_t count = std::min(kDepth, last - k), width = std::min(block, g.width - j);
      const T* from = static_cast<const T*>(g.w.data) + k * g.w.stride + j;
      add_depth(sums + j, g, k, count, wide_rows(from, g.w.stride, wide, block, count, width),
                width);
    }
}

template <int W>
PELT_FAST_INLINE void few_rows(const FewRows& g, int64_t first, int64_t last) {
  for (int64_t part = first; part < last; ++part) {
    PELT_FAST_BY_TYPE(g.dtype, part_of<T>(g, part))
  }
}
PELT_FAST_FOR_EACH_INSTRUCTION_SET(few_rows, FewRows)

// out = bias + the parts, in their order.
template <typename T>
void finish(const FewRows& g, int64_t parts) {
  const auto* start = static_cast<const T*>(g.bias);
  for (int64_t i = 0; i < g.rows; ++i) {
    float* sums = g.parts + i * g.width;
    T* to = static_cast<T*>(g.out.data) + i * g.out.stride;
    for (int64_t p = 1; p < parts; ++p) {
      const float* more = sums + p * g.rows * g.width;
      for (int64_t j = 0; j < g.width; ++j) sums[j] += more[j];
    }
    for (int64_t j = 0; j < g.width; ++j)
      assign(to[j], sums[j] + (start == nullptr ? 0.0f : to_float(start[j])));
  }
}

void by_rows(FewRows& g) {
  const int64_t most = g.rows > 8 ? 8 : 32;  // the parts of many rows take long to add
  g.part_depth = padded(std::max<int64_t>(64, (g.depth + most - 1) / most), kDepth);
  const int64_t parts = std::max<int64_t>(1, (g.depth + g.part_depth - 1) / g.part_depth);
  const Buffer sums = buffer(parts * g.rows * g.width);
  g.parts = sums.get();
  run(few_rows_for_this_machine, g, parts, 1);
  PELT_FAST_BY_TYPE(g.dtype, finish<T>(g, parts))
}

// Units [first, last) of kUnit columns.
template <int W>
PELT_FAST_INLINE void few_columns(const FewRows& g, int64_t begin, int64_t end) {
  alignas(64) Tile sums;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t first = unit * kUnit, count = std::min(kUnit, g.width - first);
    PELT_FAST_BY_TYPE(
        g.dtype, products<W, T>(sums, g.x, g.rows, g.depth, g.w, g.bias, first, count);
        for (int64_t i = 0; i < g.rows; ++i) {
          T* to = static_cast<T*>(g.out.data) + i * g.out.stride + first;
          for (int64_t j = 0; j < count; ++j) assign(to[j], sums[i][j]);
        })
  }
}
PELT_FAST_FOR_EACH_INSTRUCTION_SET(few_columns, FewRows)

void few_rows_product_(Tensor out, Tensor x, Tensor w, std::optional<Tensor> bias) {
  const ScalarType dtype = check_activation("x", x);
  check_rows("x", x, -1, -1, dtype);
  const int64_t rows = x.size(0), depth = x.size(1), width = w.dim() == 2 ? w.size(1) : -1;
  check_few(x);
  PELT_FAST_CHECK(width >= 0 && w.size(0) == depth && w.is_cpu() && w.scalar_type() == dtype &&
                      (w.stride(0) == 1 || w.stride(1) == 1),
                  "w must have shape (", depth,
                  ", N), x's dtype and contiguous rows or columns, got ", shape_of(w));
  check_rows("out", out, rows, width, dtype);
  if (bias.has_value())
    PELT_FAST_CHECK(bias->dim() == 1 && bias->size(0) == width && bias->stride(0) == 1 &&
                        bias->is_cpu() && bias->scalar_type() == dtype,
                    "bias must be contiguous (", width, ") on the CPU with x's dtype, got ",
                    shape_of(*bias));
  FewRows g{};
  g.out = rows_of<void>(out), g.w = rows_of<void>(w);
  g.bias = bias.has_value() ? bias->const_data_ptr() : nullptr;
  g.rows = rows, g.depth = depth, g.width = width, g.dtype = dtype;
  const Buffer wide = buffer(rows * depth);
  PELT_FAST_BY_TYPE(dtype, widen<T>(wide.get(), rows_of<void>(x), rows, depth))
  g.x = wide.get();
  if (w.stride(1) == 1) return by_rows(g);
  g.w.stride = w.stride(1);
  run(few_columns_for_this_machine, g, (width + kUnit - 1) / kUnit, 1);
}

}  // namespace
}  // namespace pelt_fast

STABLE_TORCH_LIBRARY_FRAGMENT(pelt_fast_cpp, m) {
  m.def("few_rows_product_(Tensor(a!) out, Tensor x, Tensor w, Tensor? bias) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pelt_fast_cpp, CPU, m) {
  m.impl("few_rows_product_", TORCH_BOX(&pelt_fast::few_rows_product_));
}
