// The launchers of csrc/cuda under names that Python can call. A library has one of them, so they
// are weak.

#include <cstdint>

#include "rank_backward.h"
#include "tail_gemm.h"

namespace pelt_fast {

int64_t __attribute__((weak)) rank_backward_workspace(const RankBackward&, int);
cudaError_t __attribute__((weak)) rank_backward(const RankBackward&, void*, int, cudaStream_t);
cudaError_t __attribute__((weak)) tail_gemm(const TailGemm&, int, cudaStream_t, int);

}  // namespace pelt_fast

extern "C" {

int64_t rank_backward_workspace(const pelt_fast::RankBackward* g, int processors) {
  return pelt_fast::rank_backward_workspace(*g, processors);
}
int rank_backward(const pelt_fast::RankBackward* g, void* workspace, int processors) {
  return pelt_fast::rank_backward(*g, workspace, processors, nullptr);
}
int tail_gemm(const pelt_fast::TailGemm* g, int processors, int cluster) {
  return pelt_fast::tail_gemm(*g, processors, nullptr, cluster);
}

// What ctypes must agree on.
int64_t size_of_rank_backward() { return sizeof(pelt_fast::RankBackward); }
int64_t size_of_tail_gemm() { return sizeof(pelt_fast::TailGemm); }

}  // extern "C"
