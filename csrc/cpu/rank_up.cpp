// out = drop(base) + scale (h bᵀ + bias), and its backward in one pass over dy.
//
// Shapes   h, dh (M, R); b (N, R); bias, d_bias (N); base, out, dy (M, N); db (N, R). R <= kMaxRank.
// Maths    out = mask * base + scale (h bᵀ + bias)
//          dh = scale dy b;  db = scale dyᵀ h;  d_bias = scale Σ dy, parts of rows added in order
// Traffic  forward base read and out written once (one tensor: in place); backward dy read once.

#include <torch/csrc/stable/library.h>

#include "arguments.h"
#include "blocks.h"

namespace pelt_fast {
namespace {

struct Up {
  Rows<void> h, base, out;  // base may be missing
  const float *b, *bias;    // (R, padded N), (padded N) times scale or null
  float scale;
  int64_t rows, width, rank;
  ScalarType dtype;
  Mask mask;
};

template <int W, typename T>
PELT_FAST_INLINE void up_one(const Up& g, const Block& block) {
  alignas(64) Tile h;
  load_narrow<T>(h, g.h, block, g.rank);
  scale_rows(h, padded(g.rank), g.scale);
  up_block<W, T>(h, g.rank, g.b, g.bias, g.base, g.out, g.mask, block);
}

// Blocks [first, last).
template <int W>
PELT_FAST_INLINE void up(const Up& g, int64_t first, int64_t last) {
  for (int64_t b = first; b < last; ++b) {
    PELT_FAST_BY_TYPE(g.dtype, up_one<W, T>(g, block_of(b, g.rows, g.width)))
  }
}
PELT_FAST_FOR_EACH_INSTRUCTION_SET(up, Up)

struct UpBackward {
  Rows<void> dy, h, dh;       // h and dh may be missing
  const float* b;             // (padded N, padded R)
  float *parts, *bias_parts;  // (parts, padded N, padded R), (parts, padded N), or missing
  float scale;
  int64_t rows, width, rank, part_rows;
  ScalarType dtype;
};

template <int W, typename T>
PELT_FAST_INLINE void up_backward_one(const UpBackward& g, float* part, float* bias,
                                      const Block& block) {
  alignas(64) Tile h, dh;
  const int64_t pad = padded(g.rank);
  const bool need_dh = g.dh.data != nullptr;
  if (part != nullptr) load_narrow<T>(h, g.h, block, g.rank);
  if (need_dh) clear(dh, pad);
  up_backward_block<W, T>(need_dh ? &dh : nullptr, &h, g.dy, g.b, part, bias, pad, block);
  if (!need_dh) return;
  scale_rows(dh, pad, g.scale);
  store_narrow<T>(dh, g.dh, block, g.rank);
}

// Parts [first, last) of the rows.
template <int W>
PELT_FAST_INLINE void up_backward(const UpBackward& g, int64_t first, int64_t last) {
  const int64_t wide = padded(g.width), size = wide * padded(g.rank);
  for (int64_t p = first; p < last; ++p) {
    float *part = cleared(g.parts, p, size), *bias = cleared(g.bias_parts, p, wide);
    for (int64_t b = p * g.part_rows / kRows; b < end_of_part(p, g.part_rows, g.rows); ++b) {
      PELT_FAST_BY_TYPE(g.dtype, up_backward_one<W, T>(g, part, bias, block_of(b, g.rows, g.width)))
    }
  }
}
PELT_FAST_FOR_EACH_INSTRUCTION_SET(up_backward, UpBackward)

Tensor rank_up_(Tensor out, std::optional<Tensor> base, Tensor h, Tensor b,
                std::optional<Tensor> bias, double scale, std::optional<Tensor> seed,
                int64_t threshold, double keep_scale) {
  const ScalarType dtype = check_activation("out", out);
  check_rows("out", out, -1, -1, dtype);
  const int64_t rows = out.size(0), width = out.size(1);
  const int64_t rank = check_rank(h.dim() == 2 ? h.size(1) : 0);
  check_rows("h", h, rows, rank, dtype);
  check_weight("b", b, width, rank);
  check_vector("bias", bias, width);
  if (base.has_value()) check_rows("base", *base, rows, width, dtype);
  const int64_t wide = padded(width);
  const auto factor = static_cast<float>(scale);
  const Buffer weight = packed(b, true, rank, wide), start = packed_vector(bias, wide, factor);
  const Mask mask = mask_of(seed, threshold, keep_scale);
  PELT_FAST_CHECK(mask.threshold == 0 || base.has_value(),
                  "seed is of base's dropout: base is missing");
  const Up g{rows_of<void>(h),
             base.has_value() ? rows_of<void>(*base) : Rows<void>{},
             rows_of<void>(out),
             weight.get(),
             bias.has_value() ? start.get() : nullptr,
             factor,
             rows,
             width,
             rank,
             dtype,
             mask};
  run(up_for_this_machine, g, blocks_of(rows), 1);
  return out;
}

void rank_up_backward_(Tensor dy, std::optional<Tensor> h, std::optional<Tensor> b, double scale,
                       std::optional<Tensor> dh, std::optional<Tensor> db,
                       std::optional<Tensor> d_bias) {
  const ScalarType dtype = check_activation("dy", dy);
  check_rows("dy", dy, -1, -1, dtype);
  PELT_FAST_CHECK(dh.has_value() == b.has_value(), "b and dh must come together");
  PELT_FAST_CHECK(db.has_value() == h.has_value(), "h and db must come together");
  const int64_t rows = dy.size(0), width = dy.size(1);
  const int64_t rank = dh.has_value() ? dh->size(1) : h.has_value() ? h->size(1) : 1;
  const int64_t pad = padded(check_rank(rank)), wide = padded(width);
  const int64_t part_rows = rows_of_part(rows, rank), count = (rows + part_rows - 1) / part_rows;
  UpBackward g{rows_of<void>(dy),         {},   {},    nullptr, nullptr,   nullptr,
               static_cast<float>(scale), rows, width, rank,    part_rows, dtype};
  Buffer weight, parts, bias_parts;
  if (dh.has_value()) {
    check_rows("dh", *dh, rows, rank, dtype);
    check_weight("b", *b, width, rank);
    weight = packed(*b, false, wide, pad);
    g.b = weight.get();
    g.dh = rows_of<void>(*dh);
  }
  if (db.has_value()) {
    check_rows("h", *h, rows, rank, dtype);
    check_weight("db", *db, width, rank);
    PELT_FAST_CHECK(db->is_contiguous(), "db must be contiguous");
    parts = buffer(count * wide * pad);
    g.parts = parts.get();
    g.h = rows_of<void>(*h);
  }
  if (d_bias.has_value()) {
    check_vector("d_bias", d_bias, width);
    PELT_FAST_CHECK(d_bias->is_contiguous(), "d_bias must be contiguous");
    bias_parts = buffer(count * wide);
    g.bias_parts = bias_parts.get();
  }
  run(up_backward_for_this_machine, g, count, 1);
  if (db.has_value()) add_parts(*db, parts.get(), count, wide * pad, pad, g.scale);
  if (d_bias.has_value()) add_parts(*d_bias, bias_parts.get(), count, wide, wide, g.scale);
}

}  // namespace
}  // namespace pelt_fast

STABLE_TORCH_LIBRARY_FRAGMENT(pelt_fast_cpp, m) {
  m.def(
      "rank_up_(Tensor(a!) out, Tensor? base, Tensor h, Tensor b, Tensor? bias, float scale,"
      " Tensor? seed, int threshold, float keep_scale) -> Tensor(a!)");
  m.def(
      "rank_up_backward_(Tensor dy, Tensor? h, Tensor? b, float scale, Tensor(a!)? dh,"
      " Tensor(b!)? db, Tensor(c!)? d_bias) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pelt_fast_cpp, CPU, m) {
  m.impl("rank_up_", TORCH_BOX(&pelt_fast::rank_up_));
  m.impl("rank_up_backward_", TORCH_BOX(&pelt_fast::rank_up_backward_));
}
