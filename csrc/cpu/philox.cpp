// out[i] = scale where element `start + i` of the dropout mask is kept, else 0.
//
// Shapes   out: any, contiguous, read as one row; seed (2): key, offset.
// Maths    Philox4x32, 7 rounds, one draw for 8 elements; definition and bits are those of
//          pelt_fast/reference/philox.py.
// Traffic  writes out once; 14 products of 32 x 32 bits for 8 elements, in vectors.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "../check.h"

namespace {

using torch::stable::Tensor;

constexpr int kRounds = 7;
constexpr int kLanes = 8;                // elements of a draw
constexpr int kDraws = 32;               // draws side by side in vectors
constexpr int kBlock = kDraws * kLanes;  // elements of a block
constexpr int64_t kGrain = 64;           // blocks a thread is worth waking for

struct Seed {
  uint32_t key[2], offset[2];
};

struct Mask {
  Seed seed;
  int64_t start, count;
  uint32_t threshold;
};

// The 16-bit lanes of block `block`, in element order.
PELT_FAST_INLINE void draw_lanes(const Seed& seed, uint64_t block, uint16_t* lanes) {
  uint32_t c0[kDraws], c1[kDraws], c2[kDraws], c3[kDraws];
  for (int i = 0; i < kDraws; ++i) {
    const uint64_t draw = block * kDraws + i;
    c0[i] = static_cast<uint32_t>(draw);
    c1[i] = static_cast<uint32_t>(draw >> 32);
    c2[i] = seed.offset[0];
    c3[i] = seed.offset[1];
  }
  uint32_t k0 = seed.key[0], k1 = seed.key[1];
  for (int round = 0; round < kRounds; ++round) {
    for (int i = 0; i < kDraws; ++i) {
      const uint64_t p0 = uint64_t{0xD2511F53u} * c0[i];
      const uint64_t p1 = uint64_t{0xCD9E8D57u} * c2[i];
      c0[i] = static_cast<uint32_t>(p1 >> 32) ^ c1[i] ^ k0;
      c2[i] = static_cast<uint32_t>(p0 >> 32) ^ c3[i] ^ k1;
      c1[i] = static_cast<uint32_t>(p1);
      c3[i] = static_cast<uint32_t>(p0);
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  uint32_t words[4 * kDraws];
  for (int i = 0; i < kDraws; ++i) {
    words[4 * i] = c0[i];
    words[4 * i + 1] = c1[i];
    words[4 * i + 2] = c2[i];
    words[4 * i + 3] = c3[i];
  }
  std::memcpy(lanes, words, sizeof(words));  // little end first
}

// Blocks [first, last) of the mask, counted from the block that `start` lies in.
template <typename Word>
PELT_FAST_INLINE void fill_blocks(const Mask& mask, int64_t first, int64_t last, Word kept, Word* out) {
  uint16_t lanes[kBlock];
  Word values[kBlock];
  const int64_t origin = mask.start / kBlock;
  for (int64_t b = first; b < last; ++b) {
    draw_lanes(mask.seed, static_cast<uint64_t>(origin + b), lanes);
    for (int i = 0; i < kBlock; ++i) values[i] = lanes[i] >= mask.threshold ? kept : Word{0};
    const int64_t place = (origin + b) * kBlock - mask.start;  // of values[0] in out
    const int64_t from = std::max<int64_t>(0, -place);
    const int64_t to = std::min<int64_t>(kBlock, mask.count - place);
    if (to > from) std::memcpy(out + place + from, values + from, (to - from) * sizeof(Word));
  }
}

PELT_FAST_CLONES void fill16(const Mask& m, int64_t a, int64_t b, uint16_t kept, uint16_t* out) {
  fill_blocks(m, a, b, kept, out);
}
PELT_FAST_CLONES void fill32(const Mask& m, int64_t a, int64_t b, uint32_t kept, uint32_t* out) {
  fill_blocks(m, a, b, kept, out);
}
PELT_FAST_CLONES void fill64(const Mask& m, int64_t a, int64_t b, uint64_t kept, uint64_t* out) {
  fill_blocks(m, a, b, kept, out);
}

template <typename Word, typename Value, typename Fill>
void fill(const Mask& mask, Value scale, Tensor& out, Fill fill_range) {
  Word kept;
  static_assert(sizeof(Word) == sizeof(Value));
  std::memcpy(&kept, &scale, sizeof(kept));
  Word* data = static_cast<Word*>(out.mutable_data_ptr());
  const int64_t blocks = (mask.start % kBlock + mask.count + kBlock - 1) / kBlock;
  torch::stable::parallel_for(0, blocks, kGrain, [&](int64_t first, int64_t last) {
    fill_range(mask, first, last, kept, data);
  });
}

Tensor dropout_factor_(Tensor out, int64_t threshold, double scale, Tensor seed, int64_t start) {
  using torch::headeronly::ScalarType;
  PELT_FAST_CHECK(out.is_cpu() && out.is_contiguous(), "out must be a contiguous CPU tensor");
  PELT_FAST_CHECK(seed.is_cpu() && seed.scalar_type() == ScalarType::Long && seed.numel() == 2 &&
                      seed.is_contiguous(),
                  "seed must be int64 (2) on the CPU");
  PELT_FAST_CHECK(threshold >= 0 && threshold < 65536, "threshold must be in [0, 65536), got ",
                  threshold);
  PELT_FAST_CHECK(start >= 0, "start must be at least 0, got ", start);
  const auto* words = static_cast<const uint64_t*>(seed.const_data_ptr());
  const Mask mask{{{static_cast<uint32_t>(words[0]), static_cast<uint32_t>(words[0] >> 32)},
                   {static_cast<uint32_t>(words[1]), static_cast<uint32_t>(words[1] >> 32)}},
                  start,
                  out.numel(),
                  static_cast<uint32_t>(threshold)};
  switch (out.scalar_type()) {
    case ScalarType::Float:
      fill<uint32_t>(mask, static_cast<float>(scale), out, fill32);
      break;
    case ScalarType::Double:
      fill<uint64_t>(mask, scale, out, fill64);
      break;
    case ScalarType::BFloat16:
      fill<uint16_t>(mask, torch::headeronly::BFloat16(static_cast<float>(scale)), out, fill16);
      break;
    case ScalarType::Half:
      fill<uint16_t>(mask, torch::headeronly::Half(static_cast<float>(scale)), out, fill16);
      break;
    default:
      PELT_FAST_CHECK(false, "out must be float64, float32, bfloat16 or float16");
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pelt_fast_cpp, m) {
  m.def(
      "dropout_factor_(Tensor(a!) out, int threshold, float scale, Tensor seed, int start)"
      " -> Tensor(a!)");
}

STABLE_TORCH_LIBRARY_IMPL(pelt_fast_cpp, CPU, m) {
  m.impl("dropout_factor_", TORCH_BOX(&dropout_factor_));
}
