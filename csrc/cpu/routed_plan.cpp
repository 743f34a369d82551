// The blocks and tasks of a batch of many methods, from its segments.

#include <tuple>

#include "routed.h"

namespace pelt_fast {
namespace {

// The segments, checked: each inside the rows, none over another.
std::vector<Segment> checked(const Tensor& segments, int64_t methods, int64_t rows) {
  PELT_FAST_CHECK(segments.is_cpu() && segments.dim() == 2 && segments.size(1) == 4 &&
                      segments.scalar_type() == ScalarType::Long && segments.is_contiguous(),
                  "segments must be contiguous int64 (S, 4) on the CPU, got ", shape_of(segments));
  const auto* data = static_cast<const int64_t*>(segments.const_data_ptr());
  std::vector<Segment> found;
  found.reserve(segments.size(0));
  for (int64_t i = 0; i < segments.size(0); ++i, data += 4) {
    const Segment s{data[0], data[1], data[2], data[3]};
    PELT_FAST_CHECK(s.row >= 0 && s.rows >= 0 && s.rows <= rows - s.row && s.method >= -1 &&
                        s.method < methods && s.drawn >= 0,
                    "segments must lie in ", rows, " rows and be of a method from -1 to ",
                    methods - 1, ", got (", s.row, ", ", s.rows, ", ", s.method, ", ", s.drawn,
                    ")");
    if (s.rows > 0) found.push_back(s);
  }
  std::sort(found.begin(), found.end(),
            [](const Segment& a, const Segment& b) { return a.row < b.row; });
  for (size_t i = 1; i < found.size(); ++i)
    PELT_FAST_CHECK(found[i - 1].row + found[i - 1].rows <= found[i].row,
                    "segments must be disjoint, got two with row ", found[i].row);
  return found;
}

class Planner {
 public:
  Planner(Plan& plan, int64_t width, bool by_parts)
      : plan_(plan), width_(width), by_parts_(by_parts) {}

  // The segments [first, last) of one method, in the order of its own rows.
  void add(const Segment* first, const Segment* last) {
    method_ = static_cast<int>(first->method);
    const size_t before = plan_.blocks.size();
    std::vector<Segment> left;
    int64_t rows = 0;
    for (const Segment* s = first; s < last; ++s) {
      rows += s->rows;
      int64_t done = 0;
      for (; s->rows - done >= kRows; done += kRows) block(*s, done, kRows);
      const int64_t rest = s->rows - done;
      if (rest >= kShort) {
        block(*s, done, rest);
      } else if (rest > 0) {
        left.push_back({s->row + done, rest, s->method, s->drawn + done});
      }
    }
    gather(left);
    plan_.methods[method_].rows = rows;
    cut(before, rows);
  }

  // Rows of none.
  void add_rest(int64_t row, int64_t rows) {
    for (int64_t done = 0; done < rows; done += kRows) {
      block({row, rows, -1, row}, done, std::min<int64_t>(kRows, rows - done));
      task(plan_.blocks.size() - 1, plan_.blocks.size(), -1);
    }
  }

 private:
  void block(const Segment& s, int64_t done, int64_t rows) {
    plan_.blocks.push_back({s.row + done, width_, static_cast<int>(rows), rows % 8 == 0,
                            s.drawn + done, nullptr, nullptr});
  }

  // One segment left is a block of its own, several are gathered.
  void gather(const std::vector<Segment>& left) {
    if (left.size() == 1) return block(left[0], 0, left[0].rows);
    size_t first = plan_.at.size();
    for (const Segment& s : left)
      for (int64_t i = 0; i < s.rows; ++i) {
        plan_.at.push_back(s.row + i);
        plan_.drawn_at.push_back(s.drawn + i);
      }
    for (size_t rows; first < plan_.at.size(); first += rows) {
      rows = std::min<size_t>(kRows, plan_.at.size() - first);
      plan_.blocks.push_back({0, width_, static_cast<int>(rows), false, 0, plan_.at.data() + first,
                              plan_.drawn_at.data() + first});
    }
  }

  // Tasks of the method's blocks from `first` on: each block, or each part of its rows.
  void cut(size_t first, int64_t rows) {
    const int64_t part = by_parts_ ? rows_of_part(rows, plan_.methods[method_].rank) : 1;
    int64_t taken = 0;
    for (size_t b = first; b < plan_.blocks.size(); ++b) {
      taken += plan_.blocks[b].rows;
      if (taken < part && b + 1 < plan_.blocks.size()) continue;
      task(first, b + 1, method_);
      first = b + 1, taken = 0;
    }
  }

  void task(int64_t first, int64_t last, int method) {
    const int64_t rank = method < 0 ? kCopying : padded(plan_.methods[method].rank);
    const bool packs = method >= 0 && plan_.methods[method].tasks++ == 0;
    int64_t work = packs ? kPacking * rank : 0;
    for (int64_t b = first; b < last; ++b) work += plan_.blocks[b].products() * rank;
    plan_.tasks.push_back({first, last, method});
    plan_.starts.push_back(plan_.starts.back() + work);
  }

  Plan& plan_;
  int64_t width_;
  bool by_parts_;
  int method_ = -1;
};

}  // namespace

Plan plan_of(const Tensor& segments, const std::vector<int64_t>& ranks, int64_t rows, int64_t width,
             bool by_parts, bool with_rest) {
  Plan plan;
  for (const int64_t rank : ranks) {
    PELT_FAST_CHECK(rank >= 0, "ranks must be at least 0, got ", rank);
    plan.methods.push_back({rank, plan.total_rank, 0});
    plan.total_rank += rank;
    if (rank <= kMaxRank) plan.most_rank = std::max(plan.most_rank, rank);
  }
  std::vector<Segment> all = checked(segments, ranks.size(), rows), ours;
  for (const Segment& s : all)
    if (s.method >= 0 && ranks[s.method] >= 1 && ranks[s.method] <= kMaxRank) ours.push_back(s);
  plan.starts.push_back(0);
  plan.at.reserve(rows), plan.drawn_at.reserve(rows);  // blocks point into them
  Planner planner(plan, width, by_parts);
  if (with_rest) {
    int64_t row = 0;
    for (const Segment& s : ours) {
      planner.add_rest(row, s.row - row);
      row = s.row + s.rows;
    }
    planner.add_rest(row, rows - row);
  }
  std::sort(ours.begin(), ours.end(), [](const Segment& a, const Segment& b) {
    return std::tie(a.method, a.drawn, a.row) < std::tie(b.method, b.drawn, b.row);
  });
  for (size_t first = 0, last; first < ours.size(); first = last) {
    for (last = first; last < ours.size() && ours[last].method == ours[first].method;) ++last;
    planner.add(ours.data() + first, ours.data() + last);
  }
  return plan;
}

Masks masks_of(const std::optional<Tensor>& seeds, const std::vector<int64_t>& thresholds,
               const std::vector<double>& scales, size_t methods) {
  Masks masks{nullptr, thresholds, scales};
  if (!seeds.has_value()) return masks;
  PELT_FAST_CHECK(seeds->is_cpu() && seeds->scalar_type() == ScalarType::Long &&
                      seeds->is_contiguous() && seeds->numel() == 2 * static_cast<int64_t>(methods),
                  "seeds must be contiguous int64 (", methods, ", 2) on the CPU, got ",
                  shape_of(*seeds));
  PELT_FAST_CHECK(thresholds.size() == methods && scales.size() == methods,
                  "thresholds and keep_scales must have ", methods, " items, got ",
                  thresholds.size(), " and ", scales.size());
  for (const int64_t threshold : thresholds) check_threshold(threshold);
  masks.seeds = static_cast<const int64_t*>(seeds->const_data_ptr());
  return masks;
}

}  // namespace pelt_fast
