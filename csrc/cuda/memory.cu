#include "cuda/launch.h"
#include "cuda/memory.h"

namespace nncx::cuda {
namespace {

__global__ void write(const __grid_constant__ PrepackedHeader header, uint8_t* prepacked) {
  prepacked[threadIdx.x] = reinterpret_cast<const uint8_t*>(&header)[threadIdx.x];
}

}  // namespace

int zero(void* memory, int64_t bytes, void* stream) {
  return cudaMemsetAsync(memory, 0, bytes, static_cast<cudaStream_t>(stream));
}

// As a kernel's argument: a copy from the host's memory would make the host wait.
int write_header(const PrepackedHeader& header, uint8_t* prepacked, void* stream) {
  return launch(write, 1, sizeof header, 0, static_cast<cudaStream_t>(stream), header, prepacked);
}

}  // namespace nncx::cuda
