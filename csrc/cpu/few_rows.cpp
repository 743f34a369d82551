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

constexpr int64_t kMostParts = 32;
constexpr int64_t kDepth = 4;     // rows of w in one pass over a row of sums
constexpr int64_t kOutputs = 16;  // dot products in one unit of work

struct FewRows {
  Rows<void> x, w, out;  // w: its rows, or its columns
  const void* bias;      // or null
  float* parts;          // (parts, M, N)
  const float* wide_x;   // (M, padded K) as fp32, zeros behind
  int64_t rows, depth, width, part_depth;
  ScalarType dtype;
};

// sums (N) += the product of x's elements [first, last) with the same rows of w.
template <typename T>
PELT_FAST_INLINE void add_rows(float* sums, const T* x, const Rows<void>& w, int64_t first,
                               int64_t last, int64_t width) {
  int64_t k = first;
  for (; k + kDepth <= last; k += kDepth) {
    const T* row = static_cast<const T*>(w.data) + k * w.stride;
    const T *second = row + w.stride, *third = second + w.stride, *fourth = third + w.stride;
    const float a = to_float(x[k]), b = to_float(x[k + 1]), c = to_float(x[k + 2]),
                d = to_float(x[k + 3]);
#pragma GCC ivdep
    for (int64_t j = 0; j < width; ++j)
      sums[j] += a * to_float(row[j]) + b * to_float(second[j]) + c * to_float(third[j]) +
                 d * to_float(fourth[j]);
  }
  for (; k < last; ++k) {
    const T* row = static_cast<const T*>(w.data) + k * w.stride;
    const float a = to_float(x[k]);
#pragma GCC ivdep
    for (int64_t j = 0; j < width; ++j) sums[j] += a * to_float(row[j]);
  }
}

template <typename T>
PELT_FAST_INLINE void part_of(const FewRows& g, int64_t part) {
  const int64_t first = part * g.part_depth, last = std::min(first + g.part_depth, g.depth);
  float* sums = g.parts + part * g.rows * g.width;
  std::fill_n(sums, g.rows * g.width, 0.0f);
  for (int64_t k = first; k < last;
       k += kDepth)  // these rows of w stay in cache for every row of x
    for (int64_t i = 0; i < g.rows; ++i)
      add_rows(sums + i * g.width, static_cast<const T*>(g.x.data) + i * g.x.stride, g.w, k,
               std::min(k + kDepth, last), g.width);
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
  g.part_depth = padded(std::max<int64_t>(64, (g.depth + kMostParts - 1) / kMostParts), kDepth);
  const int64_t parts = std::max<int64_t>(1, (g.depth + g.part_depth - 1) / g.part_depth);
  const Buffer sums = buffer(parts * g.rows * g.width);
  g.parts = sums.get();
  run(few_rows_for_this_machine, g, parts, 1);
  PELT_FAST_BY_TYPE(g.dtype, finish<T>(g, parts))
}

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

// Column j of w by every row of x.
template <int W, typename T>
PELT_FAST_INLINE void dots(const FewRows& g, int64_t j) {
  alignas(64) float block[kColumns];
  float sums[kMaxFew] = {};
  const T* column = static_cast<const T*>(g.w.data) + j * g.w.stride;
  const int64_t wide = padded(g.depth);
  for (int64_t k = 0; k < g.depth; k += kColumns) {
    const int64_t count = std::min<int64_t>(kColumns, g.depth - k), whole = padded(count);
    const float* from = block;
    if (std::is_same<T, float>::value && whole == count) {
      from = reinterpret_cast<const float*>(column + k);
    } else {
      for (int64_t p = 0; p < count; ++p) block[p] = to_float(column[k + p]);
      for (int64_t p = count; p < whole; ++p) block[p] = 0;
    }
    for (int64_t i = 0; i < g.rows; ++i) sums[i] += dot_of<W>(from, g.wide_x + i * wide + k, whole);
  }
  const auto* bias = static_cast<const T*>(g.bias);
  for (int64_t i = 0; i < g.rows; ++i)
    assign(static_cast<T*>(g.out.data)[i * g.out.stride + j],
           sums[i] + (bias == nullptr ? 0.0f : to_float(bias[j])));
}

// Units [first, last) of kOutputs columns.
template <int W>
PELT_FAST_INLINE void few_columns(const FewRows& g, int64_t first, int64_t last) {
  const int64_t end = std::min(last * kOutputs, g.width);
  for (int64_t j = first * kOutputs; j < end; ++j) {
    PELT_FAST_BY_TYPE(g.dtype, dots<W, T>(g, j))
  }
}
PELT_FAST_FOR_EACH_INSTRUCTION_SET(few_columns, FewRows)

void by_columns(FewRows& g) {
  const Buffer wide = buffer(g.rows * padded(g.depth));
  PELT_FAST_BY_TYPE(g.dtype, widen<T>(wide.get(), g.x, g.rows, g.depth, padded(g.depth)))
  g.wide_x = wide.get();
  run(few_columns_for_this_machine, g, (g.width + kOutputs - 1) / kOutputs, 1);
}

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
  g.x = rows_of<void>(x), g.out = rows_of<void>(out), g.w = rows_of<void>(w);
  g.bias = bias.has_value() ? bias->const_data_ptr() : nullptr;
  g.rows = rows, g.depth = depth, g.width = width, g.dtype = dtype;
  if (w.stride(1) == 1) return by_rows(g);
  g.w.stride = w.stride(1);
  by_columns(g);
}

}  // namespace
}  // namespace pelt_fast

STABLE_TORCH_LIBRARY_FRAGMENT(pelt_fast_cpp, m) {
  m.def("few_rows_product_(Tensor(a!) out, Tensor x, Tensor w, Tensor? bias) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pelt_fast_cpp, CPU, m) {
  m.impl("few_rows_product_", TORCH_BOX(&pelt_fast::few_rows_product_));
}
