// The gradients of a rank update from one read of dy (sm_80 and up).
//
// Shapes   dy (M, N), h (M, R), b (N, R) in bf16 or fp16; dh (M, R); db (N, R), d_bias (N) fp32.
// Maths    dh = s dy b;  db = s dyᵀ h;  d_bias = s Σ dy
// Traffic  dy once; the workspace of the two-stage sums, (N / kColumns) M R and parts N R in fp32,
//          written once and read once. Sums are in a fixed order: the bits do not depend on timing.
// Block    8 warps, a tile of kColumns columns and a part of the rows, kStep rows at a time through
//          kStages stages of cp.async. A warp owns kColumns / 8 columns: its db stays in registers
//          (kColumns R / 256 floats a thread), its share of dh is added to the other warps' in
//          shared memory. The bias is one more column of db, of ones.
// Budget   R=16: 512 columns, 32 rows; R=32: 256, 32; R=64: 256, 16. Shared memory, bytes:
//          3 (kStep (2 kColumns + 16) + kStep (2 R + 16)) + kColumns (2 R + 16) + 32 kStep R.
//          R=32 leaves room for two blocks a multiprocessor on sm_90, in registers too.

#include "mma.cuh"
#include "rank_backward.h"

namespace pelt_fast {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps, kStages = 3, kGap = 8;

template <int Rank>
struct Sizes {
  static constexpr int kColumns = Rank == 16 ? 512 : 256;
  static constexpr int kStep = Rank == 64 ? 16 : 32;
  static constexpr int kBlocks = Rank == 32 ? 2 : 1;  // of a multiprocessor
  static constexpr int kDy = kStep * (kColumns + kGap), kH = kStep * (Rank + kGap);  // elements
  static constexpr int kB = kColumns * (Rank + kGap), kSums = kWarps * kStep * Rank;
  static constexpr int kBytes = 2 * (kStages * (kDy + kH) + kB) + 4 * kSums;
};

// Where element i of a warp's (kStep, Rank) sums lies. Eights of columns change places by the row:
// without conflicts of banks a warp writes tiles of 8 x 8 and reads rows.
template <int Rank>
__device__ __forceinline__ int place_of(int i) {
  constexpr int kRows = Rank < 32 ? 32 / Rank : 1;  // rows in 32 banks
  return i ^ (i / Rank / kRows % (Rank < 32 ? Rank / 8 : 4) * 8);
}

struct Parts {
  float *dh, *db, *bias;  // (N / kColumns, M, R), (parts, N, R), (parts, N)
  int64_t rows;           // of a part
};

template <typename T, int Rank>
__device__ __forceinline__ void fetch(const RankBackward& g, T* dy, T* h, int64_t row, int64_t end,
                                      int64_t column) {
  using S = Sizes<Rank>;
  const T *from_dy = static_cast<const T*>(g.dy), *from_h = static_cast<const T*>(g.h);
  constexpr int kChunks = S::kColumns / 8, kRankChunks = Rank / 8;
#pragma unroll
  for (int i = threadIdx.x; i < S::kStep * kChunks; i += kThreads) {
    const int r = i / kChunks, c = i % kChunks * 8;
    const bool inside = row + r < end && column + c < g.width;
    copy16(dy + r * (S::kColumns + kGap) + c,
           inside ? from_dy + (row + r) * g.stride + column + c : from_dy, inside);
  }
  for (int i = threadIdx.x; i < S::kStep * kRankChunks; i += kThreads) {
    const int r = i / kRankChunks, c = i % kRankChunks * 8;
    const bool inside = row + r < end && c < g.rank;
    copy16(h + r * (Rank + kGap) + c, inside ? from_h + (row + r) * g.rank + c : from_h, inside);
  }
}

template <typename T, int Rank>
__global__ void __launch_bounds__(kThreads, Sizes<Rank>::kBlocks)
    backward(const RankBackward g, const Parts parts) {
  using S = Sizes<Rank>;
  constexpr int kOwn = S::kColumns / kWarps;          // columns of a warp
  constexpr int kTall = kOwn / 16, kWide = Rank / 8;  // tiles of db
  constexpr int kSteps = S::kStep / 16;               // tiles of rows
  constexpr int kDyRow = S::kColumns + kGap, kRankRow = Rank + kGap;
  extern __shared__ __align__(16) unsigned char memory[];
  T* dy_stages = reinterpret_cast<T*>(memory);
  T* h_stages = dy_stages + kStages * S::kDy;
  T* b = h_stages + kStages * S::kH;
  float* sums = reinterpret_cast<float*>(b + S::kB);

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * S::kColumns;
  const int64_t first = blockIdx.y * parts.rows, end = min(first + parts.rows, g.rows);
  const int own = warp * kOwn, corner = place_of<Rank>(lane / 4 * Rank + lane % 4 * 2);

  const T* from_b = static_cast<const T*>(g.b);
  for (int i = threadIdx.x; i < S::kColumns * (Rank / 8); i += kThreads) {
    const int n = i / (Rank / 8), c = i % (Rank / 8) * 8;
    const bool inside = column + n < g.width && c < g.rank;
    copy16(b + n * kRankRow + c, inside ? from_b + (column + n) * g.rank + c : from_b, inside);
  }
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
    fetch<T, Rank>(g, dy_stages + s * S::kDy, h_stages + s * S::kH, first + s * S::kStep, end,
                   column);
    commit();
  }

  float db[kTall][kWide][4] = {}, bias[kTall][4] = {};
  const uint32_t ones = lane < 4 ? two_ones<T>() : 0;  // column 0 of a tile: n = lane / 4
  int stage = 0;
  for (int64_t row = first; row < end; row += S::kStep) {
    wait<kStages - 2>();
    __syncthreads();  // this stage has come, the one before is read, and so are the sums
    const int next = (stage + kStages - 1) % kStages;
    fetch<T, Rank>(g, dy_stages + next * S::kDy, h_stages + next * S::kH,
                   row + (kStages - 1) * S::kStep, end, column);
    commit();
    const T *dy = dy_stages + stage * S::kDy, *h = h_stages + stage * S::kH;

    // dyᵀ h: rows are summed over, a transposed load turns dy
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      uint32_t right[kWide / 2][4];
#pragma unroll
      for (int j = 0; j < kWide / 2; ++j)
        load4_transposed(right[j], h + (16 * k + lane % 16) * kRankRow + 16 * j + lane / 16 * 8);
#pragma unroll
      for (int i = 0; i < kTall; ++i) {
        uint32_t left[4];
        load4_transposed(left, dy + (16 * k + lane % 8 + lane / 16 * 8) * kDyRow + own + 16 * i +
                                   lane / 8 % 2 * 8);
#pragma unroll
        for (int j = 0; j < kWide; ++j)
          multiply<T>(db[i][j], left, right[j / 2][j % 2 * 2], right[j / 2][j % 2 * 2 + 1]);
        multiply<T>(bias[i], left, ones, ones);
      }
    }

    // dy b over this warp's columns
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      float dh[kWide][4] = {};
#pragma unroll
      for (int i = 0; i < kTall; ++i) {
        uint32_t left[4];
        load4(left, dy + (16 * k + lane % 16) * kDyRow + own + 16 * i + lane / 16 * 8);
#pragma unroll
        for (int j = 0; j < kWide / 2; ++j) {
          uint32_t right[4];
          load4_transposed(right,
                           b + (own + 16 * i + lane % 16) * kRankRow + 16 * j + lane / 16 * 8);
          multiply<T>(dh[2 * j], left, right[0], right[1]);
          multiply<T>(dh[2 * j + 1], left, right[2], right[3]);
        }
      }
      float* rows = sums + (warp * S::kStep + 16 * k) * Rank;
#pragma unroll
      for (int j = 0; j < kWide; ++j) {
        float* place = rows + (corner ^ (8 * j));
        *reinterpret_cast<float2*>(place) = make_float2(dh[j][0], dh[j][1]);
        *reinterpret_cast<float2*>(place + 8 * Rank) = make_float2(dh[j][2], dh[j][3]);
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < S::kStep * Rank; i += kThreads) {
      const int64_t r = row + i / Rank;
      const int c = i % Rank;
      if (r >= end || c >= g.rank) continue;
      float total = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) total += sums[w * S::kStep * Rank + place_of<Rank>(i)];
      parts.dh[(blockIdx.x * g.rows + r) * g.rank + c] = total;
    }
    stage = (stage + 1) % kStages;
  }
  wait<0>();

#pragma unroll
  for (int i = 0; i < kTall; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t n = column + own + 16 * i + lane / 4 + 8 * half;
      if (n >= g.width) continue;
      float* out = parts.db + (blockIdx.y * g.width + n) * g.rank;
#pragma unroll
      for (int j = 0; j < kWide; ++j) {
        const int c = 8 * j + lane % 4 * 2;
        if (c < g.rank)
          *reinterpret_cast<float2*>(out + c) =
              make_float2(db[i][j][2 * half], db[i][j][2 * half + 1]);
      }
      if (parts.bias != nullptr && lane % 4 == 0)
        parts.bias[blockIdx.y * g.width + n] = bias[i][2 * half];
    }
  }
}

// out[i] = scale times the sum of `count` parts, in their order.
template <typename Out>
__global__ void add_parts(const float* parts, Out* out, int64_t size, int count, float scale) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (i >= size) return;
  float total = 0;
  for (int p = 0; p < count; ++p) total += parts[p * size + i];
  out[i] = static_cast<Out>(scale * total);
}

template <typename Out>
void add(const float* parts, Out* out, int64_t size, int64_t count, float scale,
         cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>((size + 255) / 256);
  add_parts<Out><<<blocks, 256, 0, stream>>>(parts, out, size, static_cast<int>(count), scale);
}

struct Grid {
  int64_t columns, parts, rows;  // tiles of columns, parts of the rows, rows of a part
};

Grid grid_of(const RankBackward& g, int processors) {
  const int64_t width = g.rank <= 16 ? 512 : 256, step = g.rank > 32 ? 16 : 32;
  const int64_t columns = (g.width + width - 1) / width, steps = (g.rows + step - 1) / step;
  const int64_t wanted = (2 * processors + columns - 1) / columns;
  const int64_t count = wanted < 1 ? 1 : wanted > steps ? steps : wanted;
  const int64_t rows = (steps + count - 1) / count * step;
  return {columns, (g.rows + rows - 1) / rows, rows};
}

template <typename T, int Rank>
cudaError_t launch(const RankBackward& g, float* workspace, const Grid& grid, cudaStream_t stream) {
  using S = Sizes<Rank>;
  cudaError_t error = cudaFuncSetAttribute(backward<T, Rank>,
                                           cudaFuncAttributeMaxDynamicSharedMemorySize, S::kBytes);
  if (error != cudaSuccess) return error;
  Parts parts{workspace, workspace + grid.columns * g.rows * g.rank, nullptr, grid.rows};
  if (g.d_bias != nullptr) parts.bias = parts.db + grid.parts * g.width * g.rank;
  const dim3 blocks(static_cast<unsigned>(grid.columns), static_cast<unsigned>(grid.parts));
  backward<T, Rank><<<blocks, kThreads, S::kBytes, stream>>>(g, parts);
  add(parts.dh, static_cast<T*>(g.dh), g.rows * g.rank, grid.columns, g.scale, stream);
  add(parts.db, g.db, g.width * g.rank, grid.parts, g.scale, stream);
  if (g.d_bias != nullptr) add(parts.bias, g.d_bias, g.width, grid.parts, g.scale, stream);
  return cudaGetLastError();
}

template <typename T>
cudaError_t by_rank(const RankBackward& g, float* workspace, const Grid& grid,
                    cudaStream_t stream) {
  if (g.rank <= 16) return launch<T, 16>(g, workspace, grid, stream);
  if (g.rank <= 32) return launch<T, 32>(g, workspace, grid, stream);
  return launch<T, 64>(g, workspace, grid, stream);
}

}  // namespace

int64_t rank_backward_workspace(const RankBackward& g, int processors) {
  if (g.rows <= 0 || g.width <= 0 || processors <= 0) return 0;  // rank_backward refuses these
  const Grid grid = grid_of(g, processors);
  const int64_t bias = g.d_bias == nullptr ? 0 : g.width;
  return 4 * (grid.columns * g.rows * g.rank + grid.parts * (g.width * g.rank + bias));
}

cudaError_t rank_backward(const RankBackward& g, void* workspace, int processors,
                          cudaStream_t stream) {
  const bool sizes = g.rows > 0 && g.width > 0 && g.rank > 0 && g.rank <= 64 && processors > 0;
  const bool eights = g.width % 8 == 0 && g.rank % 8 == 0 && g.stride % 8 == 0;
  if (!sizes || !eights || g.stride < g.width || !is_aligned(g.dy) || !is_aligned(g.h) ||
      !is_aligned(g.b) || !is_aligned(workspace))
    return cudaErrorInvalidValue;
  const Grid grid = grid_of(g, processors);
  if (grid.parts > 65535) return cudaErrorInvalidValue;
  auto* floats = static_cast<float*>(workspace);
  return g.is_bf16 ? by_rank<__nv_bfloat16>(g, floats, grid, stream)
                   : by_rank<__half>(g, floats, grid, stream);
}

}  // namespace pelt_fast
