#include <cuda_runtime.h>

#include "cuda/device.h"

namespace nncx::cuda {
namespace {

constexpr int kRemembered = 64;  // GPUs; of others it asks each time

__global__ void probe() {}

Path path_of(const cudaFuncAttributes& code) {
  if (code.ptxVersion < 80) return Path::cuda_cores;
  // PTX of 9.0 on a later GPU has no wgmma: that is in 9.0a code, which nothing but 9.0 runs
  return code.ptxVersion == 90 && code.binaryVersion == 90 ? Path::sm90 : Path::sm80;
}

cudaError_t read_device(int index, Device& device) {
  cudaFuncAttributes code;
  cudaError_t error = cudaFuncGetAttributes(&code, reinterpret_cast<const void*>(&probe));
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, index);
  }
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&device.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                                   index);
  }
  if (error == cudaSuccess) device.path = path_of(code);
  return error;
}

}  // namespace

int current_device(Device& device) {
  struct Known {
    bool is_read;
    Device device;
  };
  thread_local Known known[kRemembered];  // of the thread, so that nothing is locked
  int index;
  cudaError_t error = cudaGetDevice(&index);
  if (error != cudaSuccess) return error;
  if (index < kRemembered && known[index].is_read) {
    device = known[index].device;
    return cudaSuccess;
  }
  error = read_device(index, device);
  if (error == cudaSuccess && index < kRemembered) known[index] = {true, device};
  return error;
}

}  // namespace nncx::cuda
