#include <cuda_runtime.h>

#include "cuda/error.h"

namespace nncx::cuda {
namespace {

// Of the current GPU, as TORCH_CUDA_ARCH_LIST has it.
std::string architecture() {
  int device = 0, major = 0, minor = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  return std::to_string(major) + "." + std::to_string(minor);
}

}  // namespace

std::string error_text(int error) {
  cudaGetLastError();  // told here, so that nobody who asks for the last error finds it again
  const auto code = static_cast<cudaError_t>(error);
  const std::string text = cudaGetErrorString(code);
  switch (code) {
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction:
      return text + "; build nncx for this GPU, with TORCH_CUDA_ARCH_LIST=" + architecture();
    case cudaErrorUnsupportedPtxVersion:
      return text + "; build nncx for this GPU, with TORCH_CUDA_ARCH_LIST=" + architecture() +
             ", or update its driver";
    default:  // what an earlier kernel did wrong is often told by the next launch
      return text + "; run with CUDA_LAUNCH_BLOCKING=1 to see which kernel failed";
  }
}

}  // namespace nncx::cuda
