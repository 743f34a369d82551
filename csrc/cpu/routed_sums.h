// Sums over the rows of each method, by parts that the tasks of a plan make.
#pragma once

#include "routed.h"

namespace pelt_fast {

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
      const bool is_done =
          direct(static_cast<int>(method)) && (scales == nullptr || scales[method] == 1);
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

inline void check_sums(const char* name, const Tensor& t, int64_t elements) {
  PELT_FAST_CHECK(t.is_cpu() && t.is_contiguous() && t.numel() == elements &&
                      t.scalar_type() == ScalarType::Float,
                  name, " must be contiguous float32 on the CPU with ", elements, " elements, got ",
                  shape_of(t));
}

}  // namespace pelt_fast
