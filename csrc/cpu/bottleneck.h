// What happens between the two products of a bottleneck: its activation and its dropout.
#pragma once

#include "blocks.h"
#include "elementwise.h"

namespace pelt_fast {

// h = mask * f(t), and slope = mask * f'(t) where it is not null; zeros from the rank to its pad.
void bottleneck(Activation activation, const Mask& mask, Tile& h, Tile* slope, int64_t rank,
                const Block& block);

}  // namespace pelt_fast
