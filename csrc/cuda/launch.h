// How kernels are launched, and how they get shared memory whose size the launch decides.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "cuda/device.h"

namespace nncx::cuda {

// Without being asked a kernel gets no more.
constexpr size_t kDefaultSharedBytes = 48 * 1024;

// Enqueues kernel(arguments...) and returns the launch's error. (<<<>>> returns none, and
// cudaGetLastError tells also what an earlier call left.)
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                   cudaStream_t stream, const Arguments&... arguments) {
  if (shared_bytes > kDefaultSharedBytes) {
    // all that there is, whatever this launch needs: others of the kernel may be on their way, in
    // another thread or a graph, and must not find less
    Device device;
    if (const int error = current_device(device)) return static_cast<cudaError_t>(error);
    const cudaError_t error =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_bytes);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// The `shared_bytes` of the launch. Aligned as the 128-byte swizzle of wgmma and TMA needs it.
__device__ inline uint8_t* dynamic_shared_memory() {
  extern __shared__ __align__(1024) uint8_t bytes[];
  return bytes;
}

}  // namespace nncx::cuda
