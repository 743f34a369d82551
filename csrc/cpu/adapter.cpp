// An adapter in one pass each way: the bottleneck stays in cache between its two products.
//
// Shapes   x, dx (M, K); base, y, dy (M, N); t (M, R); down (R, K), up (N, R) and their gradients;
//          biases (R), (N). f by its number in reference.activations.ACTIVATIONS. R <= kMaxRank.
// Maths    t = x downᵀ + down_bias;  h = mask * f(t);  y = base + scale (h upᵀ + up_bias)
//          dt = scale mask f'(t) (dy up);  d_up = scale dyᵀ h;  d_up_bias = scale Σ dy
//          dx = residual + dt down;  d_down = dtᵀ x;  d_down_bias = Σ dt, parts of rows in order
// Traffic  forward x and base read, y written (t beside it); where x is base it is read once, the
//          second time from cache. Backward dy, x, t read, dx written; the residual dy likewise.

#include <torch/csrc/stable/library.h>

#include "arguments.h"
#include "bottleneck.h"

namespace pelt_fast {
namespace {

constexpr Mask kWhole{};  // drops nothing

struct Adapter {
  Rows<void> x, base, y, t;          // t may be missing
  const float *down, *down_bias;     // (K, padded R), (padded R)
  const float *up, *up_bias;         // (R, padded N), (padded N) times scale or null
  int64_t rows, depth, width, rank;  // M, K, N, R
  float scale;
  Activation activation;
  ScalarType dtype;
  Mask mask;
};

template <int W, typename T>
PELT_FAST_INLINE void adapter_one(const Adapter& g, int64_t index) {
  alignas(64) Tile h;
  const int64_t pad = padded(g.rank);
  const Block block = block_of(index, g.rows, g.depth);
  for (int i = 0; i < kRows; ++i) std::memcpy(h[i], g.down_bias, pad * sizeof(float));
  down_block<W, T>(h, g.x, g.down, pad, kWhole, block);
  if (g.t.data != nullptr) store_narrow<T>(h, g.t, block, g.rank);
  bottleneck(g.activation, g.mask, h, nullptr, g.rank, block);
  scale_rows(h, pad, g.scale);
  up_block<W, T>(h, g.rank, g.up, g.up_bias, g.base, g.y, kWhole, block_of(index, g.rows, g.width));
}

// Blocks [first, last).
template <int W>
PELT_FAST_INLINE void adapter(const Adapter& g, int64_t first, int64_t last) {
  for (int64_t b = first; b < last; ++b) {
    PELT_FAST_BY_TYPE(g.dtype, adapter_one<W, T>(g, b))
  }
}
PELT_FAST_FOR_EACH_INSTRUCTION_SET(adapter, Adapter)

struct AdapterBackward {
  Rows<void> dy, x, t, residual, dx;  // residual and dx may be missing, x without d_down
  const float *down, *up;             // (padded R, padded K), (padded N, padded R)
  // parts of the gradients: (parts, padded N, padded R), (parts, padded N), (parts, padded R,
  // padded K), (parts, padded R), or missing
  float *d_up, *d_up_bias, *d_down, *d_down_bias;
  int64_t rows, depth, width, rank, part_rows;
  float scale;
  bool need_dt;
  Activation activation;
  ScalarType dtype;
  Mask mask;
};

struct Part {
  float *d_up, *d_up_bias, *d_down, *d_down_bias;
};

template <int W, typename T>
PELT_FAST_INLINE void backward_one(const AdapterBackward& g, const Part& part, int64_t index) {
  alignas(64) Tile h, slope, dt;
  const int64_t pad = padded(g.rank);
  const Block wide = block_of(index, g.rows, g.width), deep = block_of(index, g.rows, g.depth);
  load_narrow<T>(h, g.t, wide, g.rank);
  bottleneck(g.activation, g.mask, h, &slope, g.rank, wide);
  clear(dt, pad);
  up_backward_block<W, T>(g.need_dt ? &dt : nullptr, &h, g.dy, g.up, part.d_up, part.d_up_bias, pad,
                          wide);
  if (!g.need_dt) return;
  for (int i = 0; i < wide.rows; ++i)
    for (int64_t j = 0; j < pad; ++j) dt[i][j] *= g.scale * slope[i][j];
  if (part.d_down_bias != nullptr) add_columns<W>(part.d_down_bias, dt, wide.rows, pad);
  if (part.d_down == nullptr && g.dx.data == nullptr) return;
  down_backward_block<W, T>(dt, g.rank, pad, g.down, g.residual, g.dx, g.x, part.d_down, kWhole,
                            deep);
}

// Parts [first, last) of the rows.
template <int W>
PELT_FAST_INLINE void backward(const AdapterBackward& g, int64_t first, int64_t last) {
  const int64_t pad = padded(g.rank), wide = padded(g.width), deep = padded(g.depth);
  for (int64_t p = first; p < last; ++p) {
    const Part part{cleared(g.d_up, p, wide * pad), cleared(g.d_up_bias, p, wide),
                    cleared(g.d_down, p, pad * deep), cleared(g.d_down_bias, p, pad)};
    for (int64_t b = p * g.part_rows / kRows; b < end_of_part(p, g.part_rows, g.rows); ++b) {
      PELT_FAST_BY_TYPE(g.dtype, backward_one<W, T>(g, part, b))
    }
  }
}
PELT_FAST_FOR_EACH_INSTRUCTION_SET(backward, AdapterBackward)

Tensor adapter_(Tensor y, std::optional<Tensor> t, Tensor x, Tensor base, Tensor down,
                std::optional<Tensor> down_bias, Tensor up, std::optional<Tensor> up_bias,
                double scale, int64_t activation, std::optional<Tensor> seed, int64_t threshold,
                double keep_scale) {
  const ScalarType dtype = check_activation("x", x);
  check_rows("x", x, -1, -1, dtype);
  check_rows("y", y, x.size(0), -1, dtype);
  const int64_t rows = x.size(0), depth = x.size(1), width = y.size(1);
  const int64_t rank = check_rank(down.dim() == 2 ? down.size(0) : 0);
  check_rows("base", base, rows, width, dtype);
  check_weight("down", down, rank, depth);
  check_weight("up", up, width, rank);
  check_vector("down_bias", down_bias, rank);
  check_vector("up_bias", up_bias, width);
  if (t.has_value()) check_rows("t", *t, rows, rank, dtype);
  const int64_t pad = padded(rank), wide = padded(width);
  const auto factor = static_cast<float>(scale);
  const Buffer first = packed(down, true, depth, pad), second = packed(up, true, rank, wide);
  const Buffer first_bias = packed_vector(down_bias, pad);
  const Buffer second_bias = packed_vector(up_bias, wide, factor);
  const Adapter g{rows_of<void>(x),
                  rows_of<void>(base),
                  rows_of<void>(y),
                  t.has_value() ? rows_of<void>(*t) : Rows<void>{},
                  first.get(),
                  first_bias.get(),
                  second.get(),
                  up_bias.has_value() ? second_bias.get() : nullptr,
                  rows,
                  depth,
                  width,
                  rank,
                  factor,
                  activation_of(activation),
                  dtype,
                  mask_of(seed, threshold, keep_scale)};
  run(adapter_for_this_machine, g, blocks_of(rows), 1);
  return y;
}

// A gradient's parts; `to` where they are asked for.
Buffer parts_for(const char* name, const std::optional<Tensor>& d, int64_t rows, int64_t columns,
                 int64_t floats, float** to) {
  *to = nullptr;
  if (!d.has_value()) return nullptr;
  if (columns < 0) {
    check_vector(name, d, rows);
  } else {
    check_weight(name, *d, rows, columns);
  }
  PELT_FAST_CHECK(d->is_contiguous(), name, " must be contiguous");
  Buffer parts = buffer(floats);
  *to = parts.get();
  return parts;
}

void adapter_backward_(Tensor dy, Tensor x, Tensor t, Tensor down, Tensor up,
                       std::optional<Tensor> residual, std::optional<Tensor> dx,
                       std::optional<Tensor> d_down, std::optional<Tensor> d_down_bias,
                       std::optional<Tensor> d_up, std::optional<Tensor> d_up_bias, double scale,
                       int64_t activation, std::optional<Tensor> seed, int64_t threshold,
                       double keep_scale) {
  const ScalarType dtype = check_activation("dy", dy);
  check_rows("dy", dy, -1, -1, dtype);
  check_rows("x", x, dy.size(0), -1, dtype);
  const int64_t rows = dy.size(0), depth = x.size(1), width = dy.size(1);
  const int64_t rank = check_rank(t.dim() == 2 ? t.size(1) : 0);
  check_rows("t", t, rows, rank, dtype);
  check_weight("down", down, rank, depth);
  check_weight("up", up, width, rank);
  if (residual.has_value()) check_rows("residual", *residual, rows, depth, dtype);
  if (dx.has_value()) check_rows("dx", *dx, rows, depth, dtype);
  const int64_t pad = padded(rank), deep = padded(depth), wide = padded(width);
  const int64_t part_rows = rows_of_part(rows, rank), count = (rows + part_rows - 1) / part_rows;
  const Buffer first = packed(down, false, pad, deep), second = packed(up, false, wide, pad);
  AdapterBackward g{};
  g.dy = rows_of<void>(dy), g.x = rows_of<void>(x), g.t = rows_of<void>(t);
  if (residual.has_value()) g.residual = rows_of<void>(*residual);
  if (dx.has_value()) g.dx = rows_of<void>(*dx);
  g.down = first.get(), g.up = second.get();
  g.rows = rows, g.depth = depth, g.width = width, g.rank = rank, g.part_rows = part_rows;
  g.scale = static_cast<float>(scale), g.activation = activation_of(activation), g.dtype = dtype;
  g.mask = mask_of(seed, threshold, keep_scale);
  g.need_dt = dx.has_value() || d_down.has_value() || d_down_bias.has_value();
  const Buffer of_up = parts_for("d_up", d_up, width, rank, count * wide * pad, &g.d_up);
  const Buffer of_up_bias =
      parts_for("d_up_bias", d_up_bias, width, -1, count * wide, &g.d_up_bias);
  const Buffer of_down = parts_for("d_down", d_down, rank, depth, count * pad * deep, &g.d_down);
  const Buffer of_down_bias =
      parts_for("d_down_bias", d_down_bias, rank, -1, count * pad, &g.d_down_bias);
  run(backward_for_this_machine, g, count, 1);
  if (g.d_up != nullptr) add_parts(*d_up, g.d_up, count, wide * pad, pad, g.scale);
  if (g.d_up_bias != nullptr) add_parts(*d_up_bias, g.d_up_bias, count, wide, wide, g.scale);
  if (g.d_down != nullptr) add_parts(*d_down, g.d_down, count, pad * deep, deep, 1);
  if (g.d_down_bias != nullptr) add_parts(*d_down_bias, g.d_down_bias, count, pad, pad, 1);
}

}  // namespace
}  // namespace pelt_fast

STABLE_TORCH_LIBRARY_FRAGMENT(pelt_fast_cpp, m) {
  m.def(
      "adapter_(Tensor(a!) y, Tensor(b!)? t, Tensor x, Tensor base, Tensor down, Tensor? down_bias,"
      " Tensor up, Tensor? up_bias, float scale, int activation, Tensor? seed, int threshold,"
      " float keep_scale) -> Tensor(a!)");
  m.def(
      "adapter_backward_(Tensor dy, Tensor x, Tensor t, Tensor down, Tensor up, Tensor? residual,"
      " Tensor(a!)? dx, Tensor(b!)? d_down, Tensor(c!)? d_down_bias, Tensor(d!)? d_up,"
      " Tensor(e!)? d_up_bias, float scale, int activation, Tensor? seed, int threshold,"
      " float keep_scale) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pelt_fast_cpp, CPU, m) {
  m.impl("adapter_", TORCH_BOX(&pelt_fast::adapter_));
  m.impl("adapter_backward_", TORCH_BOX(&pelt_fast::adapter_backward_));
}
