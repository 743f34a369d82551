// Exercises the CUDA kernels without torch (make gpu PART=9 builds it with nvcc alone). Checks
// every result against an fp64 loop on the host and prints time and ratio to the floor: the bytes
// of the operands at the speed of a copy, or TFLOP/s. Exits 1 on a wrong result.

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "rank_backward.h"
#include "tail_gemm.h"

namespace {

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

template <typename T>
struct Array {
  T* data = nullptr;
  int64_t size;
  explicit Array(int64_t n) : size(n) { check(cudaMalloc(&data, n * sizeof(T)), "cudaMalloc"); }
  explicit Array(const std::vector<T>& host) : Array(static_cast<int64_t>(host.size())) {
    check(cudaMemcpy(data, host.data(), size * sizeof(T), cudaMemcpyHostToDevice), "copy");
  }
  Array(const Array&) = delete;
  ~Array() { cudaFree(data); }
  std::vector<T> host() const {
    std::vector<T> out(size);
    check(cudaMemcpy(out.data(), data, size * sizeof(T), cudaMemcpyDeviceToHost), "copy back");
    return out;
  }
};

double value(__nv_bfloat16 x) { return static_cast<double>(__bfloat162float(x)); }

std::vector<__nv_bfloat16> normal(int64_t n, unsigned seed) {
  std::mt19937 engine(seed);
  std::normal_distribution<float> draw;
  std::vector<__nv_bfloat16> out(n);
  for (auto& x : out) x = __float2bfloat16(draw(engine));
  return out;
}

// Median milliseconds of 20 calls.
template <typename F>
float timed(F call) {
  cudaEvent_t start, stop;
  check(cudaEventCreate(&start), "event");
  check(cudaEventCreate(&stop), "event");
  std::vector<float> found;
  for (int i = 0; i < 25; ++i) {
    check(cudaEventRecord(start), "record");
    call();
    check(cudaEventRecord(stop), "record");
    check(cudaEventSynchronize(stop), "synchronize");
    float ms = 0;
    check(cudaEventElapsedTime(&ms, start, stop), "elapsed");
    if (i >= 5) found.push_back(ms);
  }
  std::sort(found.begin(), found.end());
  return found[found.size() / 2];
}

// Relative error of `found` against `wanted`, in norm.
double error_of(const std::vector<double>& found, const std::vector<double>& wanted) {
  double off = 0, size = 0;
  for (size_t i = 0; i < wanted.size(); ++i) {
    off += (found[i] - wanted[i]) * (found[i] - wanted[i]);
    size += wanted[i] * wanted[i];
  }
  return std::sqrt(off / size);
}

bool rank_backward(int64_t rows, int64_t width, int64_t rank, int processors) {
  const auto dy = normal(rows * width, 1), h = normal(rows * rank, 2), b = normal(width * rank, 3);
  Array<__nv_bfloat16> d_dy(dy), d_h(h), d_b(b), d_dh(rows * rank), copy(rows * width);
  Array<float> d_db(width * rank), d_bias(width);
  const pelt_fast::RankBackward g{d_dy.data, d_h.data, d_b.data, d_dh.data, d_db.data, d_bias.data,
                                  rows,      width,    rank,     width,     0.5f,      true};
  Array<char> workspace(pelt_fast::rank_backward_workspace(g, processors));
  auto call = [&] {
    check(pelt_fast::rank_backward(g, workspace.data, processors, nullptr), "launch");
  };
  call();
  check(cudaDeviceSynchronize(), "kernel");
  const auto first = d_db.host();
  call();
  check(cudaDeviceSynchronize(), "kernel");
  const auto dh = d_dh.host();
  const auto db = d_db.host(), bias = d_bias.host();
  const bool same = first == db;

  // a sample of the rows of dh and db, all of the bias
  std::vector<double> wanted[3], found[3];
  for (int64_t i = 0; i < rows; i += std::max<int64_t>(1, rows / 64))
    for (int64_t r = 0; r < rank; ++r) {
      double sum = 0;
      for (int64_t n = 0; n < width; ++n) sum += value(dy[i * width + n]) * value(b[n * rank + r]);
      wanted[0].push_back(0.5 * sum);
      found[0].push_back(value(dh[i * rank + r]));
    }
  for (int64_t n = 0; n < width; ++n) {
    double sum = 0;
    for (int64_t i = 0; i < rows; ++i) sum += value(dy[i * width + n]);
    wanted[2].push_back(0.5 * sum);
    found[2].push_back(bias[n]);
    if (n % std::max<int64_t>(1, width / 64)) continue;
    for (int64_t r = 0; r < rank; ++r) {
      double product = 0;
      for (int64_t i = 0; i < rows; ++i)
        product += value(dy[i * width + n]) * value(h[i * rank + r]);
      wanted[1].push_back(0.5 * product);
      found[1].push_back(db[n * rank + r]);
    }
  }
  const double errors[] = {error_of(found[0], wanted[0]), error_of(found[1], wanted[1]),
                           error_of(found[2], wanted[2])};
  const bool right = errors[0] < 4e-3 && errors[1] < 1e-5 && errors[2] < 1e-5 && same;

  const float ms = timed(call);
  const float copied = timed([&] {
    check(cudaMemcpyAsync(copy.data, d_dy.data, 2 * rows * width, cudaMemcpyDeviceToDevice),
          "copy");
  });
  const double floor = copied / 2 * (1 + 2.0 * rank / width + 1.0 * rank / rows);
  std::printf(
      "rank_backward %ld x %ld r=%ld: %s, errors dh %.1e db %.1e d_bias %.1e%s; %.4f ms, "
      "%.2f x the read of dy at copy speed\n",
      static_cast<long>(rows), static_cast<long>(width), static_cast<long>(rank),
      right ? "right" : "WRONG", errors[0], errors[1], errors[2],
      same ? "" : ", bits differ between runs", ms, ms / floor);
  return right;
}

// out = a w + bias + mask * (s u) on `cluster` blocks; samples rows and columns that end tiles too.
bool tail(int64_t rows, int64_t depth, int64_t width, int64_t rank, bool transposed, bool masked,
          int cluster, int processors) {
  const auto a = normal(rows * depth, 1), w = normal(width * depth, 2), s = normal(rows * rank, 3),
             u = normal(width * rank, 4), bias = normal(width, 5);
  std::vector<uint8_t> bits(rows * width / 8);
  std::mt19937 engine(6);
  for (auto& byte : bits) byte = static_cast<uint8_t>(engine());
  Array<__nv_bfloat16> d_a(a), d_w(w), d_s(s), d_u(u), d_bias(bias), d_out(rows * width);
  Array<uint8_t> d_bits(bits);
  check(cudaMemset(d_out.data, 0xFF, 2 * rows * width), "memset");  // NaN where nothing is written
  pelt_fast::TailGemm g{};
  g.a = d_a.data, g.w = d_w.data, g.s = d_s.data, g.u = d_u.data, g.bias = d_bias.data;
  g.bits = masked ? d_bits.data : nullptr;
  g.out = d_out.data;
  g.rows = rows, g.width = width, g.depth = depth, g.rank = rank;
  g.a_stride = depth, g.out_stride = width;
  g.keep_scale = 2.0f, g.transposed = transposed, g.is_bf16 = true;
  auto call = [&] { check(pelt_fast::tail_gemm(g, processors, nullptr, cluster), "launch"); };
  call();
  check(cudaDeviceSynchronize(), "kernel");
  const auto out = d_out.host();
  std::vector<double> wanted, found;
  for (int64_t i = 0; i < rows; i = i == rows - 1 ? rows : std::min(rows - 1, i + 1 + rows / 48)) {
    for (int64_t n = 0; n < width;
         n = n == width - 1 ? width : std::min(width - 1, n + 1 + width / 48)) {
      double sum = value(bias[n]), update = 0;
      for (int64_t k = 0; k < depth; ++k)
        sum += value(a[i * depth + k]) * value(transposed ? w[k * width + n] : w[n * depth + k]);
      for (int64_t r = 0; r < rank; ++r)
        update += value(s[i * rank + r]) * value(transposed ? u[r * width + n] : u[n * rank + r]);
      const bool keep = bits[i * (width / 8) + n / 8] >> (n % 8) & 1;
      wanted.push_back(sum + (masked ? (keep ? 2 * update : 0) : update));
      found.push_back(value(out[i * width + n]));
    }
  }
  const double error = error_of(found, wanted);
  const bool right = error < 4e-3;  // NaN is wrong
  const float ms = timed(call);
  std::printf(
      "tail_gemm %ld x %ld x %ld r=%ld%s%s cluster %d: %s, error %.1e; %.4f ms, %.0f TFLOP/s\n",
      static_cast<long>(rows), static_cast<long>(depth), static_cast<long>(width),
      static_cast<long>(rank), transposed ? " dx" : "", masked ? " masked" : "", cluster,
      right ? "right" : "WRONG", error, ms, 2e-9 * rows * width * (depth + rank) / ms);
  return right;
}

}  // namespace

// `driver small` leaves out the sizes that only time is measured on: what a sanitizer can run.
int main(int count, char** arguments) {
  const bool small = count > 1 && std::string(arguments[1]) == "small";
  cudaDeviceProp device;
  check(cudaGetDeviceProperties(&device, 0), "device");
  std::printf("%s, %d multiprocessors\n", device.name, device.multiProcessorCount);
  bool right = true;
  const int64_t sizes[][3] = {{8192, 4096, 16}, {8192, 4096, 64}, {8192, 1024, 32}, {4096, 768, 64},
                              {37, 520, 8},     {1, 8, 8},        {1000, 1000, 40}};
  for (const auto& s : sizes)
    if (!small || s[0] * s[1] < 1 << 21)
      right &= rank_backward(s[0], s[1], s[2], device.multiProcessorCount);
  if (device.major != 9) {
    std::printf("tail_gemm: needs sm_90\n");
    return right ? 0 : 1;
  }
  // one tile, edges of tiles, several turns of the ring, then the size of the target
  const int64_t products[][4] = {{128, 64, 256, 16},    {1, 8, 8, 8},
                                 {300, 200, 520, 40},   {130, 1000, 264, 136},
                                 {2500, 640, 1032, 64}, {8192, 4096, 4096, 16}};
  for (int cluster : {1, 2})
    for (const auto& p : products)
      for (int kind = 0; kind < 4 && (!small || p[0] * p[2] < 1 << 18); ++kind)
        right &=
            tail(p[0], p[1], p[2], p[3], kind & 1, kind & 2, cluster, device.multiProcessorCount);
  return right ? 0 : 1;
}
