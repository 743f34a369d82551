// The launcher of tail_gemm.cu: raw pointers, sizes and a stream, no torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace pelt_fast {

// out (M, N) = a (M, K) w + bias (N) + mask * (s (M, R) u): see tail_gemm.cu. w is (N, K), u (N, R)
// (`transposed` false: y of a linear layer), or w (K, N), u (R, N) (true: its dx). All are bf16 or
// fp16 and contiguous but for a and out, whose rows lie a_stride and out_stride elements apart.
// `bits` (M, N / 8), where given, is the mask, a bit an element, the lowest first; what it keeps is
// multiplied by keep_scale. K, N, R and the strides are multiples of 8, pointers aligned to 16.
struct TailGemm {
  const void *a, *w, *s, *u, *bias;  // bias may be null
  const uint8_t* bits;               // may be null
  void* out;
  int64_t rows, width, depth, rank;  // M, N, K, R
  int64_t a_stride, out_stride;
  float keep_scale;
  bool transposed, is_bf16;
};

// cudaErrorInvalidValue for what is not as said above, cudaErrorNotSupported on another GPU than
// sm_90; nothing is launched then. `cluster`, 1 or 2, is the blocks that share a tile of w.
cudaError_t tail_gemm(const TailGemm& g, int processors, cudaStream_t stream, int cluster = 2);

}  // namespace pelt_fast
