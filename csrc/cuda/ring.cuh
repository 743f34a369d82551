// A ring of stages in shared memory: one thread copies into a stage while others multiply another.
#pragma once

#include "hopper.cuh"

namespace pelt_fast {

// Stage i holds a part of `a` and of `b`. full[i]: the copies have arrived; empty[i]: all who read
// the stage have released it.
struct Stages {
  unsigned char *a, *b;
  uint64_t *full, *empty;
};

// Where in a ring of `Count` stages a thread is: the parity flips with each turn.
template <int Count>
struct RingTurn {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void next() {
    if (++stage == Count) stage = 0, parity ^= 1;
  }
};

// One lane of each warp says that this block is done with a stage, to all that copy into it.
template <int Cluster>
__device__ __forceinline__ void release(const Stages& ring, int stage) {
  if (threadIdx.x % 32 < Cluster) arrive(ring.empty + stage, threadIdx.x % 32);
}

}  // namespace pelt_fast
