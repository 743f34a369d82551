// What happens between the two products of a bottleneck: its activation and its dropout.
#pragma once

#include "blocks.h"
#include "elementwise.h"

namespace pelt_fast {

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

// h = mask * f(t), and slope = mask * f'(t) where it is not null; zeros from the rank to its pad.
PELT_FAST_INLINE void bottleneck(Activation activation, const Mask& mask, Tile& h, Tile* slope,
                                 int64_t rank, const Block& block) {
  alignas(64) Tile factor;
  const int64_t pad = padded(rank);
  for (int i = 0; i < block.rows; ++i) {
    if (slope == nullptr) {
      values(activation, h[i], pad);
    } else {
      slopes(activation, h[i], (*slope)[i], pad);
    }
  }
  if (mask.threshold == 0) return;
  draw_narrow(&factor[0][0], mask, rank, block);
  for (int i = 0; i < block.rows; ++i) {
    const float* of_row = &factor[0][0] + i * rank;
    for (int64_t j = 0; j < rank; ++j) h[i][j] *= of_row[j];
    if (slope != nullptr)
      for (int64_t j = 0; j < rank; ++j) (*slope)[i][j] *= of_row[j];
  }
}

}  // namespace pelt_fast
