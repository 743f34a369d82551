// Many methods in one batch: which blocks of rows belong to which, and their factors.
//
// A method's rows are cut into blocks of its own. A segment gives blocks of up to kRows rows; what is
// left of it, if it is short, is gathered with the short remainders of the method's other segments.
// Tasks are shared out by their work, never by their number: methods differ in rank and rows.
#pragma once

#include <vector>

#include "arguments.h"
#include "blocks.h"

namespace pelt_fast {

constexpr int64_t kShort = 8;    // rows: fewer are gathered with others
constexpr int64_t kPacking = 8;  // what it costs to pack a method's factor, in rows of its product
constexpr int64_t kCopying = 8;  // what it costs to copy a row, in ranks

// A rank padded to whole vectors.
inline int64_t narrow(int64_t rank) {
  return padded(rank, instruction_set() == InstructionSet::avx512 ? kPad : 8);
}

// Blocks [first, last) of one method, or of none (-1). A gradient's task is one part of the rows.
struct Task {
  int64_t first, last;
  int method;
};

struct Method {
  int64_t rank, first, rows;  // first: its place among the ranks of all; 0 rows: nothing to do here
  int64_t tasks = 0;
};

// Blocks lie method by method, in the order of the method's own rows.
struct Plan {
  std::vector<Method> methods;
  std::vector<Block> blocks;
  std::vector<Task> tasks;
  std::vector<int64_t> starts;        // of each task in work, and the whole behind
  std::vector<int64_t> at, drawn_at;  // of gathered blocks
  int64_t total_rank = 0, most_rank = 0;
};

struct Segment {
  int64_t row, rows, method, drawn;
};

// Methods of a rank above kMaxRank are not ours: their rows are as rows of none.
Plan plan_of(const Tensor& segments, const std::vector<int64_t>& ranks, int64_t rows, int64_t width,
             bool by_parts, bool with_rest);

// `kernel(arguments, first task, last task)` on torch's threads, each with its share of the work.
template <typename Arguments>
void run_plan(void (*kernel)(const Arguments&, int64_t, int64_t), const Arguments& arguments,
              const Plan& plan) {
  instruction_set();
  const auto begin = plan.starts.begin(), end = plan.starts.end() - 1;
  const auto task_at = [&](int64_t work) { return std::lower_bound(begin, end, work) - begin; };
  torch::stable::parallel_for(0, plan.starts.back(), 1, [&](int64_t first, int64_t last) {
    kernel(arguments, task_at(first), task_at(last));
  });
}

// The factors of all methods behind each other, of any dtype that the ops take; biases may be
// missing.
struct Factors {
  const void* data;
  ScalarType dtype;
};

inline Factors factors_of(const char* name, const Tensor& t, int64_t elements) {
  PELT_FAST_CHECK(t.is_cpu() && t.is_contiguous() && t.numel() == elements, name,
                  " must be contiguous on the CPU with ", elements, " elements, got ", shape_of(t));
  return {t.const_data_ptr(), check_activation(name, t)};
}

// A mask for each method.
struct Masks {
  const int64_t* seeds;  // null: nothing is dropped
  std::vector<int64_t> thresholds;
  std::vector<double> scales;

  Mask of(int method) const {
    Mask mask{};
    if (seeds == nullptr || thresholds[method] == 0) return mask;
    const auto key = static_cast<uint64_t>(seeds[2 * method]),
               offset = static_cast<uint64_t>(seeds[2 * method + 1]);
    mask.seed = {{static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32)},
                 {static_cast<uint32_t>(offset), static_cast<uint32_t>(offset >> 32)}};
    mask.threshold = static_cast<uint32_t>(thresholds[method]);
    mask.scale = static_cast<float>(scales[method]);
    return mask;
  }
};

// T or its gradient: rows wide enough for every rank.
inline void check_narrow(const char* name, const Tensor& t, int64_t rows, const Plan& plan,
                         ScalarType dtype) {
  check_rows(name, t, rows, -1, dtype);
  PELT_FAST_CHECK(t.size(1) >= plan.most_rank, name, " must have at least ", plan.most_rank,
                  " columns, got ", t.size(1));
}

inline void check_scales(const std::vector<double>& scales, size_t methods) {
  PELT_FAST_CHECK(scales.size() == methods, "scales must have ", methods, " items, got ",
                  scales.size());
}

Masks masks_of(const std::optional<Tensor>& seeds, const std::vector<int64_t>& thresholds,
               const std::vector<double>& scales, size_t methods);

// `count` numbers from place `from` of the factors on as fp32, times `scale`.
PELT_FAST_INLINE void widen(float* to, const Factors& f, int64_t from, int64_t count,
                            float scale = 1) {
  PELT_FAST_BY_TYPE(f.dtype, {
    const T* data = static_cast<const T*>(f.data) + from;
    for (int64_t j = 0; j < count; ++j) to[j] = to_float(data[j]) * scale;
  })
}

// A factor (rows, columns) as fp32 (rows, wide), zeros behind; the factor itself where it is that.
PELT_FAST_INLINE const float* upright(float* to, const Factors& f, int64_t from, int64_t rows,
                                      int64_t columns, int64_t wide) {
  if (f.dtype == ScalarType::Float && wide == columns)
    return static_cast<const float*>(f.data) + from;
  for (int64_t i = 0; i < rows; ++i) {
    widen(to + i * wide, f, from + i * columns, columns);
    std::fill_n(to + i * wide + columns, wide - columns, 0.0f);
  }
  return to;
}

// Rows and columns of a factor, of which the rows lie `stride` apart.
struct Piece {
  Factors factors;
  int64_t from, stride, rows, columns;
};

// A piece transposed as fp32 (columns, pad), zeros behind its rows; pad is that of `narrow`.
void transpose_piece(float* to, const Piece& piece, int64_t pad);

}  // namespace pelt_fast
