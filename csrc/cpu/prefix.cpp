// The prefix part of attention: merged into the context's output, and its backward.
//
// Shapes   q, o, do, dq (B, H, T, D); lse (B, H, T); k, v (G, P, D), a head for each H / G queries'
//          heads; dk, dv (H, P, D). D <= kColumns, P <= kMaxPrefix; any strides, D contiguous.
// Maths    S = scale q kᵀ;  gated: l = logaddexp(lse, logsumexp S), W = exp(S - l),
//          o = exp(lse - l) o + W v, lse = l;  added: W = softmax S or relu S, o = o + W v
//          dW = do vᵀ;  dS = W (dW - δ), δ = Σ do o (gated) or Σ W dW; relu: dS = dW where S > 0
//          dq += scale dS k;  dk = scale dSᵀ q;  dv = Wᵀ do, parts of rows added in their order
// Spans    the keys and values of several methods lie behind each other in k and v; `spans` (B, 2)
//          has the first key and the number of keys of each batch row's prefix. Nothing of a row
//          without keys is read or written. Without spans all rows have all keys.
// Traffic  forward q, o read, o written; backward q, do, o, dq read, dq written. Scores stay in
//          cache, kRows queries at a time.

#include <torch/csrc/stable/library.h>

#include "prefix.h"

namespace pelt_fast {
namespace {

constexpr int64_t kParts = 8;  // of the rows of a head, at most

// One head of one method's keys and values in fp32, padded with zeros, as the products read them.
// A thread packs them when it comes to them: work goes by heads, so that they serve all rows of the
// method and stay in cache.
struct Packed {
  float *kt, *k, *v, *vt;  // (padded D, pad) and (pad, padded D); the keys times scale
  const MethodPrefix* method = nullptr;
  int64_t group = -1;
  bool holds(const MethodPrefix& m, int64_t of) const { return method == &m && group == of; }
};

PELT_FAST_INLINE void pack(const Prefix& g, const MethodPrefix& m, int64_t group, const Heads& from,
                           bool transposed, float scale, float* to) {
  const int64_t wide = padded(g.dim), down = transposed ? 1 : wide, along = transposed ? m.pad : 1;
  std::fill_n(to, m.pad * wide, 0.0f);
  for (int64_t i = 0; i < m.length; ++i) {
    const float* row = from.at<float>(0, group, m.first + i);
    float* out = to + i * down;
    if (!transposed && from.column == 1) {
      for (int64_t j = 0; j < g.dim; ++j) out[j] = scale * row[j];
    } else {
      for (int64_t j = 0; j < g.dim; ++j) out[j * along] = scale * row[j * from.column];
    }
  }
}

// Scores of kRows queries, in `s`; the queries stay in `q`.
template <int W, typename T>
PELT_FAST_INLINE void score(const Prefix& g, const Packed& p, const T* from, Tile& q, Scores& s,
                            int rows) {
  const int64_t pad = p.method->pad;
  load(q, from, g.q.row, rows, static_cast<int>(g.dim));
  for (int i = 0; i < kRows; ++i) std::memset(s[i], 0, pad * sizeof(float));
  product<W>(&s[0][0], kMaxPrefix, &q[0][0], kColumns, p.kt, pad, kRows, pad, g.dim);
}

template <int W, typename T>
PELT_FAST_INLINE void merge_block(const Prefix& g, const Packed& p, int64_t b, int64_t h,
                                  int64_t t) {
  alignas(64) Tile q;
  alignas(64) Scores s;
  float lse[kRows] = {}, kept[kRows];
  const int rows = static_cast<int>(std::min<int64_t>(kRows, g.queries - t));
  const int64_t wide = padded(g.dim);
  score<W, T>(g, p, g.q.at<T>(b, h, t), q, s, rows);
  float* own = g.lse.at<float>(b, h, t);
  for (int i = 0; i < rows; ++i) lse[i] = own[i * g.lse.row];
  weigh<W>(g, *p.method, s, lse, kept, rows, false);
  T* o = g.o.at<T>(b, h, t);
  load(q, o, g.o.row, rows, static_cast<int>(g.dim));
  if (g.gated) {
    for (int i = 0; i < rows; ++i) {
      const float factor = kept[i];
      for (int j = 0; j < wide; ++j) q[i][j] *= factor;
      own[i * g.lse.row] = lse[i];
    }
  }
  product<W>(&q[0][0], kColumns, &s[0][0], kMaxPrefix, p.v, wide, kRows, wide, p.method->length);
  store<T>(q, nullptr, 0, o, g.o.row, rows, static_cast<int>(g.dim));
}

template <int W>
PELT_FAST_INLINE void merge(const Prefix& g, int64_t first, int64_t last) {
  const int64_t blocks = g.blocks(), size = g.packed_floats();
  const auto routed = static_cast<int64_t>(g.routing.rows.size());
  const Buffer copies = buffer(2 * size);
  Packed p{copies.get(), nullptr, copies.get() + size, nullptr};
  for (int64_t unit = first; unit < last; ++unit) {
    const int64_t t = unit % blocks * kRows, h = unit / blocks / routed, group = g.group(h);
    const int64_t row = unit / blocks % routed, b = g.routing.rows[row];
    const MethodPrefix& m = g.routing.method(row);
    if (!p.holds(m, group)) {
      pack(g, m, group, g.own_k, true, g.scale, p.kt);
      pack(g, m, group, g.own_v, false, 1, p.v);
      p.method = &m, p.group = group;
    }
    PELT_FAST_BY_TYPE(g.dtype, merge_block<W, T>(g, p, b, h, t))
  }
}
PELT_FAST_FOR_EACH_INSTRUCTION_SET(merge, Prefix)

// dS over dW in place.
template <int W>
PELT_FAST_INLINE void score_gradient(const Prefix& g, const MethodPrefix& m, Scores& d,
                                     const Scores& w, const float* delta, int rows) {
  const auto pad = static_cast<int>(m.pad);
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
PELT_FAST_INLINE void backward_block(const Prefix& g, const Packed& p, int64_t b, int64_t h,
                                     int64_t t, float* dk, float* dv) {
  alignas(64) Tile q, d_o, other;
  alignas(64) Scores w, d;
  float lse[kRows] = {}, delta[kRows];
  const int rows = static_cast<int>(std::min<int64_t>(kRows, g.queries - t));
  const auto dim = static_cast<int>(g.dim);
  const MethodPrefix& m = *p.method;
  const int64_t wide = padded(g.dim);
  const float* own = g.lse.at<float>(b, h, t);
  for (int i = 0; i < rows; ++i) lse[i] = own[i * g.lse.row];
  score<W, T>(g, p, g.q.at<T>(b, h, t), q, w, rows);
  weigh<W>(g, m, w, lse, delta, rows, g.gated);
  load(d_o, g.d_o.at<T>(b, h, t), g.d_o.row, rows, dim);
  if (g.gated) {
    load(other, g.o.at<T>(b, h, t), g.o.row, rows, dim);
    for (int i = 0; i < rows; ++i) delta[i] = dot<W>(d_o[i], other[i], wide);
  }
  for (int i = 0; i < kRows; ++i) std::memset(d[i], 0, m.pad * sizeof(float));
  product<W>(&d[0][0], kMaxPrefix, &d_o[0][0], kColumns, p.vt, m.pad, kRows, m.pad, g.dim);
  score_gradient<W>(g, m, d, w, delta, rows);
  product<W, true>(dv, wide, &w[0][0], kMaxPrefix, &d_o[0][0], kColumns, m.pad, wide, rows);
  product<W, true>(dk, wide, &d[0][0], kMaxPrefix, &q[0][0], kColumns, m.pad, wide, rows);
  if (g.dq.data == nullptr) return;
  T* dq = g.dq.at<T>(b, h, t);
  clear(other, wide);
  product<W>(&other[0][0], kColumns, &d[0][0], kMaxPrefix, p.k, wide, kRows, wide, m.length);
  store<T>(other, dq, g.dq.row, dq, g.dq.row, rows, dim);
}

// A part of one method's blocks of rows, in their order, and its sums: dk, dv (pad, padded D).
// Which blocks is of the shape alone, never of the threads or of the other methods.
struct Part {
  const MethodPrefix* method;
  int64_t first, last;
  int64_t place;  // of its sums; -1: it is the method's only one
};

struct Parts {
  const Prefix& prefix;
  float *dk, *dv;  // (H, P, D)
  std::vector<Part> all;
  int64_t floats;  // of the sums of one head
  float* sums;
};

Parts parts_of(const Prefix& g, float* dk, float* dv) {
  Parts parts{g, dk, dv, {}, 0, nullptr};
  for (const MethodPrefix& m : g.routing.methods) {
    const int64_t blocks = (m.last_row - m.first_row) * g.blocks();
    const int64_t count = std::max<int64_t>(1, std::min(kParts, blocks / 8));
    const int64_t step = (blocks + count - 1) / count;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t first = std::min(i * step, blocks), last = std::min(first + step, blocks);
      parts.all.push_back({&m, first, last, count == 1 ? -1 : parts.floats});
      if (count > 1) parts.floats += 2 * m.pad * padded(g.dim);
    }
  }
  return parts;
}

// One part's sums of one head into dk and dv; the method's first part begins them.
PELT_FAST_INLINE void add_up(const Parts& parts, const Part& part, int64_t h, const float* sums) {
  const Prefix& g = parts.prefix;
  const MethodPrefix& m = *part.method;
  const int64_t wide = padded(g.dim);
  for (int which = 0; which < 2; ++which) {
    float* out = (which == 0 ? parts.dk : parts.dv) + (h * g.length + m.first) * g.dim;
    const float* from = sums + which * m.pad * wide;
    const float factor = which == 0 ? g.scale : 1.0f;
    for (int64_t i = 0; i < m.length; ++i)
      for (int64_t j = 0; j < g.dim; ++j) {
        const float before = part.first == 0 ? 0.0f : out[i * g.dim + j];
        out[i * g.dim + j] = before + factor * from[i * wide + j];
      }
  }
}

template <int W>
PELT_FAST_INLINE void backward(const Parts& parts, int64_t first, int64_t last) {
  const Prefix& g = parts.prefix;
  const auto count = static_cast<int64_t>(parts.all.size());
  const int64_t blocks = g.blocks(), size = g.packed_floats();
  const Buffer copies = buffer(5 * size);
  Packed p{copies.get(), copies.get() + size, nullptr, copies.get() + 2 * size};
  for (int64_t unit = first; unit < last; ++unit) {
    const int64_t h = unit / count, group = g.group(h);
    const Part& part = parts.all[unit % count];
    const MethodPrefix& m = *part.method;
    if (!p.holds(m, group)) {
      pack(g, m, group, g.own_k, true, g.scale, p.kt);
      pack(g, m, group, g.own_k, false, g.scale, p.k);
      pack(g, m, group, g.own_v, true, 1, p.vt);
      p.method = &m, p.group = group;
    }
    const bool alone = part.place < 0;
    float* dk = alone ? copies.get() + 3 * size : parts.sums + h * parts.floats + part.place;
    float* dv = dk + m.pad * padded(g.dim);
    std::fill_n(dk, 2 * (dv - dk), 0.0f);
    for (int64_t i = part.first; i < part.last; ++i) {
      const int64_t b = g.routing.rows[m.first_row + i / blocks], t = i % blocks * kRows;
      PELT_FAST_BY_TYPE(g.dtype, backward_block<W, T>(g, p, b, h, t, dk, dv))
    }
    if (alone) add_up(parts, part, h, dk);
  }
}
PELT_FAST_FOR_EACH_INSTRUCTION_SET(backward, Parts)

void prefix_merge_(Tensor o, Tensor lse, Tensor q, Tensor k, Tensor v, double scale, bool relu,
                   bool gated, std::optional<Tensor> spans) {
  Prefix g = checked(q, lse, k, v, relu, gated, spans);
  g.scale = static_cast<float>(scale);
  g.o = heads_of("o", o, q, g.dtype);
  if (g.queries <= kFewQueries && g.dim % kPad == 0 && k.stride(2) == 1 && v.stride(2) == 1)
    return merge_few_queries(g);
  const auto rows = static_cast<int64_t>(g.routing.rows.size());
  run(merge_for_this_machine, g, rows * g.heads * g.blocks(), 4);
}

void prefix_backward_(std::optional<Tensor> dq, Tensor dk, Tensor dv, Tensor d_o, Tensor q,
                      Tensor k, Tensor v, Tensor o, Tensor lse, double scale, bool relu,
                      bool gated, std::optional<Tensor> spans) {
  Prefix g = checked(q, lse, k, v, relu, gated, spans);
  g.scale = static_cast<float>(scale);
  g.o = heads_of("o", o, q, g.dtype);
  g.d_o = heads_of("d_o", d_o, q, g.dtype);
  if (dq.has_value()) g.dq = heads_of("dq", *dq, q, g.dtype);
  for (const Tensor* t : {&dk, &dv})
    PELT_FAST_CHECK(t->dim() == 3 && t->size(0) == g.heads && t->size(1) == g.length &&
                        t->size(2) == g.dim && t->is_contiguous() &&
                        t->scalar_type() == ScalarType::Float,
                    "dk and dv must be contiguous float32 (", g.heads, ", ", g.length, ", ", g.dim,
                    "), got ", shape_of(*t));
  Parts parts = parts_of(g, static_cast<float*>(dk.mutable_data_ptr()),
                         static_cast<float*>(dv.mutable_data_ptr()));
  const Buffer sums = buffer(g.heads * parts.floats);
  parts.sums = sums.get();
  run(backward_for_this_machine, parts, g.heads * static_cast<int64_t>(parts.all.size()), 1);
  const int64_t grain = std::max<int64_t>(1, (1 << 17) / std::max<int64_t>(1, parts.floats));
  torch::stable::parallel_for(0, g.heads, grain, [&](int64_t first, int64_t last) {
    for (int64_t h = first; h < last; ++h)
      for (const Part& part : parts.all)
        if (part.place >= 0) add_up(parts, part, h, parts.sums + h * parts.floats + part.place);
  });
}

}  // namespace
}  // namespace pelt_fast

STABLE_TORCH_LIBRARY_FRAGMENT(pelt_fast_cpp, m) {
  m.def(
      "prefix_merge_(Tensor(a!) o, Tensor(b!) lse, Tensor q, Tensor k, Tensor v, float scale,"
      " bool relu, bool gated, Tensor? spans=None) -> ()");
  m.def(
      "prefix_backward_(Tensor(a!)? dq, Tensor(b!) dk, Tensor(c!) dv, Tensor d_o, Tensor q, Tensor "
      "k,"
      " Tensor v, Tensor o, Tensor lse, float scale, bool relu, bool gated, Tensor? spans=None) -> "
      "()");
}

STABLE_TORCH_LIBRARY_IMPL(pelt_fast_cpp, CPU, m) {
  m.impl("prefix_merge_", TORCH_BOX(&pelt_fast::prefix_merge_));
  m.impl("prefix_backward_", TORCH_BOX(&pelt_fast::prefix_backward_));
}
