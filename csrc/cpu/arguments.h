// What the ops ask of their tensors, in messages that name the argument, what came, what was
// wanted.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <memory>
#include <optional>

#include "../tensors.h"
#include "tile.h"

namespace pelt_fast {

// A CPU matrix of `dtype` with contiguous rows; a size of -1 is free.
inline void check_rows(const char* name, const Tensor& t, int64_t rows, int64_t columns,
                       ScalarType dtype) {
  const bool fits =
      t.dim() == 2 && (rows < 0 || t.size(0) == rows) && (columns < 0 || t.size(1) == columns);
  const std::string wanted = "(" + (rows < 0 ? std::string("M") : std::to_string(rows)) + ", " +
                             (columns < 0 ? std::string("K") : std::to_string(columns)) + ")";
  PELT_FAST_CHECK(fits, name, " must have shape ", wanted, ", got ", shape_of(t));
  PELT_FAST_CHECK(t.is_cpu(), name, " must be on the CPU");
  PELT_FAST_CHECK(t.scalar_type() == dtype, name, " must have dtype number ",
                  static_cast<int>(dtype), ", got ", static_cast<int>(t.scalar_type()));
  PELT_FAST_CHECK(t.size(1) <= 1 || t.stride(1) == 1, name,
                  " must have contiguous rows, got a stride of ", t.stride(1));
}

// The activation's dtype decides: float32, bfloat16 or float16.
inline ScalarType check_activation(const char* name, const Tensor& t) {
  const ScalarType dtype = t.scalar_type();
  PELT_FAST_CHECK(
      dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
      name, " must be float32, bfloat16 or float16, got dtype number ", static_cast<int>(dtype));
  return dtype;
}

inline int64_t check_rank(int64_t rank) {
  PELT_FAST_CHECK(rank >= 1 && rank <= kMaxRank, "the rank must be 1 to ", kMaxRank, ", got ",
                  rank);
  return rank;
}

inline void check_threshold(int64_t threshold) {
  PELT_FAST_CHECK(threshold >= 0 && threshold < 65536, "threshold must be in [0, 65536), got ",
                  threshold);
}

inline Seed seed_at(const uint64_t* words) {
  return {{static_cast<uint32_t>(words[0]), static_cast<uint32_t>(words[0] >> 32)},
          {static_cast<uint32_t>(words[1]), static_cast<uint32_t>(words[1] >> 32)}};
}

inline Seed seed_of(const Tensor& seed) {
  PELT_FAST_CHECK(seed.is_cpu() && seed.scalar_type() == ScalarType::Long && seed.numel() == 2 &&
                      seed.is_contiguous(),
                  "seed must be int64 (2) on the CPU");
  return seed_at(static_cast<const uint64_t*>(seed.const_data_ptr()));
}

inline Mask mask_of(const std::optional<Tensor>& seed, int64_t threshold, double scale) {
  Mask mask{};
  if (!seed.has_value()) return mask;
  check_threshold(threshold);
  mask.seed = seed_of(*seed);
  mask.threshold = static_cast<uint32_t>(threshold);
  mask.scale = static_cast<float>(scale);
  return mask;
}

// `kernel(arguments, first, last)` over [0, count) on torch's threads. The instruction set is
// chosen before they start: a refusal of it is an error of the caller's.
template <typename Arguments>
void run(void (*kernel)(const Arguments&, int64_t, int64_t), const Arguments& arguments,
         int64_t count, int64_t grain) {
  instruction_set();
  torch::stable::parallel_for(0, count, grain,
                              [&](int64_t first, int64_t last) { kernel(arguments, first, last); });
}

using Buffer = std::unique_ptr<float[]>;
inline Buffer buffer(int64_t floats) { return Buffer(new float[std::max<int64_t>(floats, 1)]); }

// A small weight (rows, columns), any strides, as fp32 (rows_padded, columns_padded), zeros around.
inline Buffer packed(const Tensor& weight, bool transposed, int64_t rows_padded,
                     int64_t columns_padded) {
  Buffer out = buffer(rows_padded * columns_padded);
  const auto* data = static_cast<const float*>(weight.const_data_ptr());
  const int64_t rows = weight.size(transposed ? 1 : 0), columns = weight.size(transposed ? 0 : 1);
  const int64_t down = weight.stride(transposed ? 1 : 0), along = weight.stride(transposed ? 0 : 1);
  for (int64_t i = 0; i < rows_padded; ++i)
    for (int64_t j = 0; j < columns_padded; ++j)
      out[i * columns_padded + j] = i < rows && j < columns ? data[i * down + j * along] : 0.0f;
  return out;
}

// A vector as fp32 times `scale`, zeros behind; all zeros for a missing one.
inline Buffer packed_vector(const std::optional<Tensor>& v, int64_t size, float scale = 1) {
  Buffer out = buffer(size);
  std::fill_n(out.get(), size, 0.0f);
  if (v.has_value()) {
    const auto* data = static_cast<const float*>(v->const_data_ptr());
    const int64_t count = v->numel(), stride = v->stride(0);
    for (int64_t i = 0; i < count; ++i) out[i] = data[i * stride] * scale;
  }
  return out;
}

inline void check_weight(const char* name, const Tensor& t, int64_t rows, int64_t columns) {
  PELT_FAST_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns, name,
                  " must have shape (", rows, ", ", columns, "), got ", shape_of(t));
  PELT_FAST_CHECK(t.is_cpu() && t.scalar_type() == ScalarType::Float, name,
                  " must be float32 on the CPU");
}

inline void check_vector(const char* name, const std::optional<Tensor>& t, int64_t size) {
  if (!t.has_value()) return;
  PELT_FAST_CHECK(t->dim() == 1 && t->size(0) == size, name, " must have shape (", size, "), got ",
                  shape_of(*t));
  PELT_FAST_CHECK(t->is_cpu() && t->scalar_type() == ScalarType::Float, name,
                  " must be float32 on the CPU");
}

// out (rows, columns) = scale times the sum over `parts` of parts (rows, stride), in their order.
inline void add_parts(Tensor& out, const float* data, int64_t parts, int64_t part_size,
                      int64_t stride, float scale) {
  const int64_t rows = out.dim() == 1 ? 1 : out.size(0), columns = out.size(out.dim() - 1);
  auto* sums = static_cast<float*>(out.mutable_data_ptr());
  torch::stable::parallel_for(0, rows, 64, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      float* row = sums + i * columns;
      std::fill_n(row, columns, 0.0f);
      for (int64_t p = 0; p < parts; ++p) {
        const float* part = data + p * part_size + i * stride;
        for (int64_t j = 0; j < columns; ++j) row[j] += part[j];
      }
      for (int64_t j = 0; j < columns; ++j) row[j] *= scale;
    }
  });
}

template <typename T>
Rows<T> rows_of(const Tensor& t) {
  return {static_cast<T*>(const_cast<void*>(t.const_data_ptr())), t.stride(0)};
}

}  // namespace pelt_fast
