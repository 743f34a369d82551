// The dropout mask: Philox4x32, 7 rounds, one draw for 8 elements; definition and bits are those of
// pelt_fast/ops/common/dropout.py.
#pragma once

#include <cstdint>
#include <cstring>

#include "../check.h"

namespace pelt_fast {

constexpr int kRounds = 7;
constexpr int kLanes = 8;  // elements of a draw

struct Seed {
  uint32_t key[2], offset[2];
};

// What a mask is made of; a threshold of 0 keeps everything and draws nothing.
struct Mask {
  Seed seed;
  uint32_t threshold;
  float scale;
};

// The 16-bit lanes of `Draws` draws from `first` on, in element order. Draws lie side by side, a
// 64-bit lane for each word: products of 32 x 32 bits are then one instruction. Unrolled away, these
// loops would not become vectors.
template <int Draws>
PELT_FAST_INLINE void draw_lanes(const Seed& seed, uint64_t first, uint16_t* lanes) {
  constexpr uint64_t kLow = 0xFFFFFFFFu;
  uint64_t c0[Draws], c1[Draws], c2[Draws], c3[Draws], words[2 * Draws];
#pragma GCC unroll 1
  for (int i = 0; i < Draws; ++i) {
    const uint64_t draw = first + i;
    c0[i] = draw & kLow;
    c1[i] = draw >> 32;
    c2[i] = seed.offset[0];
    c3[i] = seed.offset[1];
  }
  uint32_t k0 = seed.key[0], k1 = seed.key[1];
  for (int round = 0; round < kRounds; ++round) {
#pragma GCC unroll 1
    for (int i = 0; i < Draws; ++i) {
      const uint64_t p0 = uint64_t{0xD2511F53u} * static_cast<uint32_t>(c0[i]);
      const uint64_t p1 = uint64_t{0xCD9E8D57u} * static_cast<uint32_t>(c2[i]);
      c0[i] = (p1 >> 32) ^ c1[i] ^ k0;
      c2[i] = (p0 >> 32) ^ c3[i] ^ k1;
      c1[i] = p1 & kLow;
      c3[i] = p0 & kLow;
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
#pragma GCC unroll 1
  for (int i = 0; i < Draws; ++i) {
    words[2 * i] = c0[i] | c1[i] << 32;
    words[2 * i + 1] = c2[i] | c3[i] << 32;
  }
  std::memcpy(lanes, words, sizeof(words));  // little end first
}

}  // namespace pelt_fast
