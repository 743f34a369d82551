// The prefix part of attention: merged into the context's output, and its backward.
//
// Shapes   q, o, do, dq (B, H, T, D); lse (B, H, T); k, v (G, P, D), a head for each H / G queries'
//          heads; dk, dv (H, P, D). D <= kColumns, P <= kMaxPrefix; any strides, D contiguous.
// Maths    S = scale q kᵀ;  gated: l = logaddexp(lse, logsumexp S), W = exp(S - l),
//          o = exp(lse - l) o + W v, lse = l;  added: W = softmax S or relu S, o = o + W v
//          dW = do vᵀ;  dS = W (dW - δ), δ = Σ do o (gated) or Σ W dW; relu: dS = dW where S > 0
//          dq += scale dS k;  dk = scale dSᵀ q;  dv = Wᵀ do, parts of rows added in their order
//          A few queries over a context without a mask: attention over both in one call.
// Traffic  forward q, o read, o written; backward q, do, o, dq read, dq written. Scores stay in
//          cache, kRows queries at a time.

#include <torch/csrc/stable/library.h>

#include "arguments.h"
#include "exp.h"

namespace pelt_fast {
namespace {

constexpr int kMaxPrefix = 256;
constexpr int64_t kParts = 8;       // of the rows of a head, at most
constexpr float kHidden = -1e30f;   // the score of what pads a prefix
constexpr int64_t kFewQueries = 8;  // a block of kRows would be almost empty

using Scores = float[kRows][kMaxPrefix];

struct Heads {
  void* data;
  int64_t batch, head, row;  // strides
  template <typename T>
  PELT_FAST_INLINE T* at(int64_t b, int64_t h, int64_t t) const {
    return static_cast<T*>(data) + b * batch + h * head + t * row;
  }
};

struct Prefix {
  Heads q, o, d_o, dq, lse;
  const float *k, *v;    // (G, padded P, padded D), k times scale
  const float *kt, *vt;  // (G, padded D, padded P)
  Heads own_k, own_v;    // k and v as they came, for a few queries
  Heads context_k, context_v;
  float scale;
  int64_t keys;  // of the context
  float* parts;  // (H, parts, 2, padded P, padded D)
  int64_t batch, heads, groups, queries, dim, length, part_blocks, part_count;
  ScalarType dtype;
  bool relu, gated;
  int64_t blocks() const { return (queries + kRows - 1) / kRows; }  // of one head in one batch row
};

// Weights W over the scores in place. Merged, lse is the joint one. Else it becomes so (gated) or
// the prefix's own, and `kept` what is left of the context.
template <int W>
PELT_FAST_INLINE void weigh(const Prefix& g, Scores& s, float* lse, float* kept, int rows,
                            bool merged) {
  const auto length = static_cast<int>(g.length);
  const auto pad = static_cast<int>(padded(g.length));
  float most[kRows] = {}, total[kRows], inverse[kRows];
  for (int i = 0; i < kRows; ++i) total[i] = 1;
  for (int i = 0; i < rows; ++i) {
    float* row = s[i];
    if (g.relu) {
      for (int j = 0; j < pad; ++j) row[j] = row[j] > 0 ? row[j] : 0.0f;
      continue;
    }
    for (int j = length; j < pad; ++j) row[j] = kHidden;
    most[i] = lse[i];
    if (!merged) {
      const float own = most_of<W>(row, pad);
      most[i] = g.gated && lse[i] > own ? lse[i] : own;
    }
    const float shift = most[i];
    for (int j = 0; j < pad; ++j) row[j] = exp32(row[j] - shift);
    total[i] = sum_of<W>(row, pad);
  }
  if (g.relu || merged) return;
  for (int i = 0; i < kRows; ++i) {
    const float context = g.gated ? exp32(lse[i] - most[i]) : 0.0f;
    const float sum = total[i] + context;
    inverse[i] = 1.0f / sum;
    kept[i] = context * inverse[i];
    lse[i] = most[i] + log32(sum);
  }
  for (int i = 0; i < rows; ++i) {
    float* row = s[i];
    const float factor = inverse[i];
    for (int j = 0; j < pad; ++j) row[j] *= factor;
  }
}

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

// out = exp(lse - l) out + W v of one query, q times scale; lse = l if gated. k and v are read as
// they are: packing them would cost more than the product.
template <int W>
PELT_FAST_INLINE void merge_one(const Prefix& g, int64_t h, const float* q, float* out,
                                float& lse) {
  using Vector = typename VectorOf<W>::type;
  alignas(64) Scores s;
  float joint[kRows] = {}, kept[kRows];
  const int64_t group = h / (g.heads / g.groups);
  for (int64_t p = 0; p < g.length; ++p) s[0][p] = dot<W>(q, g.own_k.at<float>(0, group, p), g.dim);
  for (int64_t p = g.length; p < padded(g.length); ++p) s[0][p] = 0;
  joint[0] = lse;
  weigh<W>(g, s, joint, kept, 1, false);
  const float factor = g.gated ? kept[0] : 1.0f;
  for (int64_t j = 0; j < g.dim; ++j) out[j] *= factor;
  for (int64_t p = 0; p < g.length; ++p) {
    const float* row = g.own_v.at<float>(0, group, p);
    for (int64_t j = 0; j < g.dim; j += W)
      *reinterpret_cast<Vector*>(out + j) += s[0][p] * *reinterpret_cast<const Vector*>(row + j);
  }
  if (g.gated) lse = joint[0];
}

template <int W, typename T>
PELT_FAST_INLINE void merge_query(const Prefix& g, int64_t b, int64_t h, int64_t t) {
  alignas(64) float q[kColumns], out[kColumns];
  const T* from = g.q.at<T>(b, h, t);
  T* o = g.o.at<T>(b, h, t);
  for (int64_t j = 0; j < g.dim; ++j) q[j] = g.scale * to_float(from[j]);
  for (int64_t j = 0; j < g.dim; ++j) out[j] = to_float(o[j]);
  merge_one<W>(g, h, q, out, *g.lse.at<float>(b, h, t));
  for (int64_t j = 0; j < g.dim; ++j) assign(o[j], out[j]);
}

// A row of keys or values in fp32: itself, or copied to `buffer`.
PELT_FAST_INLINE const float* wide_row(const float* row, float*, int64_t) { return row; }
template <typename T>
PELT_FAST_INLINE const float* wide_row(const T* row, float* buffer, int64_t dim) {
  for (int64_t j = 0; j < dim; ++j) buffer[j] = to_float(row[j]);
  return buffer;
}

// out = softmax(q kᵀ) v of one query over a context without a mask, and its lse: keys in blocks,
// with the largest score so far.
template <int W, typename T>
PELT_FAST_INLINE float attend_one(const Prefix& g, int64_t b, int64_t h, const float* q,
                                  float* out) {
  using Vector = typename VectorOf<W>::type;
  alignas(64) float scores[kMaxPrefix], buffer[kColumns];
  const int64_t group = h / (g.heads / g.groups);
  float most = -std::numeric_limits<float>::infinity(), total = 0;
  std::fill_n(out, g.dim, 0.0f);
  for (int64_t first = 0; first < g.keys; first += kMaxPrefix) {
    const int64_t count = std::min<int64_t>(kMaxPrefix, g.keys - first), pad = padded(count);
    for (int64_t p = 0; p < count; ++p)
      scores[p] = dot<W>(q, wide_row(g.context_k.at<T>(b, group, first + p), buffer, g.dim), g.dim);
    for (int64_t p = count; p < pad; ++p) scores[p] = kHidden;
    const float highest = most_of<W>(scores, pad), before = most;
    most = before > highest ? before : highest;
    for (int64_t p = 0; p < pad; ++p) scores[p] = exp32(scores[p] - most);
    const float factor = first == 0 ? 0.0f : exp32(before - most);
    total = total * factor + sum_of<W>(scores, pad);
    for (int64_t j = 0; j < g.dim; ++j) out[j] *= factor;
    for (int64_t p = 0; p < count; ++p) {
      const float* row = wide_row(g.context_v.at<T>(b, group, first + p), buffer, g.dim);
      for (int64_t j = 0; j < g.dim; j += W)
        *reinterpret_cast<Vector*>(out + j) +=
            scores[p] * *reinterpret_cast<const Vector*>(row + j);
    }
  }
  const float inverse = 1.0f / total;
  for (int64_t j = 0; j < g.dim; ++j) out[j] *= inverse;
  return most + log32(total);
}

template <int W, typename T>
PELT_FAST_INLINE void attend_query(const Prefix& g, int64_t b, int64_t h, int64_t t) {
  alignas(64) float q[kColumns], out[kColumns];
  const T* from = g.q.at<T>(b, h, t);
  for (int64_t j = 0; j < g.dim; ++j) q[j] = g.scale * to_float(from[j]);
  float lse = attend_one<W, T>(g, b, h, q, out);
  merge_one<W>(g, h, q, out, lse);
  T* o = g.o.at<T>(b, h, t);
  for (int64_t j = 0; j < g.dim; ++j) assign(o[j], out[j]);
  *g.lse.at<float>(b, h, t) = lse;
}

template <int W>
PELT_FAST_INLINE void attend_few(const Prefix& g, int64_t first, int64_t last) {
  for (int64_t unit = first; unit < last; ++unit) {
    const int64_t t = unit % g.queries, h = unit / g.queries % g.heads;
    const int64_t b = unit / g.queries / g.heads;
    PELT_FAST_BY_TYPE(g.dtype, attend_query<W, T>(g, b, h, t))
  }
}
PELT_FAST_FOR_EACH_INSTRUCTION_SET(attend_few, Prefix)

template <int W>
PELT_FAST_INLINE void merge_few(const Prefix& g, int64_t first, int64_t last) {
  for (int64_t unit = first; unit < last; ++unit) {
    const int64_t t = unit % g.queries, h = unit / g.queries % g.heads;
    const int64_t b = unit / g.queries / g.heads;
    PELT_FAST_BY_TYPE(g.dtype, merge_query<W, T>(g, b, h, t))
  }
}
PELT_FAST_FOR_EACH_INSTRUCTION_SET(merge_few, Prefix)

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

Heads heads_of(const char* name, const Tensor& t, const Tensor& like, ScalarType dtype) {
  bool fits = t.dim() == 4;
  for (int64_t i = 0; fits && i < 4; ++i) fits = t.size(i) == like.size(i);
  PELT_FAST_CHECK(fits, name, " must have shape ", shape_of(like), ", got ", shape_of(t));
  PELT_FAST_CHECK(t.is_cpu() && t.scalar_type() == dtype, name,
                  " must be on the CPU with q's dtype");
  PELT_FAST_CHECK(t.size(3) <= 1 || t.stride(3) == 1, name,
                  " must have a contiguous last dim, got a stride of ", t.stride(3));
  return {const_cast<void*>(t.const_data_ptr()), t.stride(0), t.stride(1), t.stride(2)};
}

Heads prefix_rows(const Tensor& p) {
  return {const_cast<void*>(p.const_data_ptr()), 0, p.stride(0), p.stride(1)};
}

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

Prefix checked(const Tensor& q, const Tensor& lse, const Tensor& k, const Tensor& v, bool relu,
               bool gated) {
  const ScalarType dtype = check_activation("q", q);
  PELT_FAST_CHECK(q.dim() == 4 && q.size(3) >= 1 && q.size(3) <= kColumns,
                  "q must have shape (B, H, T, D) with D at most ", kColumns, ", got ",
                  shape_of(q));
  PELT_FAST_CHECK(lse.dim() == 3 && lse.size(0) == q.size(0) && lse.size(1) == q.size(1) &&
                      lse.size(2) == q.size(2) && lse.scalar_type() == ScalarType::Float,
                  "lse must be float32 (", q.size(0), ", ", q.size(1), ", ", q.size(2), "), got ",
                  shape_of(lse));
  for (const auto& [name, t] : {std::pair<const char*, const Tensor&>{"k", k}, {"v", v}}) {
    PELT_FAST_CHECK(t.dim() == 3 && t.size(2) == q.size(3) && t.size(1) >= 1 &&
                        t.size(1) <= kMaxPrefix && t.size(0) >= 1 && q.size(1) % t.size(0) == 0,
                    name, " must have shape (G, P, ", q.size(3), ") with P at most ", kMaxPrefix,
                    " and G a divisor of ", q.size(1), ", got ", shape_of(t));
    PELT_FAST_CHECK(t.is_cpu() && t.scalar_type() == ScalarType::Float, name,
                    " must be float32 on the CPU");
  }
  PELT_FAST_CHECK(k.size(0) == v.size(0) && k.size(1) == v.size(1), "k and v must have one shape");
  Prefix g{};
  g.q = heads_of("q", q, q, dtype);
  g.lse = {const_cast<void*>(lse.const_data_ptr()), lse.stride(0), lse.stride(1), lse.stride(2)};
  g.batch = q.size(0), g.heads = q.size(1), g.queries = q.size(2), g.dim = q.size(3);
  g.groups = k.size(0), g.length = k.size(1);
  g.dtype = dtype, g.relu = relu, g.gated = gated;
  return g;
}

void prefix_merge_(Tensor o, Tensor lse, Tensor q, Tensor k, Tensor v, double scale, bool relu,
                   bool gated) {
  Prefix g = checked(q, lse, k, v, relu, gated);
  g.o = heads_of("o", o, q, g.dtype);
  if (g.queries <= kFewQueries && g.dim % kPad == 0 && k.stride(2) == 1 && v.stride(2) == 1) {
    g.own_k = prefix_rows(k), g.own_v = prefix_rows(v), g.scale = static_cast<float>(scale);
    return run(merge_few_for_this_machine, g, g.batch * g.heads * g.queries, 32);
  }
  const Buffer kt = packed_heads(k, true, static_cast<float>(scale)),
               vs = packed_heads(v, false, 1);
  g.kt = kt.get(), g.v = vs.get();
  run(merge_for_this_machine, g, g.batch * g.heads * g.blocks(), 4);
}

// Attention of a few queries over prefix and context, which no mask hides: a decoder's step.
void prefix_few_queries_(Tensor o, Tensor lse, Tensor q, Tensor context_k, Tensor context_v,
                         Tensor k, Tensor v, double scale) {
  Prefix g = checked(q, lse, k, v, false, true);
  g.o = heads_of("o", o, q, g.dtype);
  PELT_FAST_CHECK(
      g.queries <= kFewQueries && g.dim % kPad == 0 && k.stride(2) == 1 && v.stride(2) == 1,
      "q must have at most ", kFewQueries, " queries of a multiple of ", kPad,
      " channels, and k and v contiguous rows, got ", shape_of(q));
  PELT_FAST_CHECK(context_k.dim() == 4 && context_k.size(0) == g.batch &&
                      context_k.size(1) == g.groups && context_k.size(2) >= 1 &&
                      context_k.size(3) == g.dim,
                  "context_k must have shape (", g.batch, ", ", g.groups, ", S, ", g.dim,
                  ") with S at least 1, got ", shape_of(context_k));
  g.context_k = heads_of("context_k", context_k, context_k, g.dtype);
  g.context_v = heads_of("context_v", context_v, context_k, g.dtype);
  g.own_k = prefix_rows(k), g.own_v = prefix_rows(v);
  g.scale = static_cast<float>(scale), g.keys = context_k.size(2);
  const int64_t grain = std::max<int64_t>(1, 2048 / (g.keys + g.length));
  run(attend_few_for_this_machine, g, g.batch * g.heads * g.queries, grain);
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
      "prefix_few_queries_(Tensor(a!) o, Tensor(b!) lse, Tensor q, Tensor context_k,"
      " Tensor context_v, Tensor k, Tensor v, float scale) -> ()");
  m.def(
      "prefix_backward_(Tensor(a!)? dq, Tensor(b!) dk, Tensor(c!) dv, Tensor d_o, Tensor q, Tensor "
      "k,"
      " Tensor v, Tensor o, Tensor lse, float scale, bool relu, bool gated) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pelt_fast_cpp, CPU, m) {
  m.impl("prefix_merge_", TORCH_BOX(&pelt_fast::prefix_merge_));
  m.impl("prefix_few_queries_", TORCH_BOX(&pelt_fast::prefix_few_queries_));
  m.impl("prefix_backward_", TORCH_BOX(&pelt_fast::prefix_backward_));
}
