// The CUDA runtime of the emulator: its GPUs. Device memory is ordinary memory, and whatever was
// enqueued has happened.
#include "cuda_runtime.h"

using namespace nncx::emulator;

namespace {

// The last one is older than any code.
constexpr Gpu kGpus[] = {{75, 64 * 1024}, {80, 163 * 1024}, {90, 227 * 1024}, {70, 96 * 1024}};
int device = 0;

}  // namespace

namespace nncx::emulator {

const Gpu& current_gpu() { return kGpus[device]; }

}  // namespace nncx::emulator

cudaError_t cudaGetDeviceCount(int* count) {
  *count = std::size(kGpus);
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* current) {
  *current = device;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int chosen) {
  if (chosen < 0 || chosen >= static_cast<int>(std::size(kGpus))) return cudaErrorInvalidDevice;
  device = chosen;
  return cudaSuccess;
}

// For tests: which GPU the ops run on.
extern "C" __attribute__((visibility("default"))) int nncx_emulator_set_device(int chosen) {
  return cudaSetDevice(chosen);
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int of) {
  if (of < 0 || of >= static_cast<int>(std::size(kGpus))) return cudaErrorInvalidDevice;
  const Gpu& gpu = kGpus[of];
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = 4;  // few, so that persistent kernels have something to loop over
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = 48 * 1024;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = gpu.shared_bytes;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = gpu.shared_bytes + 1024;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = gpu.architecture / 10;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = gpu.architecture % 10;
      return cudaSuccess;
  }
  return cudaErrorInvalidValue;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  if (!current_gpu().has_code()) return cudaErrorNoKernelImageForDevice;
  *attributes = {};
  attributes->ptxVersion = attributes->binaryVersion = current_gpu().architecture;
  attributes->maxThreadsPerBlock = 1024;
  attributes->maxDynamicSharedSizeBytes = current_gpu().shared_bytes;
  return cudaSuccess;
}
