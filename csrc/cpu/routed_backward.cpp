// Low-rank updates of many methods in one batch, backward, in one pass over each large tensor.
//
// Shapes   those of routed.cpp; dt (M, at least every R_g); dx, base (M, K); dy (M, N); the
//          gradients of the factors in fp32, stacked as they are.
// Maths    dt = s_g mask_g f'(t) (dy U_g);  d_up = s_g dyᵀ h;  d_up_bias = s_g Σ dy
//          dx = base + mask_g * (dt D_g), base or zeros in rows of none;  d_down = dtᵀ (mask_g * x)
//          d_down_bias = Σ dt. A sum over a method's rows is of parts of them, which its shape and
//          its segments choose, added in their order: the same on any number of threads.
// Traffic  dy read once; x and base read, dx written once, whatever the number of methods. Each
//          factor read, its gradient written once: G (K + N) R elements each. 4 M R (K + N) flops.

#include <torch/csrc/stable/library.h>

#include "bottleneck.h"
#include "routed.h"
#include "routed_sums.h"

namespace pelt_fast {
namespace {

struct DownBackward {
  Rows<void> dt, x, base, dx;  // x, base and dx may be missing
  Factors down;
  int64_t width;
  ScalarType dtype;
  const Plan* plan;
  const Masks* masks;
  const Sums *weights, *biases;
};

// dx = base or zeros.
template <typename T>
PELT_FAST_INLINE void rest_of_dx(const DownBackward& g, const Block& block) {
  for (int i = 0; i < block.rows; ++i) {
    T* to = place<T>(g.dx, block.row + i, 0);
    if (g.base.data == nullptr) {
      std::memset(to, 0, block.width * sizeof(T));
    } else {
      std::memcpy(to, place<T>(g.base, block.row + i, 0), block.width * sizeof(T));
    }
  }
}

template <int W, typename T>
PELT_FAST_INLINE void down_part(const DownBackward& g, int64_t i, const float* weight) {
  const Task& task = g.plan->tasks[i];
  const Method& method = g.plan->methods[task.method];
  const Mask mask = g.masks->of(task.method);
  const int64_t pad = narrow(method.rank);
  float *part = g.weights->cleared(i), *bias = g.biases->cleared(i);
  for (int64_t b = task.first; b < task.last; ++b) {
    alignas(64) Tile ds;
    const Block& block = g.plan->blocks[b];
    load_narrow<T>(ds, g.dt, block, method.rank);
    if (bias != nullptr) add_columns<W>(bias, ds, block.rows, pad);
    if (part != nullptr || g.dx.data != nullptr)
      down_backward_block<W, T>(ds, method.rank, pad, weight, g.base, g.dx, g.x, part, mask, block);
  }
}

// Tasks [first, last), a part of a method's rows each, or a block of none.
template <int W>
PELT_FAST_INLINE void routed_down_backward(const DownBackward& g, int64_t first, int64_t last) {
  const Plan& plan = *g.plan;
  const int64_t wide = padded(g.width);
  const Buffer scratch = buffer(plan.most_rank * wide);
  const float* weight = nullptr;
  int current = -1;
  for (int64_t i = first; i < last; ++i) {
    const Task& task = plan.tasks[i];
    if (task.method < 0) {
      PELT_FAST_BY_TYPE(g.dtype, rest_of_dx<T>(g, plan.blocks[task.first]))
      continue;
    }
    const Method& method = plan.methods[task.method];
    if (g.dx.data != nullptr && task.method != current) {
      current = task.method;
      weight = upright(scratch.get(), g.down, method.first * g.width, method.rank, g.width, wide);
    }
    PELT_FAST_BY_TYPE(g.dtype, down_part<W, T>(g, i, weight))
  }
}
PELT_FAST_FOR_EACH_INSTRUCTION_SET(routed_down_backward, DownBackward)

struct UpBackward {
  Rows<void> dy, t, dt;  // t and dt may be missing
  Factors up;
  int64_t width;
  ScalarType dtype;
  Activation activation;
  const Plan* plan;
  const Masks* masks;
  const double* scales;
  const Sums *weights, *biases;
};

template <int W, typename T>
PELT_FAST_INLINE void up_part(const UpBackward& g, int64_t i, const float* weight) {
  const Task& task = g.plan->tasks[i];
  const Method& method = g.plan->methods[task.method];
  const Mask mask = g.masks->of(task.method);
  const int64_t pad = narrow(method.rank);
  const auto scale = static_cast<float>(g.scales[task.method]);
  const bool need_dt = g.dt.data != nullptr;
  const bool bends = g.activation != Activation::identity || mask.threshold > 0;
  float *part = g.weights->cleared(i), *bias = g.biases->cleared(i);
  for (int64_t b = task.first; b < task.last; ++b) {
    alignas(64) Tile h, slope, dt;
    const Block& block = g.plan->blocks[b];
    if (g.t.data != nullptr) load_narrow<T>(h, g.t, block, method.rank);
    if (g.t.data == nullptr) clear(h, pad);
    if (bends) bottleneck(g.activation, mask, h, &slope, method.rank, block);
    scale_rows(h, pad, scale);
    if (need_dt) clear(dt, pad, block.products());
    up_backward_block<W, T>(need_dt ? &dt : nullptr, &h, g.dy, weight, part, bias, pad, block);
    if (!need_dt) continue;
    for (int row = 0; row < block.rows; ++row)
      for (int64_t j = 0; j < pad; ++j) dt[row][j] *= bends ? scale * slope[row][j] : scale;
    store_narrow<T>(dt, g.dt, block, method.rank);
  }
}

// Tasks [first, last), a part of a method's rows each.
template <int W>
PELT_FAST_INLINE void routed_up_backward(const UpBackward& g, int64_t first, int64_t last) {
  const Plan& plan = *g.plan;
  const int64_t wide = padded(g.width);
  const Buffer scratch = buffer(narrow(plan.most_rank) * wide);
  const float* weight = nullptr;
  int current = -1;
  for (int64_t i = first; i < last; ++i) {
    const int number = plan.tasks[i].method;
    const Method& method = plan.methods[number];
    if (g.dt.data != nullptr && number != current) {
      current = number;
      weight = upright(scratch.get(), g.up, method.first * g.width, g.width, method.rank,
                       narrow(method.rank));
    }
    PELT_FAST_BY_TYPE(g.dtype, up_part<W, T>(g, i, weight))
  }
}
PELT_FAST_FOR_EACH_INSTRUCTION_SET(routed_up_backward, UpBackward)

void routed_down_backward_(Tensor dt, std::optional<Tensor> x, std::optional<Tensor> base,
                           Tensor down, std::optional<Tensor> dx, std::optional<Tensor> d_down,
                           std::optional<Tensor> d_biases, Tensor segments,
                           std::vector<int64_t> ranks, std::optional<Tensor> seeds,
                           std::vector<int64_t> thresholds, std::vector<double> keep_scales) {
  const ScalarType dtype = check_activation("dt", dt);
  PELT_FAST_CHECK(d_down.has_value() == x.has_value(), "x and d_down must come together");
  PELT_FAST_CHECK(down.dim() == 2, "down must have shape (sum R, K), got ", shape_of(down));
  const int64_t rows = dt.size(0), width = down.size(1);
  const Plan plan = plan_of(segments, ranks, rows, width, true, dx.has_value());
  check_narrow("dt", dt, rows, plan, dtype);
  const Masks masks = masks_of(seeds, thresholds, keep_scales, ranks.size());
  DownBackward g{};
  g.down = factors_of("down", down, plan.total_rank * width);
  g.dt = rows_of<void>(dt), g.width = width, g.dtype = dtype, g.plan = &plan, g.masks = &masks;
  if (dx.has_value()) check_rows("dx", *dx, rows, width, dtype), g.dx = rows_of<void>(*dx);
  if (base.has_value())
    check_rows("base", *base, rows, width, dtype), g.base = rows_of<void>(*base);
  Sums weights, biases;
  std::vector<Sums::Shape> of_weights, of_biases;
  for (const Method& method : plan.methods) {
    const int64_t rank = method.rank, pad = narrow(rank);
    of_weights.push_back({rank, width, method.first * width, pad, padded(width)});
    of_biases.push_back({1, rank, method.first, 1, pad});
  }
  if (d_down.has_value()) {
    check_rows("x", *x, rows, width, dtype), g.x = rows_of<void>(*x);
    check_sums("d_down", *d_down, plan.total_rank * width);
    weights.ask(*d_down, plan, std::move(of_weights));
  }
  if (d_biases.has_value()) {
    check_sums("d_biases", *d_biases, plan.total_rank);
    biases.ask(*d_biases, plan, std::move(of_biases));
  }
  g.weights = &weights, g.biases = &biases;
  run_plan(routed_down_backward_for_this_machine, g, plan);
  weights.finish(nullptr);
  biases.finish(nullptr);
}

void routed_up_backward_(Tensor dy, std::optional<Tensor> t, Tensor up, std::optional<Tensor> dt,
                         std::optional<Tensor> d_up, std::optional<Tensor> d_biases,
                         Tensor segments, std::vector<int64_t> ranks, std::vector<double> scales,
                         int64_t activation, std::optional<Tensor> seeds,
                         std::vector<int64_t> thresholds, std::vector<double> keep_scales) {
  const ScalarType dtype = check_activation("dy", dy);
  check_rows("dy", dy, -1, -1, dtype);
  const int64_t rows = dy.size(0), width = dy.size(1);
  const Plan plan = plan_of(segments, ranks, rows, width, true, false);
  const Masks masks = masks_of(seeds, thresholds, keep_scales, ranks.size());
  check_scales(scales, ranks.size());
  UpBackward g{};
  g.up = factors_of("up", up, plan.total_rank * width);
  g.dy = rows_of<void>(dy), g.width = width, g.dtype = dtype, g.plan = &plan, g.masks = &masks;
  g.activation = activation_of(activation), g.scales = scales.data();
  PELT_FAST_CHECK(t.has_value() || (!d_up.has_value() && g.activation == Activation::identity),
                  "t is missing: d_up and an activation need it");
  if (t.has_value()) check_narrow("t", *t, rows, plan, dtype), g.t = rows_of<void>(*t);
  if (dt.has_value()) check_narrow("dt", *dt, rows, plan, dtype), g.dt = rows_of<void>(*dt);
  Sums weights, biases;
  std::vector<Sums::Shape> of_weights, of_biases;
  for (const Method& method : plan.methods) {
    const int64_t rank = method.rank, wide = padded(width);
    of_weights.push_back({width, rank, method.first * width, wide, narrow(rank)});
    of_biases.push_back({1, width, static_cast<int64_t>(of_biases.size()) * width, 1, wide});
  }
  if (d_up.has_value()) {
    check_sums("d_up", *d_up, plan.total_rank * width);
    weights.ask(*d_up, plan, std::move(of_weights));
  }
  if (d_biases.has_value()) {
    check_sums("d_biases", *d_biases, static_cast<int64_t>(ranks.size()) * width);
    biases.ask(*d_biases, plan, std::move(of_biases));
  }
  g.weights = &weights, g.biases = &biases;
  run_plan(routed_up_backward_for_this_machine, g, plan);
  weights.finish(nullptr);  // h was scaled
  biases.finish(scales.data());
}

}  // namespace
}  // namespace pelt_fast

STABLE_TORCH_LIBRARY_FRAGMENT(pelt_fast_cpp, m) {
  m.def(
      "routed_down_backward_(Tensor dt, Tensor? x, Tensor? base, Tensor down, Tensor(a!)? dx,"
      " Tensor(b!)? d_down, Tensor(c!)? d_biases, Tensor segments, int[] ranks, Tensor? seeds,"
      " int[] thresholds, float[] keep_scales) -> ()");
  m.def(
      "routed_up_backward_(Tensor dy, Tensor? t, Tensor up, Tensor(a!)? dt, Tensor(b!)? d_up,"
      " Tensor(c!)? d_biases, Tensor segments, int[] ranks, float[] scales, int activation,"
      " Tensor? seeds, int[] thresholds, float[] keep_scales) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pelt_fast_cpp, CPU, m) {
  m.impl("routed_down_backward_", TORCH_BOX(&pelt_fast::routed_down_backward_));
  m.impl("routed_up_backward_", TORCH_BOX(&pelt_fast::routed_up_backward_));
}
