// The weights of an attention with dropout over a context and a prefix, from their scores, and the
// gradients of these scores: what is between the library's products.
//
// Shapes   context (N, T, S), prefix (N, T, P), contiguous: some heads of a row of the batch, or all
//          heads of some rows; lse, delta (N, T); mask (rows, heads, T, S) for N = rows x heads,
//          added to the context's scores, its last stride 1. Any S and P, also 0.
// Maths    C = scale c + mask,  Z = scale z;  l = logsumexp of both if gated, else l_c of C
//          forward   c = drop(exp(C - l)),  z = drop(f(Z)): exp(Z - l), or softmax, or ReLU if added
//          backward  with w and f(Z) before dropout, m the mask, dw = dz what comes back:
//                    dc = scale w (m dw - delta),  c = m w;  likewise z, whose own
//                    delta is Σ m f(Z) dz if a softmax of its own, and 0 with 1[Z > 0] for w if ReLU
//          Masks are Philox's of weights (B, H, T, S) and (B, H, T, width), drawn for a
//          block of rows at once; `first` is the row of context's first row among B H T.
// Traffic  each score read and written once; a row stays in cache for its three passes.

#include <torch/csrc/stable/library.h>

#include "attention_rows.h"

namespace pelt_fast {
namespace {

// One query of one head, and the masks of its weights.
template <int W>
PELT_FAST_INLINE void weigh_row(const Weights& g, int64_t at, const float* drop_context,
                                const float* drop_prefix) {
  float *c = g.context + at * g.keys, *z = g.prefix + at * g.length;
  finish_context(g, c, at);
  multiply_all(z, g.length, g.scale);
  const bool softmax = !g.gated && !g.relu;
  const float most_c = highest<W>(c, g.keys), most_z = highest<W>(z, g.length);
  const float most = g.gated && most_z > most_c ? most_z : most_c;
  exponentials(c, g.keys, or_zero(most));
  float sum = total<W>(c, g.keys), by = 1;
  if (g.gated) {
    exponentials(z, g.length, or_zero(most));
    sum += total<W>(z, g.length);
  } else if (softmax) {
    exponentials(z, g.length, or_zero(most_z));
    by = 1.0f / total<W>(z, g.length);
  } else {
    rectify(z, g.length);
  }
  const float inverse = most == -kInfinity ? 0.0f : 1.0f / sum;
  g.lse[at] = most == -kInfinity ? most : most + log32(sum);
  drop_row(c, g.keys, inverse, drop_context);
  drop_row(z, g.length, g.gated ? inverse : by, drop_prefix);
}

template <int W>
PELT_FAST_INLINE void backward_row(const Weights& g, int64_t at, const float* drop_context,
                                   const float* drop_prefix) {
  float *c = g.context + at * g.keys, *z = g.prefix + at * g.length;
  float *dc = g.d_context + at * g.keys, *dz = g.d_prefix + at * g.length;
  const float shift = or_zero(g.lse[at]);
  finish_context(g, c, at);
  exponentials(c, g.keys, shift);
  gradients_of(c, dc, g.keys, drop_context, g.delta[at], g.scale);
  multiply_all(z, g.length, g.scale);
  if (!g.gated && g.relu)
    return gradients_of_relu(z, dz, g.length, drop_prefix, g.scale);
  float delta = g.delta[at];
  if (g.gated) {
    exponentials(z, g.length, shift);
  } else {
    exponentials(z, g.length, or_zero(highest<W>(z, g.length)));
    multiply_all(z, g.length, 1.0f / total<W>(z, g.length));
    delta = delta_of<W>(z, dz, g.length, drop_prefix);
  }
  gradients_of(z, dz, g.length, drop_prefix, delta, g.scale);
}

// Rows [first, last), in blocks whose masks are drawn at once.
template <int W, bool Backward>
PELT_FAST_INLINE void each_row(const Weights& g, int64_t first, int64_t last) {
  DrawnMasks f(g);
  for (int64_t block = first; block < last; block += f.rows) {
    const int64_t rows = std::min(f.rows, last - block);
    draw(g, f, block, rows);
    for (int64_t i = 0; i < rows; ++i) {
      const float *context = f.context.get() + i * f.keys, *prefix = f.prefix.get() + i * f.width;
      if constexpr (Backward)
        backward_row<W>(g, block + i, context, prefix);
      else
        weigh_row<W>(g, block + i, context, prefix);
    }
  }
}

template <int W>
PELT_FAST_INLINE void weigh(const Weights& g, int64_t first, int64_t last) {
  each_row<W, false>(g, first, last);
}
PELT_FAST_FOR_EACH_INSTRUCTION_SET(weigh, Weights)

template <int W>
PELT_FAST_INLINE void backward(const Weights& g, int64_t first, int64_t last) {
  each_row<W, true>(g, first, last);
}
PELT_FAST_FOR_EACH_INSTRUCTION_SET(backward, Weights)

// A contiguous fp32 tensor of this shape on the CPU.
float* floats(const char* name, const Tensor& t, const Tensor& like, int64_t dims) {
  bool fits = t.dim() == dims;
  for (int64_t i = 0; fits && i < dims; ++i) fits = t.size(i) == like.size(i);
  PELT_FAST_CHECK(fits, name, " must have the shape of ", shape_of(like), " in ", dims,
                  " dimensions, got ", shape_of(t));
  PELT_FAST_CHECK(t.is_cpu() && t.scalar_type() == ScalarType::Float && t.is_contiguous(), name,
                  " must be float32, contiguous, on the CPU");
  return static_cast<float*>(const_cast<void*>(t.const_data_ptr()));
}

Weights arguments(const Tensor& context, const Tensor& prefix, const Tensor& lse,
                  const std::optional<Tensor>& mask, bool causal, double scale, bool relu,
                  bool gated, const std::optional<Tensor>& seed, int64_t threshold,
                  double keep_scale, int64_t first, int64_t width) {
  Weights g{};
  PELT_FAST_CHECK(context.dim() == 3, "context must have shape (N, T, S), got ",
                  shape_of(context));
  PELT_FAST_CHECK(prefix.dim() == 3 && prefix.size(0) == context.size(0) &&
                      prefix.size(1) == context.size(1),
                  "prefix must have shape (", context.size(0), ", ", context.size(1), ", P), got ",
                  shape_of(prefix));
  g.context = floats("context", context, context, 3);
  g.prefix = floats("prefix", prefix, prefix, 3);
  g.lse = floats("lse", lse, context, 2);
  g.queries = context.size(1), g.keys = context.size(2), g.length = prefix.size(2);
  PELT_FAST_CHECK(!causal || g.queries == g.keys, "causal needs T = S, got ", g.queries, " and ",
                  g.keys);
  PELT_FAST_CHECK(first >= 0 && width >= g.length, "first must be at least 0 and width at least ",
                  g.length, ", got ", first, " and ", width);
  if (mask.has_value()) {
    bool fits = mask->dim() == 4 && mask->is_cpu() && mask->scalar_type() == ScalarType::Float &&
                mask->size(0) * mask->size(1) == context.size(0) &&
                mask->size(2) == g.queries && mask->size(3) == g.keys;
    PELT_FAST_CHECK(fits && (g.keys <= 1 || mask->stride(3) == 1),
                    "mask must be float32 (rows, heads, ", g.queries, ", ", g.keys, ") of ",
                    context.size(0), " heads with contiguous rows, got ", shape_of(*mask));
    g.mask = static_cast<const float*>(mask->const_data_ptr());
    g.heads = std::max<int64_t>(mask->size(1), 1);
    for (int i = 0; i < 3; ++i) g.mask_strides[i] = mask->stride(i);
  }
  g.first = first, g.width = width, g.scale = static_cast<float>(scale);
  g.causal = causal, g.relu = relu, g.gated = gated;
  if (seed.has_value()) {
    PELT_FAST_CHECK(seed->is_cpu() && seed->scalar_type() == ScalarType::Long &&
                        seed->is_contiguous() && seed->dim() == 2 && seed->size(0) == 2 &&
                        seed->size(1) == 2,
                    "seed must be int64 (2, 2) on the CPU, got ", shape_of(*seed));
    check_threshold(threshold);
    const auto* words = static_cast<const uint64_t*>(seed->const_data_ptr());
    const auto kept = static_cast<float>(keep_scale);
    g.drop_prefix = {seed_at(words), static_cast<uint32_t>(threshold), kept};
    g.drop_context = {seed_at(words + 2), static_cast<uint32_t>(threshold), kept};
  }
  return g;
}

// Rows a thread is worth waking for.
int64_t grain(const Weights& g) {
  return 1 + (1 << 13) / std::max<int64_t>(g.keys + g.length, 1);
}

Tensor attention_weights_(Tensor context, Tensor prefix, Tensor lse, std::optional<Tensor> mask,
                          bool causal, double scale, bool relu, bool gated,
                          std::optional<Tensor> seed, int64_t threshold, double keep_scale,
                          int64_t first, int64_t width) {
  const Weights g = arguments(context, prefix, lse, mask, causal, scale, relu, gated, seed,
                              threshold, keep_scale, first, width);
  run(weigh_for_this_machine, g, context.size(0) * g.queries, grain(g));
  return context;
}

Tensor attention_weights_backward_(Tensor context, Tensor prefix, Tensor d_context,
                                   Tensor d_prefix, Tensor lse, Tensor delta,
                                   std::optional<Tensor> mask, bool causal, double scale,
                                   bool relu, bool gated, std::optional<Tensor> seed,
                                   int64_t threshold, double keep_scale, int64_t first,
                                   int64_t width) {
  Weights g = arguments(context, prefix, lse, mask, causal, scale, relu, gated, seed, threshold,
                        keep_scale, first, width);
  g.d_context = floats("d_context", d_context, context, 3);
  g.d_prefix = floats("d_prefix", d_prefix, prefix, 3);
  g.delta = floats("delta", delta, context, 2);
  run(backward_for_this_machine, g, context.size(0) * g.queries, grain(g));
  return d_context;
}

}  // namespace
}  // namespace pelt_fast

STABLE_TORCH_LIBRARY_FRAGMENT(pelt_fast_cpp, m) {
  m.def(
      "attention_weights_(Tensor(a!) context, Tensor(b!) prefix, Tensor(c!) lse, Tensor? mask,"
      " bool causal, float scale, bool relu, bool gated, Tensor? seed, int threshold,"
      " float keep_scale, int first, int width) -> Tensor(a!)");
  m.def(
      "attention_weights_backward_(Tensor(a!) context, Tensor(b!) prefix, Tensor(c!) d_context,"
      " Tensor(d!) d_prefix, Tensor lse, Tensor delta, Tensor? mask, bool causal, float scale,"
      " bool relu, bool gated, Tensor? seed, int threshold, float keep_scale, int first, int width)"
      " -> Tensor(c!)");
}

STABLE_TORCH_LIBRARY_IMPL(pelt_fast_cpp, CPU, m) {
  m.impl("attention_weights_", TORCH_BOX(&pelt_fast::attention_weights_));
  m.impl("attention_weights_backward_", TORCH_BOX(&pelt_fast::attention_weights_backward_));
}
