// out[i] = scale where element `start + i` of the dropout mask is kept, else 0.
//
// Shapes   out: any, contiguous, read as one row; seed (2): key, offset.
// Maths    Philox4x32, 7 rounds, one draw for 8 elements; definition and bits are those of
//          pelt_fast/ops/common/dropout.py.
// Traffic  writes out once; 14 products of 32 x 32 bits for 8 elements, in vectors.

#include <torch/csrc/stable/library.h>

#include "arguments.h"

namespace pelt_fast {
namespace {

constexpr int kDraws = 32;               // draws side by side in vectors
constexpr int kBlock = kDraws * kLanes;  // elements of a block
constexpr int64_t kGrain = 64;           // blocks a thread is worth waking for

struct Fill {
  Seed seed;
  int64_t start, count;
  uint32_t threshold;
  uint64_t kept;  // the bits of what a kept element is
  void* out;
  int64_t bytes;  // of an element
};

// Blocks [first, last) of the mask, counted from the block that `start` lies in.
template <typename Word>
PELT_FAST_INLINE void fill_blocks(const Fill& g, int64_t first, int64_t last) {
  uint16_t lanes[kBlock];
  Word values[kBlock];
  Word* out = static_cast<Word*>(g.out);
  const auto kept = static_cast<Word>(g.kept);
  const int64_t origin = g.start / kBlock;
  for (int64_t b = first; b < last; ++b) {
    draw_lanes<kDraws>(g.seed, static_cast<uint64_t>(origin + b) * kDraws, lanes);
    for (int i = 0; i < kBlock; ++i) values[i] = lanes[i] >= g.threshold ? kept : Word{0};
    const int64_t place = (origin + b) * kBlock - g.start;  // of values[0] in out
    const int64_t from = std::max<int64_t>(0, -place);
    const int64_t to = std::min<int64_t>(kBlock, g.count - place);
    if (to > from) std::memcpy(out + place + from, values + from, (to - from) * sizeof(Word));
  }
}

template <int W>
PELT_FAST_INLINE void fill(const Fill& g, int64_t first, int64_t last) {
  if (g.bytes == 2) return fill_blocks<uint16_t>(g, first, last);
  if (g.bytes == 4) return fill_blocks<uint32_t>(g, first, last);
  fill_blocks<uint64_t>(g, first, last);
}
PELT_FAST_FOR_EACH_INSTRUCTION_SET(fill, Fill)

template <typename Value>
uint64_t bits_of(Value value) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(value));  // little end first
  return bits;
}

Tensor dropout_factor_(Tensor out, int64_t threshold, double scale, Tensor seed, int64_t start) {
  PELT_FAST_CHECK(out.is_cpu() && out.is_contiguous(), "out must be a contiguous CPU tensor");
  check_threshold(threshold);
  PELT_FAST_CHECK(start >= 0, "start must be at least 0, got ", start);
  Fill g{seed_of(seed),          start, out.numel(), static_cast<uint32_t>(threshold), 0,
         out.mutable_data_ptr(), 4};
  switch (out.scalar_type()) {
    case ScalarType::Float:
      g.kept = bits_of(static_cast<float>(scale));
      break;
    case ScalarType::Double:
      g.kept = bits_of(scale), g.bytes = 8;
      break;
    case ScalarType::BFloat16:
      g.kept = bits_of(BFloat16(static_cast<float>(scale)).x), g.bytes = 2;
      break;
    case ScalarType::Half:
      g.kept = bits_of(Half(static_cast<float>(scale)).x), g.bytes = 2;
      break;
    default:
      PELT_FAST_CHECK(false, "out must be float64, float32, bfloat16 or float16");
  }
  const int64_t blocks = (start % kBlock + g.count + kBlock - 1) / kBlock;
  run(fill_for_this_machine, g, blocks, kGrain);
  return out;
}

}  // namespace
}  // namespace pelt_fast

STABLE_TORCH_LIBRARY_FRAGMENT(pelt_fast_cpp, m) {
  m.def(
      "dropout_factor_(Tensor(a!) out, int threshold, float scale, Tensor seed, int start)"
      " -> Tensor(a!)");
}

STABLE_TORCH_LIBRARY_IMPL(pelt_fast_cpp, CPU, m) {
  m.impl("dropout_factor_", TORCH_BOX(&pelt_fast::dropout_factor_));
}
