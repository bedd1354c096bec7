// Stand-in for csrc/cuda/launch.h: a launch runs the kernel, to its end.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <tuple>
#include <typeinfo>

namespace nncx::cuda {

constexpr size_t kDefaultSharedBytes = 48 * 1024;

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                   cudaStream_t, const Arguments&... arguments) {
  static_assert((sizeof(Parameters) + ... + 0) <= 4096, "CUDA passes up to 4 KB of arguments");
  const bool fits = grid.x > 0 && grid.y > 0 && grid.z > 0 && grid.x < (1u << 31) &&
                    grid.y < (1u << 16) && grid.z < (1u << 16) && block.x > 0 && block.y > 0 &&
                    block.z > 0 && block.z <= 64 && uint64_t{block.x} * block.y * block.z <= 1024;
  if (!fits) return cudaErrorInvalidConfiguration;
  if (!emulator::current_gpu().has_code()) return cudaErrorNoKernelImageForDevice;
  if (shared_bytes > static_cast<size_t>(emulator::current_gpu().shared_bytes)) {
    return cudaErrorInvalidValue;
  }
  const std::tuple<Parameters...> copies(arguments...);
  const auto thread = [&] { std::apply(kernel, copies); };
  emulator::run_grid(grid, block, shared_bytes, thread, typeid(kernel));
  return cudaSuccess;
}

inline uint8_t* dynamic_shared_memory() { return emulator::dynamic_shared_memory(); }

}  // namespace nncx::cuda
