// A row of an attention's scores: its softmax, its dropout, its gradient. attention_weights.cpp has
// the maths.
#pragma once

#include "arguments.h"
#include "exp.h"

namespace pelt_fast {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Weights {
  float *context, *prefix, *d_context, *d_prefix, *lse;
  const float *delta, *mask;
  int64_t queries, keys, length;   // T, S, P
  int64_t heads, mask_strides[3];  // of the mask
  int64_t first, width;            // of the dropout's: the first row; how wide that of the prefix is
  float scale;
  bool causal, relu, gated;
  Mask drop_prefix, drop_context;
};

// Largest and sum of n floats; -inf and 0 of none.
template <int W>
PELT_FAST_INLINE float highest(const float* row, int64_t n) {
  const int64_t whole = n / W * W;
  float most = whole > 0 ? most_of<W>(row, whole) : -kInfinity;
  for (int64_t j = whole; j < n; ++j) most = row[j] > most ? row[j] : most;
  return most;
}
template <int W>
PELT_FAST_INLINE float total(const float* row, int64_t n) {
  const int64_t whole = n / W * W;
  float sum = sum_of<W>(row, whole);
  for (int64_t j = whole; j < n; ++j) sum += row[j];
  return sum;
}

// Row `at` is scale row + mask; a causal query sees its own key and those before.
PELT_FAST_INLINE void finish_context(const Weights& g, float* row, int64_t at) {
  const int64_t head = at / g.queries, t = at % g.queries;
  const float* mask = g.mask;
  if (mask != nullptr)
    mask += head / g.heads * g.mask_strides[0] + head % g.heads * g.mask_strides[1] +
            t * g.mask_strides[2];
  const int64_t seen = g.causal ? std::min(t + 1, g.keys) : g.keys;
  if (mask == nullptr) {
    for (int64_t j = 0; j < seen; ++j) row[j] *= g.scale;
  } else {
#pragma GCC ivdep
    for (int64_t j = 0; j < seen; ++j) row[j] = g.scale * row[j] + mask[j];
  }
  for (int64_t j = seen; j < g.keys; ++j) row[j] = -kInfinity;
}

PELT_FAST_INLINE void multiply_all(float* row, int64_t n, float by) {
  for (int64_t j = 0; j < n; ++j) row[j] *= by;
}

PELT_FAST_INLINE void exponentials_of_kPad(float* row, float shift) {
#pragma GCC unroll 1
  for (int j = 0; j < kPad; ++j) row[j] = exp32(row[j] - shift);
}

// row = exp(row - shift), what is left over of vectors too in vectors: prefixes are short.
PELT_FAST_INLINE void exponentials(float* row, int64_t n, float shift) {
  int64_t j = 0;
  for (; j + kPad <= n; j += kPad) exponentials_of_kPad(row + j, shift);
  if (j == n) return;
  alignas(64) float rest[kPad] = {};
  std::memcpy(rest, row + j, (n - j) * sizeof(float));
  exponentials_of_kPad(rest, shift);
  std::memcpy(row + j, rest, (n - j) * sizeof(float));
}

PELT_FAST_INLINE float or_zero(float x) { return x == -kInfinity ? 0.0f : x; }

constexpr int kDraws = 32;              // side by side in vectors
constexpr int64_t kElements = 1 << 12;  // of the masks of a block of rows, where a row has no more

// to = the mask of `count` elements from `start` on: 0 or 1 / (1 - p); ones if nothing is dropped.
PELT_FAST_INLINE void draw(float* to, const Mask& mask, int64_t start, int64_t count) {
  if (mask.threshold == 0) {
    for (int64_t j = 0; j < count; ++j) to[j] = 1.0f;
    return;
  }
  uint16_t lanes[kDraws * kLanes];
  const auto threshold = static_cast<uint16_t>(mask.threshold);
  const float kept = mask.scale;
  for (int64_t done = 0; done < count;) {
    const int64_t at = start + done, skip = at % kLanes;
    const int64_t some = std::min<int64_t>(kDraws * kLanes - skip, count - done);
    draw_lanes<kDraws>(mask.seed, at / kLanes, lanes);
    const uint16_t* from = lanes + skip;
    float* out = to + done;
#pragma GCC ivdep
    for (int64_t j = 0; j < some; ++j) out[j] = from[j] >= threshold ? kept : 0.0f;
    done += some;
  }
}

// The masks of a block of rows, drawn at once: rows are short, and a draw is for eight elements.
struct DrawnMasks {
  Buffer context, prefix;
  int64_t keys, width, rows;

  explicit DrawnMasks(const Weights& g)
      : keys(g.keys),
        width(g.width),
        rows(std::max<int64_t>(1, kElements / std::max<int64_t>({g.keys, g.width, 1}))) {
    context = buffer(rows * keys);
    prefix = buffer(rows * width);
  }
};

PELT_FAST_INLINE void draw(const Weights& g, DrawnMasks& f, int64_t first, int64_t rows) {
  draw(f.context.get(), g.drop_context, (g.first + first) * f.keys, rows * f.keys);
  draw(f.prefix.get(), g.drop_prefix, (g.first + first) * f.width, rows * f.width);
}

// row *= by * factor
PELT_FAST_INLINE void drop_row(float* row, int64_t n, float by, const float* factor) {
#pragma GCC ivdep
  for (int64_t j = 0; j < n; ++j) row[j] *= by * factor[j];
}

PELT_FAST_INLINE void rectify(float* row, int64_t n) {
  for (int64_t j = 0; j < n; ++j) row[j] = row[j] < 0 ? 0.0f : row[j];
}

// w = m w,  d = scale w (m d - delta), of the weights before dropout.
PELT_FAST_INLINE void gradients_of(float* w, float* d, int64_t n, const float* factor, float delta,
                                   float scale) {
#pragma GCC ivdep
  for (int64_t j = 0; j < n; ++j) {
    const float kept = factor[j] * w[j];
    d[j] = scale * (kept * d[j] - w[j] * delta);
    w[j] = kept;
  }
}

// The same of f(z) = ReLU: d = scale m d where z > 0.
PELT_FAST_INLINE void gradients_of_relu(float* z, float* d, int64_t n, const float* factor,
                                        float scale) {
#pragma GCC ivdep
  for (int64_t j = 0; j < n; ++j) {
    d[j] *= z[j] > 0 ? scale * factor[j] : 0.0f;
    z[j] = z[j] < 0 ? 0.0f : z[j] * factor[j];
  }
}

// Σ m w d of a row, of the weights before dropout.
template <int W>
PELT_FAST_INLINE float delta_of(const float* w, const float* d, int64_t n, const float* factor) {
  using Vector = typename VectorOf<W>::type;
  Vector sums = {};
  int64_t j = 0;
  for (; j + W <= n; j += W)
    sums += *reinterpret_cast<const Vector*>(factor + j) *
            *reinterpret_cast<const Vector*>(w + j) * *reinterpret_cast<const Vector*>(d + j);
  float sum = 0;
  for (int i = 0; i < W; ++i) sum += sums[i];
  for (; j < n; ++j) sum += factor[j] * w[j] * d[j];
  return sum;
}

}  // namespace pelt_fast
