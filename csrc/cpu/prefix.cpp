// The prefix part of attention: merged into the context's output, and its backward.
//
// Shapes   q, o, do, dq (B, H, T, D); lse (B, H, T); k, v (G, P, D), a head for each H / G queries'
//          heads; dk, dv (H, P, D). D <= kColumns, P <= kMaxPrefix; any strides, D contiguous.
// Maths    S = scale q kᵀ;  gated: l = logaddexp(lse, logsumexp S), W = exp(S - l),
//          o = exp(lse - l) o + W v, lse = l;  added: W = softmax S or relu S, o = o + W v
//          dW = do vᵀ;  dS = W (dW - δ), δ = Σ do o (gated) or Σ W dW; relu: dS = dW where S > 0
//          dq += scale dS k;  dk = scale dSᵀ q;  dv = Wᵀ do, parts of rows added in their order
// Traffic  forward q, o read, o written; backward q, do, o, dq read, dq written. Scores stay in
//          cache, kRows queries at a time.

#include <torch/csrc/stable/library.h>

#include "prefix.h"

namespace pelt_fast {
namespace {

constexpr int64_t kParts = 8;  // of the rows of a head, at most

// Scores of kRows queries, in `s`; the queries stay in `q`.
template <int W, typename T>
PELT_FAST_INLINE void score(const Prefix& g, const T* from, int64_t group, Tile& q, Scores& s,
                            int rows) {
  const int64_t pad = padded(g.length), wide = padded(g.dim);
  load(q, from, g.q.row, rows, static_cast<int>(g.dim));
  for (int i = 0; i < kRows; ++i) std::memset(s[i], 0, pad * sizeof(float));
  product<W>(&s[0][0], kMaxPrefix, &q[0][0], kColumns, g.kt + group * wide * pad, pad, kRows, pad,
             g.dim);
}

template <int W, typename T>
PELT_FAST_INLINE void merge_block(const Prefix& g, int64_t b, int64_t h, int64_t t) {
  alignas(64) Tile q;
  alignas(64) Scores s;
  float lse[kRows] = {}, kept[kRows];
  const int rows = static_cast<int>(std::min<int64_t>(kRows, g.queries - t));
  const int64_t group = h / (g.heads / g.groups), pad = padded(g.length), wide = padded(g.dim);
  score<W, T>(g, g.q.at<T>(b, h, t), group, q, s, rows);
  float* own = g.lse.at<float>(b, h, t);
  for (int i = 0; i < rows; ++i) lse[i] = own[i * g.lse.row];
  weigh<W>(g, s, lse, kept, rows, false);
  T* o = g.o.at<T>(b, h, t);
  load(q, o, g.o.row, rows, static_cast<int>(g.dim));
  if (g.gated) {
    for (int i = 0; i < rows; ++i) {
      const float factor = kept[i];
      for (int j = 0; j < wide; ++j) q[i][j] *= factor;
      own[i * g.lse.row] = lse[i];
    }
  }
  product<W>(&q[0][0], kColumns, &s[0][0], kMaxPrefix, g.v + group * pad * wide, wide, kRows, wide,
             g.length);
  store<T>(q, nullptr, 0, o, g.o.row, rows, static_cast<int>(g.dim));
}

template <int W>
PELT_FAST_INLINE void merge(const Prefix& g, int64_t first, int64_t last) {
  const int64_t blocks = g.blocks();
  for (int64_t unit = first; unit < last; ++unit) {
    const int64_t t = unit % blocks * kRows, h = unit / blocks % g.heads;
    const int64_t b = unit / blocks / g.heads;
    PELT_FAST_BY_TYPE(g.dtype, merge_block<W, T>(g, b, h, t))
  }
}
PELT_FAST_FOR_EACH_INSTRUCTION_SET(merge, Prefix)

// dS over dW in place.
template <int W>
PELT_FAST_INLINE void score_gradient(const Prefix& g, Scores& d, const Scores& w,
                                     const float* delta, int rows) {
  const auto pad = static_cast<int>(padded(g.length));
  for (int i = 0; i < rows; ++i) {
    float* to = d[i];
    const float* weight = w[i];
    if (g.relu) {
      for (int j = 0; j < pad; ++j) to[j] = weight[j] > 0 ? to[j] : 0.0f;
      continue;
    }
    const float mean = g.gated ? delta[i] : dot<W>(weight, to, pad);
    for (int j = 0; j < pad; ++j) to[j] = weight[j] * (to[j] - mean);
  }
}

template <int W, typename T>
PELT_FAST_INLINE void backward_block(const Prefix& g, int64_t b, int64_t h, int64_t t, float* dk,
                                     float* dv) {
  alignas(64) Tile q, d_o, other;
  alignas(64) Scores w, d;
  float lse[kRows] = {}, delta[kRows];
  const int rows = static_cast<int>(std::min<int64_t>(kRows, g.queries - t));
  const auto dim = static_cast<int>(g.dim);
  const int64_t group = h / (g.heads / g.groups), pad = padded(g.length), wide = padded(g.dim);
  const float* own = g.lse.at<float>(b, h, t);
  for (int i = 0; i < rows; ++i) lse[i] = own[i * g.lse.row];
  score<W, T>(g, g.q.at<T>(b, h, t), group, q, w, rows);
  weigh<W>(g, w, lse, delta, rows, g.gated);
  load(d_o, g.d_o.at<T>(b, h, t), g.d_o.row, rows, dim);
  if (g.gated) {
    load(other, g.o.at<T>(b, h, t), g.o.row, rows, dim);
    for (int i = 0; i < rows; ++i) delta[i] = dot<W>(d_o[i], other[i], wide);
  }
  for (int i = 0; i < kRows; ++i) std::memset(d[i], 0, pad * sizeof(float));
  product<W>(&d[0][0], kMaxPrefix, &d_o[0][0], kColumns, g.vt + group * wide * pad, pad, kRows, pad,
             g.dim);
  score_gradient<W>(g, d, w, delta, rows);
  product<W, true>(dv, wide, &w[0][0], kMaxPrefix, &d_o[0][0], kColumns, pad, wide, rows);
  product<W, true>(dk, wide, &d[0][0], kMaxPrefix, &q[0][0], kColumns, pad, wide, rows);
  if (g.dq.data == nullptr) return;
  T* dq = g.dq.at<T>(b, h, t);
  clear(other, wide);
  product<W>(&other[0][0], kColumns, &d[0][0], kMaxPrefix, g.k + group * pad * wide, wide, kRows,
             wide, g.length);
  store<T>(other, dq, g.dq.row, dq, g.dq.row, rows, dim);
}

template <int W>
PELT_FAST_INLINE void backward(const Prefix& g, int64_t first, int64_t last) {
  const int64_t blocks = g.blocks(), size = padded(g.length) * padded(g.dim);
  for (int64_t unit = first; unit < last; ++unit) {
    const int64_t h = unit / g.part_count, part = unit % g.part_count;
    float *dk = g.parts + unit * 2 * size, *dv = dk + size;
    std::fill_n(dk, 2 * size, 0.0f);
    const int64_t end = std::min((part + 1) * g.part_blocks, g.batch * blocks);
    for (int64_t i = part * g.part_blocks; i < end; ++i) {
      const int64_t b = i / blocks, t = i % blocks * kRows;
      PELT_FAST_BY_TYPE(g.dtype, backward_block<W, T>(g, b, h, t, dk, dv))
    }
  }
}
PELT_FAST_FOR_EACH_INSTRUCTION_SET(backward, Prefix)

// All heads of a prefix, (rows, columns) padded, a head after the other.
Buffer packed_heads(const Tensor& p, bool transposed, float scale) {
  const int64_t groups = p.size(0), length = p.size(1), dim = p.size(2);
  const int64_t rows = padded(transposed ? dim : length),
                columns = padded(transposed ? length : dim);
  Buffer out = buffer(groups * rows * columns);
  std::fill_n(out.get(), groups * rows * columns, 0.0f);
  const auto* data = static_cast<const float*>(p.const_data_ptr());
  const int64_t by_group = p.stride(0), by_row = p.stride(1), by_column = p.stride(2);
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t i = 0; i < length; ++i)
      for (int64_t j = 0; j < dim; ++j)
        out[(g * rows + (transposed ? j : i)) * columns + (transposed ? i : j)] =
            scale * data[g * by_group + i * by_row + j * by_column];
  return out;
}

void prefix_merge_(Tensor o, Tensor lse, Tensor q, Tensor k, Tensor v, double scale, bool relu,
                   bool gated) {
  Prefix g = checked(q, lse, k, v, relu, gated);
  g.o = heads_of("o", o, q, g.dtype);
  if (g.queries <= kFewQueries && g.dim % kPad == 0 && k.stride(2) == 1 && v.stride(2) == 1) {
    g.own_k = prefix_rows(k), g.own_v = prefix_rows(v), g.scale = static_cast<float>(scale);
    return merge_few_queries(g);
  }
  const Buffer kt = packed_heads(k, true, static_cast<float>(scale)),
               vs = packed_heads(v, false, 1);
  g.kt = kt.get(), g.v = vs.get();
  run(merge_for_this_machine, g, g.batch * g.heads * g.blocks(), 4);
}

void prefix_backward_(std::optional<Tensor> dq, Tensor dk, Tensor dv, Tensor d_o, Tensor q,
                      Tensor k, Tensor v, Tensor o, Tensor lse, double scale, bool relu,
                      bool gated) {
  Prefix g = checked(q, lse, k, v, relu, gated);
  g.o = heads_of("o", o, q, g.dtype);
  g.d_o = heads_of("d_o", d_o, q, g.dtype);
  if (dq.has_value()) g.dq = heads_of("dq", *dq, q, g.dtype);
  for (const Tensor* t : {&dk, &dv})
    PELT_FAST_CHECK(t->dim() == 3 && t->size(0) == g.heads && t->size(1) == g.length &&
                        t->size(2) == g.dim && t->is_contiguous() &&
                        t->scalar_type() == ScalarType::Float,
                    "dk and dv must be contiguous float32 (", g.heads, ", ", g.length, ", ", g.dim,
                    "), got ", shape_of(*t));
  const auto factor = static_cast<float>(scale);
  const Buffer kt = packed_heads(k, true, factor), ks = packed_heads(k, false, factor);
  const Buffer vt = packed_heads(v, true, 1);
  g.kt = kt.get(), g.k = ks.get(), g.vt = vt.get();
  const int64_t blocks = g.batch * g.blocks(), size = padded(g.length) * padded(g.dim);
  g.part_count = std::max<int64_t>(1, std::min(kParts, blocks / 8));
  g.part_blocks = (blocks + g.part_count - 1) / g.part_count;
  const Buffer parts = buffer(g.heads * g.part_count * 2 * size);
  g.parts = parts.get();
  run(backward_for_this_machine, g, g.heads * g.part_count, 1);
  for (int64_t h = 0; h < g.heads; ++h) {
    for (int which = 0; which < 2; ++which) {
      auto* out = static_cast<float*>((which == 0 ? dk : dv).mutable_data_ptr());
      out += h * g.length * g.dim;
      std::fill_n(out, g.length * g.dim, 0.0f);
      for (int64_t p = 0; p < g.part_count; ++p) {
        const float* part = g.parts + ((h * g.part_count + p) * 2 + which) * size;
        for (int64_t i = 0; i < g.length; ++i)
          for (int64_t j = 0; j < g.dim; ++j)
            out[i * g.dim + j] += (which == 0 ? factor : 1.0f) * part[i * padded(g.dim) + j];
      }
    }
  }
}

}  // namespace
}  // namespace pelt_fast

STABLE_TORCH_LIBRARY_FRAGMENT(pelt_fast_cpp, m) {
  m.def(
      "prefix_merge_(Tensor(a!) o, Tensor(b!) lse, Tensor q, Tensor k, Tensor v, float scale,"
      " bool relu, bool gated) -> ()");
  m.def(
      "prefix_backward_(Tensor(a!)? dq, Tensor(b!) dk, Tensor(c!) dv, Tensor d_o, Tensor q, Tensor "
      "k,"
      " Tensor v, Tensor o, Tensor lse, float scale, bool relu, bool gated) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pelt_fast_cpp, CPU, m) {
  m.impl("prefix_merge_", TORCH_BOX(&pelt_fast::prefix_merge_));
  m.impl("prefix_backward_", TORCH_BOX(&pelt_fast::prefix_backward_));
}
