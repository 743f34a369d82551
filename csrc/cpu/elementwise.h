// The functions f of pelt_fast/ops/common/activations.py and their derivatives in fp32, without
// branches: loops over them become vectors.
#pragma once

#include "exp.h"
#include "tile.h"

namespace pelt_fast {

enum class Activation {
  identity,
  relu,
  gelu,
  gelu_tanh,
  silu,
  tanh
};  // in the order of ACTIVATIONS

// The logistic function of x, and of -x without the loss of 1 minus it.
struct Sigmoid {
  float gate, rest;
};
PELT_FAST_INLINE Sigmoid sigmoid32(float x) {
  const float e = exp32(x < 0 ? x : -x), large = 1.0f / (1.0f + e), small = e * large;
  return {x < 0 ? small : large, x < 0 ? large : small};
}

PELT_FAST_INLINE float tanh32(float x) {
  const float square = x * x, size = x < 0 ? -x : x;
  float p = -5.70498872745e-3f;  // Cephes' tanhf
  p = p * square + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  const float far = 1.0f - 2.0f / (exp32(2.0f * size) + 1.0f);
  return size < 0.625f ? p * square * x + x : (x < 0 ? -far : far);
}

// The normal distribution at x from e = exp(-x^2 / 2): a polynomial in 1 / (1 + |x| / 4) times e is
// what lies beyond |x| (minimax over [0, 13.5]; tests/ops/test_native_products.py judges it).
PELT_FAST_INLINE float normal32(float x, float e) {
  const float t = 1.0f / (1.0f + 0.25f * (x < 0 ? -x : x)) - 0.5f;
  float p = 0.03447788581252098f;
  p = p * t - 0.04389547184109688f;
  p = p * t - 0.08416571468114853f;
  p = p * t + 0.03230615332722664f;
  p = p * t + 0.2719166576862335f;
  p = p * t + 0.4938405752182007f;
  p = p * t + 0.5736547112464905f;
  p = p * t + 0.497516930103302f;
  p = p * t + 0.34079548716545105f;
  p = p * t + 0.09441064298152924f;
  return x < 0 ? p * e : 1.0f - p * e;
}

// value = f(x), slope = f'(x).
template <Activation A>
PELT_FAST_INLINE void evaluate(float x, float& value, float& slope) {
  if (A == Activation::identity) {
    value = x;
    slope = 1.0f;
  } else if (A == Activation::relu) {
    value = x < 0 ? 0.0f : x;  // of a NaN a NaN
    slope = x <= 0 ? 0.0f : 1.0f;
  } else if (A == Activation::gelu) {
    const float e = exp32(-0.5f * x * x), below = normal32(x, e);
    value = x * below;
    slope = below + x * (0.3989422804014327f * e);
  } else if (A == Activation::gelu_tanh) {  // 0.5 (1 + tanh z) is sigmoid(2 z)
    constexpr float kTwice = 1.5957691216057308f, kCubic = 0.044715f;
    const Sigmoid s = sigmoid32(kTwice * (x + kCubic * x * x * x));
    value = x * s.gate;
    slope = s.gate + value * s.rest * kTwice * (1.0f + 3.0f * kCubic * x * x);
  } else if (A == Activation::silu) {
    const Sigmoid s = sigmoid32(x);
    value = x * s.gate;
    slope = s.gate + value * s.rest;
  } else {
    value = tanh32(x);
    slope = 1.0f - value * value;
  }
}

// Calls `op` with the activation of that number as its template argument.
#define PELT_FAST_BY_ACTIVATION(number, op) \
  switch (number) {                         \
    case Activation::identity:              \
      return op(Activation::identity);      \
    case Activation::relu:                  \
      return op(Activation::relu);          \
    case Activation::gelu:                  \
      return op(Activation::gelu);          \
    case Activation::gelu_tanh:             \
      return op(Activation::gelu_tanh);     \
    case Activation::silu:                  \
      return op(Activation::silu);          \
    case Activation::tanh:                  \
      return op(Activation::tanh);          \
  }

inline Activation activation_of(int64_t number) {
  const auto last = static_cast<int64_t>(Activation::tanh);
  PELT_FAST_CHECK(number >= 0 && number <= last, "activation must be 0 to ", last, ", got ",
                  number);
  return static_cast<Activation>(number);
}

using Row = float[kColumns];

template <Activation A>
PELT_FAST_INLINE void values_of(Row& x, int64_t columns) {
  for (int64_t j = 0; j < columns; ++j) {
    float value, slope;
    evaluate<A>(x[j], value, slope);
    x[j] = value;
  }
}

template <Activation A>
PELT_FAST_INLINE void values_and_slopes_of(Row& x, Row& slope, int64_t columns) {
  for (int64_t j = 0; j < columns; ++j) {
    float value;
    evaluate<A>(x[j], value, slope[j]);
    x[j] = value;
  }
}

// x = f(x)
PELT_FAST_INLINE void values(Activation activation, Row& x, int64_t columns = kColumns) {
#define PELT_FAST_CALL(A) values_of<A>(x, columns)
  PELT_FAST_BY_ACTIVATION(activation, PELT_FAST_CALL)
#undef PELT_FAST_CALL
}

// x = f(x), slope = f'(x)
PELT_FAST_INLINE void slopes(Activation activation, Row& x, Row& slope,
                             int64_t columns = kColumns) {
#define PELT_FAST_CALL(A) values_and_slopes_of<A>(x, slope, columns)
  PELT_FAST_BY_ACTIVATION(activation, PELT_FAST_CALL)
#undef PELT_FAST_CALL
}

PELT_FAST_INLINE void multiply(Row& row, const Row& by) {
  for (int j = 0; j < kColumns; ++j) row[j] *= by[j];
}

}  // namespace pelt_fast
