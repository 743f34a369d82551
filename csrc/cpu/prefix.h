// A prefix and the attention it is merged into: what the ops of a prefix read and check.
#pragma once

#include <utility>
#include <vector>

#include "arguments.h"
#include "exp.h"

namespace pelt_fast {

constexpr int kMaxPrefix = 256;
constexpr float kHidden = -1e30f;   // the score of what pads a prefix
constexpr int64_t kFewQueries = 8;  // a block of kRows would be almost empty

using Scores = float[kRows][kMaxPrefix];

struct Heads {
  void* data;
  int64_t batch, head, row, column;  // strides
  template <typename T>
  PELT_FAST_INLINE T* at(int64_t b, int64_t h, int64_t t) const {
    return static_cast<T*>(data) + b * batch + h * head + t * row;
  }
};

// A prefix of some rows of the batch: its keys and values are rows [first, first + length) of k and
// v, its batch rows are [first_row, last_row) of Routing::rows.
struct MethodPrefix {
  int64_t first, length, pad;
  int64_t first_row, last_row;
};

// The methods that have rows, in the order of their keys, and the rows of the batch that have a
// method, those of one method behind each other.
struct Routing {
  std::vector<MethodPrefix> methods;
  std::vector<int64_t> rows;
  std::vector<size_t> of;  // the method of each of `rows`
  int64_t longest;
  const MethodPrefix& method(int64_t row) const { return methods[of[row]]; }
};

struct Prefix {
  Heads q, o, d_o, dq, lse;
  Heads own_k, own_v;  // k and v
  Heads context_k, context_v;
  float scale;
  int64_t keys;  // of the context; 0: o and lse have it
  int64_t batch, heads, groups, queries, dim, length;
  ScalarType dtype;
  bool relu, gated;
  Routing routing;
  int64_t blocks() const { return (queries + kRows - 1) / kRows; }  // of one head in one batch row
  int64_t group(int64_t h) const { return h / (heads / groups); }
  int64_t packed_floats() const { return padded(routing.longest) * padded(dim); }  // of one head
};

// Weights W over the scores in place. Merged, lse is the joint one. Else it becomes so (gated) or
// the prefix's own, and `kept` what is left of the context.
template <int W>
PELT_FAST_INLINE void weigh(const Prefix& g, const MethodPrefix& m, Scores& s, float* lse,
                            float* kept, int rows, bool merged) {
  const auto length = static_cast<int>(m.length);
  const auto pad = static_cast<int>(m.pad);
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

inline Heads heads_of(const char* name, const Tensor& t, const Tensor& like, ScalarType dtype) {
  bool fits = t.dim() == 4;
  for (int64_t i = 0; fits && i < 4; ++i) fits = t.size(i) == like.size(i);
  PELT_FAST_CHECK(fits, name, " must have shape ", shape_of(like), ", got ", shape_of(t));
  PELT_FAST_CHECK(t.is_cpu() && t.scalar_type() == dtype, name,
                  " must be on the CPU with q's dtype");
  PELT_FAST_CHECK(t.size(3) <= 1 || t.stride(3) == 1, name,
                  " must have a contiguous last dim, got a stride of ", t.stride(3));
  return {const_cast<void*>(t.const_data_ptr()), t.stride(0), t.stride(1), t.stride(2), 1};
}

inline Heads prefix_rows(const Tensor& p) {
  return {const_cast<void*>(p.const_data_ptr()), 0, p.stride(0), p.stride(1), p.stride(2)};
}

using Span = std::pair<int64_t, int64_t>;  // the first key and the number of keys

// The span of each batch row's prefix, from `spans` (B, 2); all keys where it is missing.
inline std::vector<Span> row_spans(const std::optional<Tensor>& spans, int64_t batch,
                                   int64_t keys) {
  std::vector<Span> found;
  if (!spans.has_value()) {
    found.assign(batch, {0, keys});
    return found;
  }
  PELT_FAST_CHECK(spans->dim() == 2 && spans->size(0) == batch && spans->size(1) == 2 &&
                      spans->is_cpu() && spans->scalar_type() == ScalarType::Long &&
                      spans->is_contiguous(),
                  "spans must be contiguous int64 (", batch, ", 2) on the CPU, got ",
                  shape_of(*spans));
  const auto* span = static_cast<const int64_t*>(spans->const_data_ptr());
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t first = span[2 * b], length = span[2 * b + 1];
    PELT_FAST_CHECK(length >= 0 && length <= kMaxPrefix && first >= 0 && first + length <= keys,
                    "spans must be at most ", kMaxPrefix, " of ", keys, " keys, got ", length,
                    " from ", first, " on in row ", b);
    found.emplace_back(first, length);
  }
  return found;
}

// Rows of q with the same span have one method.
inline Routing routed(const std::vector<Span>& spans) {
  Routing routing{};
  auto sorted = spans;
  std::sort(sorted.begin(), sorted.end());
  sorted.erase(std::unique(sorted.begin(), sorted.end()), sorted.end());
  for (const auto& [first, length] : sorted) {
    if (length == 0) continue;
    PELT_FAST_CHECK(routing.methods.empty() ||
                        routing.methods.back().first + routing.methods.back().length <= first,
                    "spans must not overlap, got two around key ", first);
    const auto begin = static_cast<int64_t>(routing.rows.size());
    for (size_t b = 0; b < spans.size(); ++b)
      if (spans[b] == Span{first, length}) routing.rows.push_back(static_cast<int64_t>(b));
    const auto end = static_cast<int64_t>(routing.rows.size());
    routing.of.resize(routing.rows.size(), routing.methods.size());
    routing.methods.push_back({first, length, padded(length), begin, end});
    routing.longest = std::max(routing.longest, length);
  }
  return routing;
}

inline Prefix checked(const Tensor& q, const Tensor& lse, const Tensor& k, const Tensor& v,
                      bool relu, bool gated, const std::optional<Tensor>& spans) {
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
                        (spans.has_value() || t.size(1) <= kMaxPrefix) && t.size(0) >= 1 &&
                        q.size(1) % t.size(0) == 0,
                    name, " must have shape (G, P, ", q.size(3), ") with P at most ", kMaxPrefix,
                    " and G a divisor of ", q.size(1), ", got ", shape_of(t));
    PELT_FAST_CHECK(t.is_cpu() && t.scalar_type() == ScalarType::Float, name,
                    " must be float32 on the CPU");
  }
  PELT_FAST_CHECK(k.size(0) == v.size(0) && k.size(1) == v.size(1), "k and v must have one shape");
  Prefix g{};
  g.q = heads_of("q", q, q, dtype);
  g.lse = {const_cast<void*>(lse.const_data_ptr()), lse.stride(0), lse.stride(1), lse.stride(2),
           1};
  g.batch = q.size(0), g.heads = q.size(1), g.queries = q.size(2), g.dim = q.size(3);
  g.groups = k.size(0), g.length = k.size(1);
  g.dtype = dtype, g.relu = relu, g.gated = gated;
  g.own_k = prefix_rows(k), g.own_v = prefix_rows(v);
  g.routing = routed(row_spans(spans, g.batch, g.length));
  return g;
}

// A few queries (prefix_few.cpp): the prefix's part is added to o and lse, or, with keys of a
// context, to its attention.
void merge_few_queries(const Prefix& g);

}  // namespace pelt_fast
