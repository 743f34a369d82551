// A frozen GEMM that begins with its rank tail, for Hopper (docs/maths.md#i2).
//
// Shapes   a (M, K), s (M, R); w (N, K), u (N, R) or w (K, N), u (R, N); bias (N); out (M, N).
// Maths    out = a w + mask * (s u) + bias, fp32 accumulation. The tail comes first: a mask is then
//          one multiplication of the accumulators, and the frozen product is added to them.
// Traffic  reads M K + K N + (M + N) R (and M N / 8 bytes of mask), writes M N: the GEMM's own and
//          R / K of it.
// Flops    2 M N (K + R), R rounded up to 16, 32 or a multiple of 64.
// Block    Three warpgroups on a tile of 128 x 256. One thread of the first copies (TMA, kStages
//          stages of 64 of K, full and empty barriers); the other two multiply (wgmma m64n256k16,
//          both operands from shared memory), 64 rows each. A cluster of two blocks, one below the
//          other, shares its tile of w: each copies half of it to both. Persistent: a block takes
//          tiles in groups of kGroup rows of tiles, for the L2 cache; the next tile's copies run
//          under the epilogue, which goes through shared memory to bulk stores.
// Budget   Shared memory 4 (16 + 32) KiB of stages + 32 KiB of output + barriers: 225 KiB of 227.
//          Registers 128 accumulators and what serves them, 232 at most; the copying group
//          keeps 40.

#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#error "tail_gemm.cu is compiled for sm_90a alone"
#endif

#include "hopper.cuh"
#include "ring.cuh"
#include "tail_gemm.h"
#include "tensor_map.h"

namespace pelt_fast {
namespace {

constexpr int kTileM = 128, kTileN = 256, kStep = 64, kStages = 4, kGroup = 8;
constexpr int kHalf = 64;  // rows of a warpgroup
constexpr int kBox = 64;   // columns of a box: 128 bytes, the swizzle
constexpr int kABytes = kTileM * kStep * 2, kBBytes = kTileN * kStep * 2;
constexpr int kOutBytes = kHalf * kBox * 2;  // a box of the output
constexpr int kConsumers = 2, kThreads = 128 * (kConsumers + 1);
constexpr int kBytes = kStages * (kABytes + kBBytes) + kConsumers * 2 * kOutBytes + 1024 + 128;

struct Maps {
  CUtensorMap a, s, w, u, out;
};

struct Problem {
  const void* bias;
  const uint8_t* bits;
  float keep_scale;
  int64_t rows, width;
  int rank, tail, steps;  // R; steps of kStep over R and over K
  int tiles_m, tiles_n;   // tiles_m is even where the cluster is 2
};

struct Tile {
  int m, n;  // of its first row and column, in tiles
};

// Tile number i of a cluster's tiles, `Cluster` rows of tiles each: kGroup of them deep at a time.
template <int Cluster>
__device__ __forceinline__ Tile tile_of(const Problem& g, int i, int rank) {
  const int rows = g.tiles_m / Cluster, group = i / (kGroup * g.tiles_n) * kGroup;
  const int deep = min(kGroup, rows - group), within = i % (kGroup * g.tiles_n);
  return {(group + within % deep) * Cluster + rank, within / deep};
}

using Turn = RingTurn<kStages>;

// One step's operands into the stage of `turn`; k counts elements of K (or of R).
template <int Cluster, bool Transposed>
__device__ __forceinline__ void copy_step(const Stages& ring, const Turn& turn,
                                          const CUtensorMap* left, const CUtensorMap* right,
                                          Tile tile, int k, int rank) {
  wait_for(ring.empty + turn.stage, turn.parity ^ 1);
  uint64_t* full = ring.full + turn.stage;
  expect(full, kABytes + kBBytes);
  load_box(ring.a + turn.stage * kABytes, left, full, k, tile.m * kTileM);
  // K-major a box is kBox of K by up to 256 rows of w, else kBox of N by kStep rows of w
  unsigned char* b = ring.b + turn.stage * kBBytes;
  constexpr int kShare = kTileN / Cluster;  // columns of the output that this block copies for
  const int first = rank * kShare;
  constexpr uint16_t kAll = (1 << Cluster) - 1;
  for (int n = first; n < first + kShare; n += Transposed ? kBox : kShare) {
    const int x = Transposed ? tile.n * kTileN + n : k, y = Transposed ? k : tile.n * kTileN + n;
    if constexpr (Cluster == 1) {
      load_box(b + n * kStep * 2, right, full, x, y);
    } else {
      load_box_everywhere(b + n * kStep * 2, right, full, x, y, kAll);
    }
  }
}

template <int Cluster, bool Transposed>
__device__ __forceinline__ void copy_all(const Problem& g, const Maps& maps, const Stages& ring,
                                         int rank) {
  Turn turn;
  const int tiles = g.tiles_m / Cluster * g.tiles_n;
  for (int i = blockIdx.x / Cluster; i < tiles; i += gridDim.x / Cluster) {
    const Tile tile = tile_of<Cluster>(g, i, rank);
#pragma unroll 1
    for (int t = 0; t < g.tail; ++t, turn.next())
      copy_step<Cluster, Transposed>(ring, turn, &maps.s, &maps.u, tile, t * kStep, rank);
#pragma unroll 1
    for (int t = 0; t < g.steps; ++t, turn.next())
      copy_step<Cluster, Transposed>(ring, turn, &maps.a, &maps.w, tile, t * kStep, rank);
  }
}

// Products number [0, Count) of a step, 16 of K each.
template <typename T, bool Transposed, int Count>
__device__ __forceinline__ void multiply_step(float (&c)[128], const Stages& ring, int stage,
                                              int group) {
  // a: 64 rows of 128 bytes, 8192 bytes a warpgroup. b: K-major rows of N; MN-major kBox columns
  // of all kStep rows of K, then the next kBox
  const uint64_t a = operand(ring.a + stage * kABytes + group * kHalf * 128, 16, 1024);
  const uint64_t b = operand(ring.b + stage * kBBytes, Transposed ? kStep * 128 : 16, 1024);
  begin_products();
#pragma unroll
  for (int k = 0; k < Count; ++k)
    multiply_256<T, Transposed>(c, further(a, k * 32), further(b, k * (Transposed ? 2048 : 32)));
  commit_products();
}

// Eight bytes of the mask, of which `inside` are there: at once where all rows are so aligned.
__device__ __forceinline__ uint64_t load_bits(const uint8_t* from, int64_t inside, bool at_once) {
  if (at_once) return inside > 0 ? *reinterpret_cast<const uint64_t*>(from) : 0;
  uint64_t bits = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (i < inside) bits |= static_cast<uint64_t>(from[i]) << 8 * i;
  return bits;
}

// The accumulators times the mask of this thread's two rows. Of the 32 bytes of a row each of the
// four threads that share it loads eight.
__device__ __forceinline__ void mask(float (&c)[128], const Problem& g, Tile tile, int group) {
  const int thread = threadIdx.x % 128, lane = thread % 4;
  const int64_t width = g.width / 8, column = static_cast<int64_t>(tile.n) * kTileN / 8 + 8 * lane;
  const int64_t row = tile.m * kTileM + group * kHalf + thread / 32 * 16 + thread % 32 / 4;
  const bool at_once = (width | reinterpret_cast<int64_t>(g.bits)) % 8 == 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t r = row + 8 * half, inside = r < g.rows ? width - column : 0;
    const uint64_t own = load_bits(g.bits + r * width + column, inside, at_once);
    const uint32_t words[2] = {static_cast<uint32_t>(own), static_cast<uint32_t>(own >> 32)};
#pragma unroll
    for (int j = 0; j < 32; j += 4) {  // a word has the bits of four eights of columns
      const uint32_t bits = __shfl_sync(~0u, words[j / 4 % 2], j / 8, 4) >> 2 * lane;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& first = c[4 * (j + i) + 2 * half];
        float& second = c[4 * (j + i) + 2 * half + 1];
        first = bits >> 8 * i & 1 ? first * g.keep_scale : 0.0f;
        second = bits >> 8 * i & 2 ? second * g.keep_scale : 0.0f;
      }
    }
  }
}

// The accumulators plus bias to `out`, 128 columns at a time through this warpgroup's two boxes.
template <typename T>
__device__ __forceinline__ void store(const float (&c)[128], const Problem& g,
                                      const CUtensorMap* out, unsigned char* boxes, Tile tile,
                                      int group) {
  const int thread = threadIdx.x % 128, lane = thread % 32, row = thread / 32 * 16 + lane / 4;
  const T* bias = static_cast<const T*>(g.bias);
  const int first = tile.n * kTileN, y = tile.m * kTileM + group * kHalf;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (thread == 0) wait_stores_read();
    meet(1 + group, 128);
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      const float* sum = c + 4 * (16 * half + j);
      const int64_t column = first + 128 * half + 8 * j + lane % 4 * 2;
      float left = 0, right = 0;
      if (bias != nullptr && column < g.width) {
        left = static_cast<float>(bias[column]);
        right = static_cast<float>(bias[column + 1]);
      }
      // a row of a box is eight chunks of 16 bytes, chunk k at k ^ (row % 8)
      unsigned char* at =
          boxes + j / 8 * kOutBytes + row * 128 + ((j % 8) ^ (row % 8)) * 16 + lane % 4 * 4;
      *reinterpret_cast<uint32_t*>(at) = pair(sum[0] + left, sum[1] + right, bias);
      *reinterpret_cast<uint32_t*>(at + 8 * 128) = pair(sum[2] + left, sum[3] + right, bias);
    }
    publish_shared();
    meet(1 + group, 128);
    if (thread == 0) {
      store_box(out, boxes, first + 128 * half, y);
      store_box(out, boxes + kOutBytes, first + 128 * half + kBox, y);
      commit_stores();
    }
  }
}

template <typename T, int Cluster, bool Transposed>
__device__ __forceinline__ void multiply_all(const Problem& g, const Maps& maps, const Stages& ring,
                                             unsigned char* boxes, int group, int rank) {
  Turn turn;
  const int tiles = g.tiles_m / Cluster * g.tiles_n;
  for (int i = blockIdx.x / Cluster; i < tiles; i += gridDim.x / Cluster) {
    const Tile tile = tile_of<Cluster>(g, i, rank);
    float c[128] = {};
#pragma unroll 1
    for (int t = 0; t < g.tail; ++t, turn.next()) {
      wait_for(ring.full + turn.stage, turn.parity);
      if (g.rank - t * kStep > kStep / 2) {
        multiply_step<T, Transposed, kStep / 16>(c, ring, turn.stage, group);
      } else if (g.rank - t * kStep > kStep / 4) {
        multiply_step<T, Transposed, kStep / 32>(c, ring, turn.stage, group);
      } else {
        multiply_step<T, Transposed, kStep / 64>(c, ring, turn.stage, group);
      }
      wait_products<0>();
      release<Cluster>(ring, turn.stage);
    }
    // said once more, or ptxas runs all products one by one (C7515) for the mask's sake
    wait_products<0>();
    if (g.bits != nullptr) mask(c, g, tile, group);
    begin_products();
    int before = -1;  // the stage whose products may still run
#pragma unroll 1
    for (int t = 0; t < g.steps; ++t, turn.next()) {
      wait_for(ring.full + turn.stage, turn.parity);
      multiply_step<T, Transposed, kStep / 16>(c, ring, turn.stage, group);
      wait_products<1>();
      if (before >= 0) release<Cluster>(ring, before);
      before = turn.stage;
    }
    wait_products<0>();
    release<Cluster>(ring, before);
    store<T>(c, g, &maps.out, boxes + group * 2 * kOutBytes, tile, group);
  }
  if (threadIdx.x % 128 == 0) wait_stores();
}

template <typename T, int Cluster, bool Transposed>
__global__ void __launch_bounds__(kThreads, 1)
    tail_gemm_kernel(const __grid_constant__ Maps maps, const Problem g) {
  extern __shared__ unsigned char raw[];
  // at the same offset in every block: what is copied to both lies in the same place
  unsigned char* memory = raw + (1024 - shared_address(raw) % 1024) % 1024;
  unsigned char* boxes = memory + kStages * (kABytes + kBBytes);
  auto* barriers = reinterpret_cast<uint64_t*>(boxes + kConsumers * 2 * kOutBytes);
  const Stages ring{memory, memory + kStages * kABytes, barriers, barriers + kStages};
  const int rank = Cluster == 1 ? 0 : static_cast<int>(rank_in_cluster());
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      start_barrier(ring.full + s, 1);
      start_barrier(ring.empty + s, Cluster * kConsumers * 4);  // warps that read it, everywhere
    }
    publish_barriers();
    fetch_descriptor(&maps.a), fetch_descriptor(&maps.w), fetch_descriptor(&maps.out);
  }
  __syncthreads();
  if constexpr (Cluster > 1) meet_cluster();
  const int group = static_cast<int>(threadIdx.x / 128);
  if (group == 0) {
    give_registers<40>();
    if (threadIdx.x == 0) copy_all<Cluster, Transposed>(g, maps, ring, rank);
  } else {
    take_registers<232>();
    multiply_all<T, Cluster, Transposed>(g, maps, ring, boxes, group - 1, rank);
  }
  // a block stays while others may copy into it or arrive at its barriers
  if constexpr (Cluster > 1) {
    __syncwarp();
    meet_cluster();
  }
}

bool encode_all(Maps* maps, const TailGemm& g, int cluster) {
  const bool low = g.is_bf16, turned = g.transposed;
  const int box = turned ? kStep : kTileN / cluster;
  return encode(&maps->a, g.a, low, g.rows, g.depth, g.a_stride, kTileM) &&
         encode(&maps->s, g.s, low, g.rows, g.rank, g.rank, kTileM) &&
         encode(&maps->w, g.w, low, turned ? g.depth : g.width, turned ? g.width : g.depth,
                turned ? g.width : g.depth, box) &&
         encode(&maps->u, g.u, low, turned ? g.rank : g.width, turned ? g.width : g.rank,
                turned ? g.width : g.rank, box) &&
         encode(&maps->out, g.out, low, g.rows, g.width, g.out_stride, kHalf);
}

template <typename T, int Cluster, bool Transposed>
cudaError_t launch(const Maps& maps, const Problem& g, int processors, cudaStream_t stream) {
  auto* kernel = tail_gemm_kernel<T, Cluster, Transposed>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  const int tiles = g.tiles_m * g.tiles_n, blocks = processors / Cluster * Cluster;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = Cluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(tiles < blocks ? tiles : blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kBytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, maps, g);
}

template <typename T, int Cluster>
cudaError_t by_layout(const TailGemm& g, const Maps& maps, const Problem& problem, int processors,
                      cudaStream_t stream) {
  return g.transposed ? launch<T, Cluster, true>(maps, problem, processors, stream)
                      : launch<T, Cluster, false>(maps, problem, processors, stream);
}

bool fits(const TailGemm& g) {
  const int64_t most = int64_t{1} << 31, tiles = (g.rows + 255) / 256 * 2 * ((g.width + 255) / 256);
  const bool sizes = g.rows > 0 && g.width > 0 && g.depth > 0 && g.rank > 0 &&
                     g.rows < most - 256 && g.width < most - 256 && g.depth < most - 64 &&
                     g.rank <= 1024 && tiles < most;
  const bool eights = (g.width | g.depth | g.rank | g.a_stride | g.out_stride) % 8 == 0;
  return sizes && eights && g.a_stride >= g.depth && g.out_stride >= g.width && is_aligned(g.a) &&
         is_aligned(g.w) && is_aligned(g.s) && is_aligned(g.u) && is_aligned(g.out);
}

}  // namespace

cudaError_t tail_gemm(const TailGemm& g, int processors, cudaStream_t stream, int cluster) {
  if (!fits(g) || processors < 2 || (cluster != 1 && cluster != 2)) return cudaErrorInvalidValue;
  int device = 0, major = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error != cudaSuccess) return error;
  if (major != 9 || encoder() == nullptr) return cudaErrorNotSupported;
  Maps maps;
  if (!encode_all(&maps, g, cluster)) return cudaErrorInvalidValue;
  const int64_t rows = cluster * kTileM;
  const Problem problem{g.bias,
                        g.bits,
                        g.keep_scale,
                        g.rows,
                        g.width,
                        static_cast<int>(g.rank),
                        static_cast<int>((g.rank + kStep - 1) / kStep),
                        static_cast<int>((g.depth + kStep - 1) / kStep),
                        static_cast<int>((g.rows + rows - 1) / rows * cluster),
                        static_cast<int>((g.width + kTileN - 1) / kTileN)};
  if (g.is_bf16)
    return cluster == 1 ? by_layout<__nv_bfloat16, 1>(g, maps, problem, processors, stream)
                        : by_layout<__nv_bfloat16, 2>(g, maps, problem, processors, stream);
  return cluster == 1 ? by_layout<__half, 1>(g, maps, problem, processors, stream)
                      : by_layout<__half, 2>(g, maps, problem, processors, stream);
}

}  // namespace pelt_fast
