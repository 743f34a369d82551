// A stand-in for the CUDA runtime: what the objects of csrc/cuda refer to, without a driver.
//
// It refuses what the runtime refuses, and tells Python of each kernel that is launched and of each
// tensor map that is made. Python copies the arguments and runs the kernels later, in their order.

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstring>
#include <iterator>
#include <map>
#include <string>

namespace {

// sizes: grid, block and cluster, three each.
using Launched = void (*)(const char* name, const uint32_t* sizes, uint64_t shared,
                          void** arguments);
using Checked = int (*)(const unsigned char* map);  // whether a packed tensor map is good

constexpr int kUsual = 48 * 1024;  // shared memory of a block that needs no attribute

struct Device {
  int major = 9, shared = 227 * 1024;
  Launched launched = nullptr;
  Checked checked = nullptr;
  cudaError_t last = cudaSuccess;
} device;

struct Kernel {
  std::string name;
  int shared = kUsual;
};

std::map<const void*, Kernel>& kernels() {  // filled before main, in any order of the objects
  static std::map<const void*, Kernel> all;
  return all;
}

struct Configuration {
  dim3 grid, block;
  size_t shared;
} configuration;

cudaError_t failed(cudaError_t error) {
  if (error != cudaSuccess) device.last = error;
  return error;
}

bool is_grid(dim3 grid, dim3 cluster) {
  const bool sizes = grid.x > 0 && grid.x < 1u << 31 && grid.y > 0 && grid.y < 1u << 16 &&
                     grid.z > 0 && grid.z < 1u << 16;
  const unsigned blocks = cluster.x * cluster.y * cluster.z;
  return sizes && blocks > 0 && blocks <= 8 && grid.x % cluster.x == 0 &&
         grid.y % cluster.y == 0 && grid.z % cluster.z == 0;
}

cudaError_t launch(const Kernel& kernel, dim3 grid, dim3 block, dim3 cluster, size_t shared,
                   void** arguments) {
  const unsigned threads = block.x * block.y * block.z;
  if (!is_grid(grid, cluster) || threads == 0 || threads > 1024 ||
      shared > static_cast<size_t>(kernel.shared))
    return failed(cudaErrorInvalidConfiguration);
  const uint32_t sizes[] = {grid.x,  grid.y,    grid.z,    block.x,  block.y,
                            block.z, cluster.x, cluster.y, cluster.z};
  device.launched(kernel.name.c_str(), sizes, shared, arguments);
  return cudaSuccess;
}

// The codes of PTX's tensormap.replace for the driver's element types.
constexpr uint32_t kElements[] = {0, 1, 2, 3, 4, 5, 6, 7, 9, 10, 8, 11, 12};

CUresult encode(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                const cuuint32_t* steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  static_assert(sizeof(CUtensorMap) == 128, "the layout below is of 128 bytes");
  if (rank < 1 || rank > 5 || type >= std::size(kElements)) return CUDA_ERROR_INVALID_VALUE;
  unsigned char packed[128] = {};
  const auto put = [&packed](int at, auto value) { std::memcpy(packed + at, &value, sizeof value); };
  put(0, reinterpret_cast<uint64_t>(address));
  put(8, rank), put(12, kElements[type]), put(16, static_cast<uint32_t>(interleave));
  put(20, static_cast<uint32_t>(swizzle)), put(24, static_cast<uint32_t>(fill));
  for (int i = 0; i < static_cast<int>(rank); ++i) {
    if (sizes[i] == 0 || sizes[i] > uint64_t{1} << 32) return CUDA_ERROR_INVALID_VALUE;
    put(28 + 4 * i, box[i]), put(48 + 4 * i, steps[i]);
    put(68 + 4 * i, static_cast<uint32_t>(sizes[i]));
    if (i > 0) put(80 + 8 * i, strides[i - 1]);
  }
  std::memcpy(packed + 120, "PTXTMAP1", 8);
  if (!device.checked(packed)) return CUDA_ERROR_INVALID_VALUE;
  std::memcpy(map, packed, sizeof packed);
  return CUDA_SUCCESS;
}

}  // namespace

extern "C" {

// For Python: the device that there seems to be, and who is told.
void stand_in(int major, int shared, Launched launched, Checked checked) {
  device = {major, shared, launched, checked, cudaSuccess};
}

void** __cudaRegisterFatBinary(void* binary) { return static_cast<void**>(binary); }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*,
                            dim3*, dim3*, int*) {
  kernels()[host] = {name, kUsual};
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, CUstream_st*) {
  configuration = {grid, block, shared};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void*) {
  *grid = configuration.grid, *block = configuration.block, *shared = configuration.shared;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(host));
  return cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void* host, dim3 grid, dim3 block, void** arguments,
                             size_t shared, cudaStream_t) {
  return launch(kernels().at(host), grid, block, dim3(1), shared, arguments);
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments,
                               size_t shared, cudaStream_t stream) {
  return cudaLaunchKernel(kernel, grid, block, arguments, shared, stream);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* host,
                                void** arguments) {
  dim3 cluster(1);
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config->attrs[i];
    if (attribute.id != cudaLaunchAttributeClusterDimension)
      return failed(cudaErrorNotSupported);  // what it would do to the launch is not known here
    const auto& size = attribute.val.clusterDim;
    cluster = dim3(size.x, size.y, size.z);
  }
  return launch(kernels().at(host), config->gridDim, config->blockDim, cluster,
                config->dynamicSmemBytes, arguments);
}

cudaError_t cudaFuncSetAttribute(const void* host, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 ||
      value > device.shared)
    return failed(cudaErrorInvalidValue);
  kernels().at(host).shared = value;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* number) {
  *number = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  if (attribute != cudaDevAttrComputeCapabilityMajor) return failed(cudaErrorInvalidValue);
  *value = device.major;
  return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** found, unsigned,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  const bool known = std::strcmp(symbol, "cuTensorMapEncodeTiled") == 0;
  *found = known ? reinterpret_cast<void*>(encode) : nullptr;
  *result = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
cudaError_t cudaGetLastError() {
  const cudaError_t error = device.last;
  device.last = cudaSuccess;
  return error;
}

}  // extern "C"
