// Low-rank updates of many methods in one batch, forward: each row under its own method, or none.
//
// Shapes   x (M, K); down: the D_g (R_g, K) below each other, biases (sum R_g); t (M, at least every
//          R_g); base, out (M, N); up: the U_g (N, R_g), each flattened, behind each other, biases
//          (G, N); segments (S, 4): first row, rows, method, first row in the mask. R_g <= kMaxRank;
//          rows of a method with a higher rank or none are as rows of none.
// Maths    t = (mask_g * x) D_gᵀ + d_g;  out = base + s_g (h U_gᵀ + u_g), h = mask_g * f(t)
//          out = base in rows of none; t is not written there, nor behind R_g.
// Traffic  x read once; base read and out written once, whatever the number of methods. Each D_g and
//          U_g is read and packed once by each thread that has rows of it: G (K + N) R elements.
//          2 M R (K + N) flops.

#include <torch/csrc/stable/library.h>

#include "bottleneck.h"
#include "routed.h"

namespace pelt_fast {
namespace {

constexpr Mask kWhole{};         // drops nothing
constexpr int64_t kFewRows = 8;  // of a method: its factor is read as it lies, never packed

struct Down {
  Rows<void> x, t;
  Factors down, biases;  // biases may be missing
  int64_t width;
  ScalarType dtype;
  const Plan* plan;
  const Masks* masks;
};

// A row of x as fp32, dropped out.
template <typename T>
PELT_FAST_INLINE const float* wide_row(float* to, const Rows<void>& x, const Mask& mask,
                                       const Block& block, int i) {
  const T* row = place<T>(x, block.row_of(i), 0);
  if (std::is_same<T, float>::value && mask.threshold == 0)
    return reinterpret_cast<const float*>(row);
  for (int64_t k = 0; k < block.width; ++k) to[k] = to_float(row[k]);
  if (mask.threshold == 0) return to;
  alignas(64) float factor[kColumns];
  for (int64_t column = 0; column < block.width; column += kColumns) {
    draw_row(factor, mask, block.width, block.drawn_of(i), column);
    for (int j = 0; j < block.columns(column); ++j) to[column + j] *= factor[j];
  }
  return to;
}

// s = drop(x) D_gᵀ + s for at most kFewRows rows, one dot product for each element.
template <int W, typename T>
PELT_FAST_INLINE void few_rows_down(const Down& g, const Method& method, const Mask& mask,
                                    const Block& block, Tile& s, float* scratch) {
  const float* rows[kFewRows];
  for (int i = 0; i < block.rows; ++i)
    rows[i] = wide_row<T>(scratch + (i + 1) * g.width, g.x, mask, block, i);
  for (int64_t r = 0; r < method.rank; ++r) {
    const float* d =
        upright(scratch, g.down, (method.first + r) * g.width, 1, g.width, g.width);
    for (int i = 0; i < block.rows; ++i) s[i][r] += dot_of<W>(d, rows[i], g.width);
  }
}

// Tasks [first, last), a block each.
template <int W>
PELT_FAST_INLINE void routed_down(const Down& g, int64_t first, int64_t last) {
  const Plan& plan = *g.plan;
  const int64_t most = padded(plan.most_rank);
  const Buffer scratch = buffer(most + std::max(most, kFewRows + 1) * g.width);
  float *start = scratch.get(), *weight = start + most;
  int current = -1;
  for (int64_t i = first; i < last; ++i) {
    alignas(64) Tile s;
    const Task& task = plan.tasks[i];
    const Method& method = plan.methods[task.method];
    const Block& block = plan.blocks[task.first];
    const Mask mask = g.masks->of(task.method);
    const int64_t pad = padded(method.rank);
    const bool few = method.rows <= kFewRows;
    if (task.method != current) {
      current = task.method;
      std::fill_n(start, pad, 0.0f);
      if (g.biases.data != nullptr) widen(start, g.biases, method.first, method.rank);
      if (!few)
        transposed<W>(weight, g.down, method.first * g.width, method.rank, g.width, pad);
    }
    for (int64_t row = 0; row < block.products(); ++row)
      std::memcpy(s[row], start, pad * sizeof(float));
    PELT_FAST_BY_TYPE(g.dtype, {
      if (few) {
        few_rows_down<W, T>(g, method, mask, block, s, weight);
      } else {
        down_block<W, T>(s, g.x, weight, pad, mask, block);
      }
      store_narrow<T>(s, g.t, block, method.rank);
    })
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

template <int W, typename T>
PELT_FAST_INLINE void up_one(const Up& g, const Method& method, const Mask& mask, float scale,
                             const float* weight, const float* start, const Block& block) {
  alignas(64) Tile h;
  load_narrow<T>(h, g.t, block, method.rank);
  if (g.activation != Activation::identity || mask.threshold > 0)
    bottleneck(g.activation, mask, h, nullptr, method.rank, block);
  scale_rows(h, padded(method.rank), scale);
  up_block<W, T>(h, method.rank, weight, start, g.base, g.out, kWhole, block);
}

// Tasks [first, last), a block each.
template <int W>
PELT_FAST_INLINE void routed_up(const Up& g, int64_t first, int64_t last) {
  const Plan& plan = *g.plan;
  const int64_t wide = padded(g.width);
  const Buffer scratch = buffer(wide * (plan.most_rank + 1));
  float *start = scratch.get(), *weight = start + wide;
  int current = -1;
  for (int64_t i = first; i < last; ++i) {
    const Task& task = plan.tasks[i];
    const Block& block = plan.blocks[task.first];
    if (task.method < 0) {
      PELT_FAST_BY_TYPE(g.dtype, copy_rows<T>(g.base, g.out, block))
      continue;
    }
    const Method& method = plan.methods[task.method];
    const Mask mask = g.masks->of(task.method);
    const auto scale = static_cast<float>(g.scales[task.method]);
    if (task.method != current) {
      current = task.method;
      if (g.biases.data != nullptr) {
        widen(start, g.biases, task.method * g.width, g.width, scale);
        std::fill_n(start + g.width, wide - g.width, 0.0f);
      }
      transposed<W>(weight, g.up, method.first * g.width, g.width, method.rank, wide);
    }
    const float* added = g.biases.data == nullptr ? nullptr : start;
    PELT_FAST_BY_TYPE(g.dtype, up_one<W, T>(g, method, mask, scale, weight, added, block))
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
