// The header travels as a kernel's argument: a copy from the host's memory would make the host wait.
#include "cuda/launch.h"
#include "cuda/write_header.h"

namespace nncx::cuda {
namespace {

__global__ void write(const __grid_constant__ PrepackedHeader header, uint8_t* prepacked) {
  prepacked[threadIdx.x] = reinterpret_cast<const uint8_t*>(&header)[threadIdx.x];
}

}  // namespace

int write_header(const PrepackedHeader& header, uint8_t* prepacked, void* stream) {
  return launch(write, 1, sizeof header, 0, static_cast<cudaStream_t>(stream), header, prepacked);
}

}  // namespace nncx::cuda
