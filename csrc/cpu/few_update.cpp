// What a method adds to a few rows, in one call: a decoder's step.
//
// Shapes   x (M, K); base, out (M, N), which may be one; t (M, R) or missing; down (R, K), up (N, R)
//          with contiguous rows; biases (R), (N) or missing. M <= kMaxFew; any R.
// Maths    t = x downᵀ + down_bias;  out = base + scale (f(t) upᵀ + up_bias) in fp32. Each element is
//          one dot product: the result is the same on any number of threads.
// Traffic  down and up read once, where they are. Packing them, as adapter.cpp does for many rows,
//          would cost more than the products. (K + N) R elements are the floor; nothing else is large.

#include <torch/csrc/stable/library.h>

#include "elementwise.h"
#include "few.h"

namespace pelt_fast {
namespace {

constexpr int64_t kShare = 1 << 16;  // products of a thread: fewer are done before another wakes

struct FewUpdate {
  Rows<void> base, out, t, down, up;  // t may be missing
  const void *down_bias, *up_bias;    // or null
  const float* x;                     // (M, K)
  float* h;                           // (M, R)
  int64_t rows, depth, width, rank;   // M, K, N, R
  float scale;
  Activation activation;
  ScalarType dtype, weights;
};

// Units [first, last) of the rank: t, and h = f(t).
template <int W>
PELT_FAST_INLINE void few_down(const FewUpdate& g, int64_t begin, int64_t end) {
  alignas(64) Tile sums;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t first = unit * kUnit, count = std::min(kUnit, g.rank - first);
    PELT_FAST_BY_TYPE(g.weights,
                      products<W, T>(sums, g.x, g.rows, g.depth, g.down, g.down_bias, first, count))
    for (int64_t i = 0; i < g.rows; ++i) {
      if (g.t.data != nullptr) {
        PELT_FAST_BY_TYPE(g.dtype, T* to = static_cast<T*>(g.t.data) + i * g.t.stride + first;
                          for (int64_t j = 0; j < count; ++j) assign(to[j], sums[i][j]))
      }
      values(g.activation, sums[i], count);
      std::memcpy(g.h + i * g.rank + first, sums[i], count * sizeof(float));
    }
  }
}
PELT_FAST_FOR_EACH_INSTRUCTION_SET(few_down, FewUpdate)

// Units [first, last) of the width: out.
template <int W>
PELT_FAST_INLINE void few_up(const FewUpdate& g, int64_t begin, int64_t end) {
  alignas(64) Tile sums;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t first = unit * kUnit, count = std::min(kUnit, g.width - first);
    PELT_FAST_BY_TYPE(g.weights,
                      products<W, T>(sums, g.h, g.rows, g.rank, g.up, g.up_bias, first, count))
    for (int64_t i = 0; i < g.rows; ++i) {
      PELT_FAST_BY_TYPE(g.dtype,
                        const T* base = static_cast<T*>(g.base.data) + i * g.base.stride + first;
                        T* out = static_cast<T*>(g.out.data) + i * g.out.stride + first;
                        for (int64_t j = 0; j < count; ++j)
                            assign(out[j], to_float(base[j]) + g.scale * sums[i][j]))
    }
  }
}
PELT_FAST_FOR_EACH_INSTRUCTION_SET(few_up, FewUpdate)

const void* check_bias(const char* name, const std::optional<Tensor>& bias, int64_t size,
                       ScalarType dtype) {
  if (!bias.has_value()) return nullptr;
  PELT_FAST_CHECK(bias->dim() == 1 && bias->size(0) == size && bias->is_contiguous() &&
                      bias->is_cpu() && bias->scalar_type() == dtype,
                  name, " must be contiguous (", size, ") on the CPU with down's dtype, got ",
                  shape_of(*bias));
  return bias->const_data_ptr();
}

void few_rows_update_(Tensor out, std::optional<Tensor> t, Tensor base, Tensor x, Tensor down,
                      std::optional<Tensor> down_bias, Tensor up, std::optional<Tensor> up_bias,
                      double scale, int64_t activation) {
  FewUpdate g{};
  g.dtype = check_activation("x", x), g.weights = check_activation("down", down);
  check_rows("x", x, -1, -1, g.dtype);
  g.rows = x.size(0), g.depth = x.size(1);
  check_few(x);
  check_rows("down", down, -1, g.depth, g.weights);
  g.rank = down.size(0);
  PELT_FAST_CHECK(g.rank >= 1, "the rank must be at least 1, got ", g.rank);
  check_rows("up", up, -1, g.rank, g.weights);
  g.width = up.size(0);
  check_rows("out", out, g.rows, g.width, g.dtype);
  check_rows("base", base, g.rows, g.width, g.dtype);
  if (t.has_value()) check_rows("t", *t, g.rows, g.rank, g.dtype);
  g.down_bias = check_bias("down_bias", down_bias, g.rank, g.weights);
  g.up_bias = check_bias("up_bias", up_bias, g.width, g.weights);
  g.out = rows_of<void>(out), g.base = rows_of<void>(base);
  g.down = rows_of<void>(down), g.up = rows_of<void>(up);
  if (t.has_value()) g.t = rows_of<void>(*t);
  g.scale = static_cast<float>(scale), g.activation = activation_of(activation);
  const Buffer wide = buffer(g.rows * g.depth), h = buffer(g.rows * g.rank);
  PELT_FAST_BY_TYPE(g.dtype, widen<T>(wide.get(), rows_of<void>(x), g.rows, g.depth))
  g.x = wide.get(), g.h = h.get();
  const auto grain = [&](int64_t depth) {
    return std::max<int64_t>(1, kShare / std::max<int64_t>(1, g.rows * depth * kUnit));
  };
  run(few_down_for_this_machine, g, (g.rank + kUnit - 1) / kUnit, grain(g.depth));
  run(few_up_for_this_machine, g, (g.width + kUnit - 1) / kUnit, grain(g.rank));
}

}  // namespace
}  // namespace pelt_fast

STABLE_TORCH_LIBRARY_FRAGMENT(pelt_fast_cpp, m) {
  m.def(
      "few_rows_update_(Tensor(a!) out, Tensor(b!)? t, Tensor base, Tensor x, Tensor down,"
      " Tensor? down_bias, Tensor up, Tensor? up_bias, float scale, int activation) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pelt_fast_cpp, CPU, m) {
  m.impl("few_rows_update_", TORCH_BOX(&pelt_fast::few_rows_update_));
}
