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

namespace pelt_fast {
namespace {

// The gradient of one kind of factor: a matrix for each method, at its place in `out`.
class Sums {
 public:
  struct Shape {
    int64_t rows, columns, place;
    int64_t high, wide;  // padded
  };

  // Where each task adds: a method with one task and no padding adds in `out` itself.
  void ask(Tensor& out, const Plan& plan, std::vector<Shape> shapes) {
    out_ = static_cast<float*>(out.mutable_data_ptr());
    shapes_ = std::move(shapes);
    plan_ = &plan;
    int64_t floats = 0;
    for (const Task& task : plan.tasks)
      if (task.method >= 0 && !direct(task.method)) floats += size(task.method);
    parts_ = buffer(floats);
    float* next = parts_.get();
    places_.assign(plan.tasks.size(), nullptr);
    for (size_t i = 0; i < plan.tasks.size(); ++i) {
      const int method = plan.tasks[i].method;
      if (method < 0) continue;
      places_[i] = direct(method) ? out_ + shapes_[method].place : next;
      if (!direct(method)) next += size(method);
    }
  }

  // Where a task adds, made zero; null where the gradient is not asked for.
  float* cleared(int64_t task) const {
    if (out_ == nullptr) return nullptr;
    std::fill_n(places_[task], size(plan_->tasks[task].method), 0.0f);
    return places_[task];
  }

  // out = the scale of each method times its parts, in their order; zeros for one without rows.
  void finish(const double* scales) const {
    if (out_ == nullptr) return;
    std::vector<size_t> first(shapes_.size(), 0);
    std::vector<int64_t> starts(1, 0);
    for (size_t i = plan_->tasks.size(); i-- > 0;)
      if (plan_->tasks[i].method >= 0) first[plan_->tasks[i].method] = i;
    for (size_t method = 0; method < shapes_.size(); ++method) {
      const Shape& shape = shapes_[method];
      const bool is_done = direct(static_cast<int>(method)) && (scales == nullptr || scales[method] == 1);
      const int64_t left = is_done ? 0 : shape.rows * shape.columns;
      starts.push_back(starts.back() + (left + kUnit - 1) / kUnit);
    }
    torch::stable::parallel_for(0, starts.back(), 8, [&](int64_t begin, int64_t end) {
      size_t method = 0;
      for (int64_t unit = begin; unit < end; ++unit) {
        while (starts[method + 1] <= unit) ++method;
        const float scale = scales == nullptr ? 1.0f : static_cast<float>(scales[method]);
        finish_unit(method, first[method], (unit - starts[method]) * kUnit, scale);
      }
    });
  }

 private:
  static constexpr int64_t kUnit = 2048;  // elements

  int64_t size(int method) const { return shapes_[method].high * shapes_[method].wide; }
  bool direct(int method) const {
    const Shape& s = shapes_[method];
    return plan_->methods[method].tasks == 1 && size(method) == s.rows * s.columns;
  }

  // Elements [from, from + kUnit) of a method's gradient.
  void finish_unit(size_t method, size_t first, int64_t from, float scale) const {
    const Shape& s = shapes_[method];
    const int64_t end = std::min(from + kUnit, s.rows * s.columns);
    const int64_t tasks = plan_->methods[method].tasks;
    float* out = out_ + s.place;
    if (tasks == 0) return std::fill(out + from, out + end, 0.0f);
    if (direct(static_cast<int>(method))) {
      if (scale != 1.0f)
        for (int64_t i = from; i < end; ++i) out[i] *= scale;
      return;
    }
    for (int64_t i = from; i < end;) {  // the elements of a row
      const int64_t row = i / s.columns, column = i % s.columns;
      const int64_t count = std::min(s.columns - column, end - i);
      std::fill_n(out + i, count, 0.0f);
      for (int64_t p = 0; p < tasks; ++p) {
        const float* part = places_[first + p] + row * s.wide + column;
        for (int64_t j = 0; j < count; ++j) out[i + j] += part[j];
      }
      for (int64_t j = 0; j < count; ++j) out[i + j] *= scale;
      i += count;
    }
  }

  float* out_ = nullptr;
  Buffer parts_;
  std::vector<float*> places_;
  std::vector<Shape> shapes_;
  const Plan* plan_ = nullptr;
};

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
    if (g.t.data == nullptr) clear(h, pad, block.rows);
    if (bends) bottleneck(g.activation, mask, h, &slope, method.rank, block);
    scale_rows(h, pad, scale);
    if (need_dt) clear(dt, pad, block.products());
    up_backward_block<W, T>(need_dt ? &dt : nullptr, &h, g.dy, weight, part, bias, pad, block);
    if (!need_dt) continue;
    for (int row = 0; row < block.rows; ++row)
      for (int64_t j = 0; j < pad; ++j)
        dt[row][j] *= bends ? scale * slope[row][j] : scale;
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

void check_sums(const char* name, const Tensor& t, int64_t elements) {
  PELT_FAST_CHECK(t.is_cpu() && t.is_contiguous() && t.numel() == elements &&
                      t.scalar_type() == ScalarType::Float,
                  name, " must be contiguous float32 on the CPU with ", elements,
                  " elements, got ", shape_of(t));
}

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
  if (base.has_value()) check_rows("base", *base, rows, width, dtype), g.base = rows_of<void>(*base);
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
