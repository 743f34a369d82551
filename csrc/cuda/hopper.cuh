// The instructions of sm_90a that the tail GEMM is made of: barriers in shared memory, bulk tensor
// copies, products of a warpgroup. What they mean is in the PTX manual under their own names.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "mma.cuh"

namespace pelt_fast {

// ---- barriers

__device__ __forceinline__ void start_barrier(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals));
}
__device__ __forceinline__ void expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}
// An arrival at the barrier of the same place in block `rank` of the cluster.
__device__ __forceinline__ void arrive(uint64_t* barrier, uint32_t rank) {
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote];\n}" ::"r"(
          shared_address(barrier)),
      "r"(rank)
      : "memory");
}
__device__ __forceinline__ void wait_for(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}
// Barriers as they were started, seen by bulk copies and by the whole cluster.
__device__ __forceinline__ void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void meet_cluster() {
  asm volatile(
      "barrier.cluster.arrive.aligned;\n"
      "barrier.cluster.wait.aligned;" ::
          : "memory");
}
__device__ __forceinline__ uint32_t rank_in_cluster() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// `threads` threads meet; 0 is __syncthreads'.
__device__ __forceinline__ void meet(int name, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(name), "r"(threads) : "memory");
}

// ---- bulk tensor copies: x counts elements along a row, y rows; outside they read zeros and do
// not write

__device__ __forceinline__ void fetch_descriptor(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
__device__ __forceinline__ void load_box(void* to, const CUtensorMap* map, uint64_t* barrier, int x,
                                         int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, "
      "%4}], [%2];" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y)
      : "memory");
}
// Into the same place of every block in `blocks`, a bit each; each block's barrier counts the
// bytes.
__device__ __forceinline__ void load_box_everywhere(void* to, const CUtensorMap* map,
                                                    uint64_t* barrier, int x, int y,
                                                    uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "h"(blocks)
      : "memory");
}
__device__ __forceinline__ void store_box(const CUtensorMap* map, const void* from, int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
      "r"(shared_address(from)), "r"(x), "r"(y)
      : "memory");
}
__device__ __forceinline__ void commit_stores() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
// Until shared memory may be written again; `wait_stores` until the stores are done.
__device__ __forceinline__ void wait_stores_read() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}
__device__ __forceinline__ void wait_stores() {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}
__device__ __forceinline__ void publish_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---- registers and products of a warpgroup

template <int Registers>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}
template <int Registers>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}
__device__ __forceinline__ void begin_products() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int Left>
__device__ __forceinline__ void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Left) : "memory");
}

// Where an operand lies: rows of 128 bytes under the 128-byte swizzle, in atoms of 8 rows (1024
// bytes). `leading` and `stride` are bytes: K-major, leading is not read and stride leads to the
// next 8 rows; MN-major, leading leads to the next 64 columns and stride to the next 8 rows of K.
__device__ __forceinline__ uint64_t operand(const void* at, uint32_t leading, uint32_t stride) {
  constexpr uint64_t kSwizzle128 = 1;
  return static_cast<uint64_t>((shared_address(at) & 0x3FFFF) >> 4) |
         static_cast<uint64_t>(leading >> 4) << 16 | static_cast<uint64_t>(stride >> 4) << 32 |
         kSwizzle128 << 62;
}
// The operand `bytes` further on.
__device__ __forceinline__ uint64_t further(uint64_t operand, uint32_t bytes) {
  return operand + (bytes >> 4);
}

#define PELT_FAST_8(c, i)                                                                     \
  "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]), \
      "+f"(c[i + 6]), "+f"(c[i + 7])
#define PELT_FAST_32(c, i) \
  PELT_FAST_8(c, i), PELT_FAST_8(c, i + 8), PELT_FAST_8(c, i + 16), PELT_FAST_8(c, i + 24)
#define PELT_FAST_WGMMA(type)                                                                  \
  asm volatile(                                                                                \
      "wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type                             \
      " {"                                                                                     \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                 \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "       \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "       \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "       \
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "       \
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "       \
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, " \
      "%111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, "   \
      "%125, %126, %127}, %128, %129, 1, 1, 1, 0, %130;"                                       \
      : PELT_FAST_32(c, 0), PELT_FAST_32(c, 32), PELT_FAST_32(c, 64), PELT_FAST_32(c, 96)      \
      : "l"(a), "l"(b), "n"(static_cast<int>(Transposed)))

// c (64, 256) += a (64, 16) b (16, 256); b lies K-major, Transposed MN-major. Thread t of the
// warpgroup holds rows 16 (t / 32) + t % 32 / 4 [+ 8] and columns 8 j + 2 (t % 4) [+ 1]:
// c[4 j], c[4 j + 1], and 8 rows below c[4 j + 2], c[4 j + 3].
template <typename T, bool Transposed>
__device__ __forceinline__ void multiply_256(float (&c)[128], uint64_t a, uint64_t b) {
  if constexpr (std::is_same<T, __nv_bfloat16>::value) {
    PELT_FAST_WGMMA("bf16");
  } else {
    PELT_FAST_WGMMA("f16");
  }
}

}  // namespace pelt_fast
