// A few queries: the prefix's part alone, or attention over prefix and context in one call.
//
// Shapes   q, o (B, H, T, D), T <= kFewQueries, D a multiple of kPad; lse (B, H, T); the prefix's k, v
//          (G, P, D); the context's (B, G, S, D), which no mask hides
// Maths    those of prefix.cpp, one query at a time; the context in blocks of keys, with the largest
//          score so far
// Traffic  each key and value read once for each query, where they are: packing them would cost
//          more than the product.

#include <torch/csrc/stable/library.h>

#include "prefix.h"

namespace pelt_fast {
namespace {

// out = exp(lse - l) out + W v of one query, q times scale; lse = l if gated.
template <int W>
PELT_FAST_INLINE void merge_one(const Prefix& g, const MethodPrefix& m, int64_t h, const float* q,
                                float* out, float& lse) {
  using Vector = typename VectorOf<W>::type;
  alignas(64) Scores s;
  float joint[kRows] = {}, kept[kRows];
  const int64_t group = g.group(h);
  for (int64_t p = 0; p < m.length; ++p)
    s[0][p] = dot<W>(q, g.own_k.at<float>(0, group, m.first + p), g.dim);
  for (int64_t p = m.length; p < m.pad; ++p) s[0][p] = 0;
  joint[0] = lse;
  weigh<W>(g, m, s, joint, kept, 1, false);
  const float factor = g.gated ? kept[0] : 1.0f;
  for (int64_t j = 0; j < g.dim; ++j) out[j] *= factor;
  for (int64_t p = 0; p < m.length; ++p) {
    const float* row = g.own_v.at<float>(0, group, m.first + p);
    for (int64_t j = 0; j < g.dim; j += W)
      *reinterpret_cast<Vector*>(out + j) += s[0][p] * *reinterpret_cast<const Vector*>(row + j);
  }
  if (g.gated) lse = joint[0];
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
  const int64_t group = g.group(h);
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

// One query: without keys of a context, o and lse are what the caller has of it.
template <int W, typename T>
PELT_FAST_INLINE void query(const Prefix& g, const MethodPrefix& m, int64_t b, int64_t h,
                            int64_t t) {
  alignas(64) float q[kColumns], out[kColumns];
  const T* from = g.q.at<T>(b, h, t);
  T* o = g.o.at<T>(b, h, t);
  float& lse = *g.lse.at<float>(b, h, t);
  for (int64_t j = 0; j < g.dim; ++j) q[j] = g.scale * to_float(from[j]);
  if (g.keys > 0) {
    lse = attend_one<W, T>(g, b, h, q, out);
  } else {
    for (int64_t j = 0; j < g.dim; ++j) out[j] = to_float(o[j]);
  }
  merge_one<W>(g, m, h, q, out, lse);
  for (int64_t j = 0; j < g.dim; ++j) assign(o[j], out[j]);
}

template <int W>
PELT_FAST_INLINE void few(const Prefix& g, int64_t first, int64_t last) {
  for (int64_t unit = first; unit < last; ++unit) {
    const int64_t t = unit % g.queries, h = unit / g.queries % g.heads;
    const int64_t row = unit / g.queries / g.heads, b = g.routing.rows[row];
    PELT_FAST_BY_TYPE(g.dtype, query<W, T>(g, g.routing.method(row), b, h, t))
  }
}
PELT_FAST_FOR_EACH_INSTRUCTION_SET(few, Prefix)

// Attention of a few queries over prefix and context, which no mask hides: a decoder's step. Rows
// of no prefix are left as they are.
void prefix_few_queries_(Tensor o, Tensor lse, Tensor q, Tensor context_k, Tensor context_v,
                         Tensor k, Tensor v, double scale, std::optional<Tensor> spans) {
  Prefix g = checked(q, lse, k, v, false, true, spans);
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
  g.scale = static_cast<float>(scale), g.keys = context_k.size(2);
  merge_few_queries(g);
}

}  // namespace

void merge_few_queries(const Prefix& g) {
  const auto rows = static_cast<int64_t>(g.routing.rows.size());
  const int64_t keys = std::max<int64_t>(1, g.keys + g.routing.longest);
  const int64_t grain = std::max<int64_t>(1, 2048 / keys);
  run(few_for_this_machine, g, rows * g.heads * g.queries, grain);
}

}  // namespace pelt_fast

STABLE_TORCH_LIBRARY_FRAGMENT(pelt_fast_cpp, m) {
  m.def(
      "prefix_few_queries_(Tensor(a!) o, Tensor(b!) lse, Tensor q, Tensor context_k,"
      " Tensor context_v, Tensor k, Tensor v, float scale, Tensor? spans=None) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pelt_fast_cpp, CPU, m) {
  m.impl("prefix_few_queries_", TORCH_BOX(&pelt_fast::prefix_few_queries_));
}
