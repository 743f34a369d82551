// Low-rank updates of many methods in one batch, forward: each row under its own method, or none.
//
// Shapes   x (M, K); down: the D_g (R_g, K) below each other, biases (sum R_g); t (M, at least every
//          R_g); base, out (M, N); up: the U_g (N, R_g), each flattened, behind each other, biases
//          (G, N); segments (S, 4): first row, rows, method, first row in the mask. R_g <= kMaxRank;
//          rows of a method with a higher rank or none are as rows of none.
// Maths    t = (mask_g * x) D_gᵀ + d_g;  out = base + s_g (h U_gᵀ + u_g), h = mask_g * f(t)
//          out = base in rows of none; t is not written there, nor behind R_g.
// Traffic  x read once; base read and out written once, whatever the number of methods. Besides, each
//          D_g and U_g of a method that has rows is read once: (K + N) sum R_g elements. D_g is read
//          as it lies; a thread that has rows of the method transposes U_g. 2 M R (K + N) flops.

#include <torch/csrc/stable/library.h>

#include "bottleneck.h"
#include "routed.h"
#include "vectors.h"

namespace pelt_fast {
namespace {

constexpr Mask kWhole{};         // drops nothing
constexpr int64_t kFewRows = 8;  // of a method: U_g is read as it lies, never transposed
constexpr int64_t kDepth = 1024;

// Columns of x and D_g at a time: few enough that those of D_g stay in the second cache.
inline int64_t depth_of(int64_t rank) { return rank > 64 ? kDepth / 2 : kDepth; }

struct Down {
  Rows<void> x, t;
  Factors down, biases;  // biases may be missing
  int64_t width;
  ScalarType dtype;
  const Plan* plan;
  const Masks* masks;
};

// Columns [first, first + count) of row i of a block as fp32, dropped out.
template <typename T>
PELT_FAST_INLINE const float* wide_row(float* to, const Rows<void>& x, const Mask& mask,
                                       const Block& block, int i, int64_t first, int64_t count) {
  const T* row = place<T>(x, block.row_of(i), first);
  if (std::is_same<T, float>::value && mask.threshold == 0)
    return reinterpret_cast<const float*>(row);
  for (int64_t k = 0; k < count; ++k) to[k] = to_float(row[k]);
  if (mask.threshold == 0) return to;
  alignas(64) float factor[kColumns];
  for (int64_t done = 0; done < count; done += kColumns) {
    draw_row(factor, mask, block.width, block.drawn_of(i), first + done);
    for (int64_t j = 0; j < std::min<int64_t>(kColumns, count - done); ++j)
      to[done + j] *= factor[j];
  }
  return to;
}

// t = drop(x) D_gᵀ + start for a block: dot products of rows as they lie, so that nothing is packed.
template <int W, typename T>
PELT_FAST_INLINE void down_one(const Down& g, int number, const float* start, const float* weight,
                               const Block& block) {
  alignas(64) Tile s;
  alignas(64) float wide[kGroup][kDepth];
  const int64_t rank = g.plan->methods[number].rank, depth = depth_of(rank);
  const Mask mask = g.masks->of(number);
  for (int i = 0; i < block.rows; ++i) std::memcpy(s[i], start, rank * sizeof(float));
  for (int64_t first = 0; first < g.width; first += depth) {
    const int64_t count = std::min(depth, g.width - first);
    for (int i = 0; i < block.rows; i += kGroup) {
      const float* x[kGroup];
      const int rows = std::min(kGroup, block.rows - i);
      for (int a = 0; a < rows; ++a)
        x[a] = wide_row<T>(wide[a], g.x, mask, block, i + a, first, count);
      dots<W>(s, i, rows, 0, x, weight + first, g.width, rank, count);
    }
  }
  store_narrow<T>(s, g.t, block, rank);
}

// Tasks [first, last), a block each.
template <int W>
PELT_FAST_INLINE void routed_down(const Down& g, int64_t first, int64_t last) {
  const Plan& plan = *g.plan;
  const Buffer scratch = buffer(g.down.dtype == ScalarType::Float ? 0 : plan.most_rank * g.width);
  alignas(64) float start[kMaxRank];
  const float* weight = nullptr;
  int current = -1;
  for (int64_t i = first; i < last; ++i) {
    const Task& task = plan.tasks[i];
    if (task.method != current) {
      const Method& method = plan.methods[current = task.method];
      std::fill_n(start, method.rank, 0.0f);
      if (g.biases.data != nullptr) widen(start, g.biases, method.first, method.rank);
      const int64_t from = method.first * g.width;
      weight = upright(scratch.get(), g.down, from, method.rank, g.width, g.width);
    }
    const Block& block = plan.blocks[task.first];
    PELT_FAST_BY_TYPE(g.dtype, down_one<W, T>(g, current, start, weight, block))
  }
}
PELT_FAST_FOR_EACH_INSTRUCTION_SET(routed_down, Down)

struct Up {
  Rows<void> base, out, t;
  Factors up, biases;  // biases may be missing
  int64_t width;
  ScalarType dtype;
  Activation activation;
  const Plan* plan;
  const Masks* masks;
  const double* scales;
};

template <typename T>
PELT_FAST_INLINE void copy_rows(const Rows<void>& from, const Rows<void>& to, const Block& block) {
  for (int i = 0; i < block.rows; ++i)
    std::memcpy(place<T>(to, block.row + i, 0), place<T>(from, block.row + i, 0),
                block.width * sizeof(T));
}

// out = base + h U_gᵀ + start;  `weight` gets U_g transposed, a tile of columns behind the other,
// each just before its first product.
template <int W, typename T>
PELT_FAST_INLINE void up_one(const Up& g, const Method& method, const Tile& h, const float* start,
                             float* weight, bool is_packed, const Block& block) {
  for (int64_t column = 0; column < g.width; column += kColumns) {
    const int columns = block.columns(column);
    const int64_t wide = padded(columns), from = method.first * g.width + column * method.rank;
    float* b = weight + column * method.rank;
    if (!is_packed) transpose_piece(b, {g.up, from, method.rank, columns, method.rank}, wide);
    up_tile<W, T>(h, method.rank, b, wide, start == nullptr ? nullptr : start + column, g.base,
                  g.out, kWhole, block, column);
  }
}

// The same for at most kFewRows rows: U_g is read as it lies, W of its rows at a time.
template <int W, typename T>
PELT_FAST_INLINE void up_few(const Up& g, const Method& method, const Tile& h, const float* start,
                             float* weight, const Block& block) {
  using Vector = typename VectorOf<W>::type;
  const int64_t wide = padded(method.rank, W);
  for (int64_t n = 0; n < g.width; n += W) {
    const int64_t count = std::min<int64_t>(W, g.width - n);
    const float* u =
        upright(weight, g.up, method.first * g.width + n * method.rank, count, method.rank, wide);
    for (int i = 0; i < block.rows; ++i) {
      Vector sum[W] = {};
      for (int64_t r = 0; r < wide; r += W) {
        const Vector left = *reinterpret_cast<const Vector*>(h[i] + r);
#pragma GCC unroll 16
        for (int v = 0; v < W; ++v)
          sum[v] += left * *reinterpret_cast<const Vector*>(
                               u + std::min<int64_t>(v, count - 1) * wide + r);
      }
      const Vector found = sums_of<W>(sum);
      const T* from = place<T>(g.base, block.row_of(i), n);
      T* to = place<T>(g.out, block.row_of(i), n);
      for (int64_t j = 0; j < count; ++j)
        assign(to[j], to_float(from[j]) + (found[j] + (start == nullptr ? 0.0f : start[n + j])));
    }
  }
}

// A block of a method; `is_packed` says what `weight` holds.
template <int W, typename T>
PELT_FAST_INLINE void up_block_of(const Up& g, int number, const float* start, float* weight,
                                  bool is_packed, const Block& block) {
  alignas(64) Tile h;
  const Method& method = g.plan->methods[number];
  const Mask mask = g.masks->of(number);
  load_narrow<T>(h, g.t, block, method.rank);
  if (g.activation != Activation::identity || mask.threshold > 0)
    bottleneck(g.activation, mask, h, nullptr, method.rank, block);
  scale_rows(h, padded(method.rank), static_cast<float>(g.scales[number]));
  if (method.rows <= kFewRows) {
    up_few<W, T>(g, method, h, start, weight, block);
  } else {
    up_one<W, T>(g, method, h, start, weight, is_packed, block);
  }
}

// Tasks [first, last), a block each.
template <int W>
PELT_FAST_INLINE void routed_up(const Up& g, int64_t first, int64_t last) {
  const Plan& plan = *g.plan;
  const int64_t wide = padded(g.width);
  const Buffer scratch = buffer(wide * (padded(plan.most_rank) + 1));
  float *added = scratch.get(), *weight = added + wide;
  const float* start = g.biases.data == nullptr ? nullptr : added;
  int current = -1;
  for (int64_t i = first; i < last; ++i) {
    const Task& task = plan.tasks[i];
    const Block& block = plan.blocks[task.first];
    if (task.method < 0) {
      PELT_FAST_BY_TYPE(g.dtype, copy_rows<T>(g.base, g.out, block))
      continue;
    }
    const bool is_packed = task.method == current;
    if (!is_packed && start != nullptr) {
      const auto scale = static_cast<float>(g.scales[task.method]);
      widen(added, g.biases, task.method * g.width, g.width, scale);
      std::fill_n(added + g.width, wide - g.width, 0.0f);
    }
    current = task.method;
    PELT_FAST_BY_TYPE(g.dtype, up_block_of<W, T>(g, current, start, weight, is_packed, block))
  }
}
PELT_FAST_FOR_EACH_INSTRUCTION_SET(routed_up, Up)

Tensor routed_down_(Tensor t, Tensor x, Tensor down, std::optional<Tensor> biases, Tensor segments,
                    std::vector<int64_t> ranks, std::optional<Tensor> seeds,
                    std::vector<int64_t> thresholds, std::vector<double> keep_scales) {
  const ScalarType dtype = check_activation("x", x);
  check_rows("x", x, -1, -1, dtype);
  const int64_t rows = x.size(0), width = x.size(1);
  const Plan plan = plan_of(segments, ranks, rows, width, false, false);
  check_narrow("t", t, rows, plan, dtype);
  const Masks masks = masks_of(seeds, thresholds, keep_scales, ranks.size());
  Down g{};
  g.x = rows_of<void>(x), g.t = rows_of<void>(t), g.width = width, g.dtype = dtype;
  g.down = factors_of("down", down, plan.total_rank * width);
  if (biases.has_value()) g.biases = factors_of("biases", *biases, plan.total_rank);
  g.plan = &plan, g.masks = &masks;
  run_plan(routed_down_for_this_machine, g, plan);
  return t;
}

Tensor routed_up_(Tensor out, Tensor base, Tensor t, Tensor up, std::optional<Tensor> biases,
                  Tensor segments, std::vector<int64_t> ranks, std::vector<double> scales,
                  int64_t activation, std::optional<Tensor> seeds, std::vector<int64_t> thresholds,
                  std::vector<double> keep_scales) {
  const ScalarType dtype = check_activation("base", base);
  check_rows("base", base, -1, -1, dtype);
  const int64_t rows = base.size(0), width = base.size(1);
  check_rows("out", out, rows, width, dtype);
  const Plan plan = plan_of(segments, ranks, rows, width, false, true);
  check_narrow("t", t, rows, plan, dtype);
  const Masks masks = masks_of(seeds, thresholds, keep_scales, ranks.size());
  check_scales(scales, ranks.size());
  Up g{};
  g.base = rows_of<void>(base), g.out = rows_of<void>(out), g.t = rows_of<void>(t);
  g.up = factors_of("up", up, plan.total_rank * width);
  if (biases.has_value())
    g.biases = factors_of("biases", *biases, static_cast<int64_t>(ranks.size()) * width);
  g.width = width, g.dtype = dtype, g.activation = activation_of(activation);
  g.plan = &plan, g.masks = &masks, g.scales = scales.data();
  run_plan(routed_up_for_this_machine, g, plan);
  return out;
}

}  // namespace
}  // namespace pelt_fast

STABLE_TORCH_LIBRARY_FRAGMENT(pelt_fast_cpp, m) {
  m.def(
      "routed_down_(Tensor(a!) t, Tensor x, Tensor down, Tensor? biases, Tensor segments, int[]"
      " ranks, Tensor? seeds, int[] thresholds, float[] keep_scales) -> Tensor(a!)");
  m.def(
      "routed_up_(Tensor(a!) out, Tensor base, Tensor t, Tensor up, Tensor? biases, Tensor"
      " segments, int[] ranks, float[] scales, int activation, Tensor? seeds, int[] thresholds,"
      " float[] keep_scales) -> Tensor(a!)");
}

STABLE_TORCH_LIBRARY_IMPL(pelt_fast_cpp, CPU, m) {
  m.impl("routed_down_", TORCH_BOX(&pelt_fast::routed_down_));
  m.impl("routed_up_", TORCH_BOX(&pelt_fast::routed_up_));
}
