// The activation and the dropout of a bottleneck, on a block of rows in fp32.

#include "bottleneck.h"

namespace pelt_fast {
namespace {

struct Bottleneck {
  Activation activation;
  Mask mask;
  Tile *h, *slope;
  int64_t rank;
  Block block;
};

// The mask of a block of rows `rank` wide, row behind row: rows that follow each other share draws.
PELT_FAST_INLINE void draw_narrow(float* to, const Mask& mask, int64_t rank, const Block& block) {
  if (block.drawn_at != nullptr) {
    alignas(64) Row row;
    for (int i = 0; i < block.rows; ++i) {
      draw_row(row, mask, rank, block.drawn_at[i], 0);
      std::memcpy(to + i * rank, row, rank * sizeof(float));
    }
    return;
  }
  for (int64_t done = 0; done < block.rows * rank; done += kColumns)
    draw_row(to + done, mask, 1, block.drawn * rank + done, 0);
}

template <int W>
PELT_FAST_INLINE void apply(const Bottleneck& g, int64_t, int64_t) {
  alignas(64) Tile factor;
  const int64_t pad = padded(g.rank);
  for (int i = 0; i < g.block.rows; ++i) {
    if (g.slope == nullptr) {
      values(g.activation, (*g.h)[i], pad);
    } else {
      slopes(g.activation, (*g.h)[i], (*g.slope)[i], pad);
    }
  }
  if (g.mask.threshold == 0) return;
  draw_narrow(&factor[0][0], g.mask, g.rank, g.block);
  for (int i = 0; i < g.block.rows; ++i) {
    const float* of_row = &factor[0][0] + i * g.rank;
    for (int64_t j = 0; j < g.rank; ++j) (*g.h)[i][j] *= of_row[j];
    if (g.slope != nullptr)
      for (int64_t j = 0; j < g.rank; ++j) (*g.slope)[i][j] *= of_row[j];
  }
}
PELT_FAST_FOR_EACH_INSTRUCTION_SET(apply, Bottleneck)

}  // namespace

void bottleneck(Activation activation, const Mask& mask, Tile& h, Tile* slope, int64_t rank,
                const Block& block) {
  apply_for_this_machine({activation, mask, &h, slope, rank, block}, 0, 0);
}

}  // namespace pelt_fast
