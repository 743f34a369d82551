// An activation with all that stands around it in one pass: its gate and its dropout.
//
// Shapes   t, z, out, d, dt (M, N), z and dt for a gated unit; f by its number in
//          reference.activations.ACTIVATIONS.
// Maths    out = mask * f(t) * z
//          dt = mask * d * z * f'(t), d = mask * d * f(t);  without a gate d = mask * d * f'(t)
// Traffic  each tensor read or written once; the mask is drawn in registers. In place: out may be
//          t or z, element for element.

#include <torch/csrc/stable/library.h>

#include "arguments.h"
#include "elementwise.h"

namespace pelt_fast {
namespace {

struct Activate {
  Rows<void> t, z, out, dt;  // out is d in the backward; z and dt may be missing
  int64_t rows, width;
  Activation activation;
  ScalarType dtype;
  bool drop;
  Mask mask;
};

// Zeros behind the columns.
template <typename T>
PELT_FAST_INLINE void load_row(Row& row, const Rows<void>& from, int64_t at, int64_t column,
                               int columns) {
  const T* x = static_cast<const T*>(from.data) + at * from.stride + column;
  for (int j = 0; j < columns; ++j) row[j] = to_float(x[j]);
  for (int j = columns; j < kColumns; ++j) row[j] = 0;
}

template <typename T>
PELT_FAST_INLINE void store_row(const Row& row, const Rows<void>& to, int64_t at, int64_t column,
                                int columns) {
  T* x = static_cast<T*>(to.data) + at * to.stride + column;
  for (int j = 0; j < columns; ++j) assign(x[j], row[j]);
}

template <typename T>
PELT_FAST_INLINE void activate_row(const Activate& g, int64_t row, int64_t column, int columns) {
  alignas(64) Row value, other;
  load_row<T>(value, g.t, row, column, columns);
  values(g.activation, value);
  if (g.z.data != nullptr) {
    load_row<T>(other, g.z, row, column, columns);
    multiply(value, other);
  }
  if (g.drop) {
    draw_row(other, g.mask, g.width, row, column);
    multiply(value, other);
  }
  store_row<T>(value, g.out, row, column, columns);
}

template <typename T>
PELT_FAST_INLINE void backward_row(const Activate& g, int64_t row, int64_t column, int columns) {
  alignas(64) Row d, value, slope, other;
  load_row<T>(value, g.t, row, column, columns);
  slopes(g.activation, value, slope);
  load_row<T>(d, g.out, row, column, columns);
  if (g.drop) {
    draw_row(other, g.mask, g.width, row, column);
    multiply(d, other);
  }
  multiply(slope, d);
  if (g.z.data == nullptr) return store_row<T>(slope, g.out, row, column, columns);
  load_row<T>(other, g.z, row, column, columns);
  multiply(slope, other);
  multiply(value, d);
  store_row<T>(slope, g.dt, row, column, columns);
  store_row<T>(value, g.out, row, column, columns);
}

// Rows [first, last).
template <int W>
PELT_FAST_INLINE void activate(const Activate& g, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row)
    for (int64_t column = 0; column < g.width; column += kColumns) {
      const int columns = static_cast<int>(std::min<int64_t>(kColumns, g.width - column));
      PELT_FAST_BY_TYPE(g.dtype, activate_row<T>(g, row, column, columns))
    }
}
PELT_FAST_FOR_EACH_INSTRUCTION_SET(activate, Activate)

template <int W>
PELT_FAST_INLINE void backward(const Activate& g, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row)
    for (int64_t column = 0; column < g.width; column += kColumns) {
      const int columns = static_cast<int>(std::min<int64_t>(kColumns, g.width - column));
      PELT_FAST_BY_TYPE(g.dtype, backward_row<T>(g, row, column, columns))
    }
}
PELT_FAST_FOR_EACH_INSTRUCTION_SET(backward, Activate)

// `out` names the tensor that is written: out, or d in the backward.
Activate arguments(const char* name, const Tensor& out, const Tensor& t,
                   const std::optional<Tensor>& z, int64_t activation,
                   const std::optional<Tensor>& seed, int64_t threshold, double keep_scale) {
  const ScalarType dtype = check_activation("t", t);
  check_rows("t", t, -1, -1, dtype);
  const int64_t rows = t.size(0), width = t.size(1);
  check_rows(name, out, rows, width, dtype);
  if (z.has_value()) check_rows("z", *z, rows, width, dtype);
  const Mask mask = mask_of(seed, threshold, keep_scale);
  return {rows_of<void>(t),
          z.has_value() ? rows_of<void>(*z) : Rows<void>{},
          rows_of<void>(out),
          {},
          rows,
          width,
          activation_of(activation),
          dtype,
          mask.threshold > 0,
          mask};
}

// Rows a thread is worth waking for.
int64_t grain(const Activate& g) { return 1 + (1 << 14) / std::max<int64_t>(g.width, 1); }

Tensor activate_(Tensor out, Tensor t, std::optional<Tensor> z, int64_t activation,
                 std::optional<Tensor> seed, int64_t threshold, double keep_scale) {
  const Activate g = arguments("out", out, t, z, activation, seed, threshold, keep_scale);
  run(activate_for_this_machine, g, g.rows, grain(g));
  return out;
}

Tensor activate_backward_(Tensor d, Tensor t, std::optional<Tensor> z, std::optional<Tensor> dt,
                          int64_t activation, std::optional<Tensor> seed, int64_t threshold,
                          double keep_scale) {
  Activate g = arguments("d", d, t, z, activation, seed, threshold, keep_scale);
  PELT_FAST_CHECK(z.has_value() == dt.has_value(), "z and dt must come together");
  if (dt.has_value()) {
    check_rows("dt", *dt, g.rows, g.width, g.dtype);
    g.dt = rows_of<void>(*dt);
  }
  run(backward_for_this_machine, g, g.rows, grain(g));
  return d;
}

}  // namespace
}  // namespace pelt_fast

STABLE_TORCH_LIBRARY_FRAGMENT(pelt_fast_cpp, m) {
  m.def(
      "activate_(Tensor(a!) out, Tensor t, Tensor? z, int activation, Tensor? seed, int threshold,"
      " float keep_scale) -> Tensor(a!)");
  m.def(
      "activate_backward_(Tensor(a!) d, Tensor t, Tensor? z, Tensor(b!)? dt, int activation,"
      " Tensor? seed, int threshold, float keep_scale) -> Tensor(a!)");
}

STABLE_TORCH_LIBRARY_IMPL(pelt_fast_cpp, CPU, m) {
  m.impl("activate_", TORCH_BOX(&pelt_fast::activate_));
  m.impl("activate_backward_", TORCH_BOX(&pelt_fast::activate_backward_));
}
