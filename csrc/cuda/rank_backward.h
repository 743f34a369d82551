// The launcher of rank_backward.cu: raw pointers, sizes and a stream, no torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace pelt_fast {

// dh (M, R), db (N, R), d_bias (N) from dy (M, N), h (M, R), b (N, R): see rank_backward.cu. dy, h,
// b and dh are bf16 or fp16, db and d_bias fp32; rows of dy lie `stride` elements apart, all else is
// contiguous. N, R and stride are multiples of 8, R is at most 64, pointers are aligned to 16 bytes.
struct RankBackward {
  const void *dy, *h, *b;
  void* dh;
  float *db, *d_bias;  // d_bias may be null
  int64_t rows, width, rank, stride;
  float scale;
  bool is_bf16;
};

// Bytes of workspace on a device of `processors` multiprocessors; 0 where rank_backward refuses the
// sizes for being empty.
int64_t rank_backward_workspace(const RankBackward& g, int processors);

// cudaErrorInvalidValue for what is not as said above; nothing is launched then.
cudaError_t rank_backward(const RankBackward& g, void* workspace, int processors,
                          cudaStream_t stream);

}  // namespace pelt_fast
