// How weights get their layout on CUDA (gemm_weight.h): a warp writes a row and its tap sums.
//
// `Filters` says where byte `byte` of tap `tap` lies in the dense weight of one output channel, and
// what it adds to the tap's sum.
#pragma once

#include <algorithm>

#include "cuda/gemm_weight.h"
#include "cuda/launch.h"
#include "cuda/numbers.h"

namespace nncx::cuda {

struct BinaryFilters {  // [tap][byte]
  __device__ static int64_t at(const GemmWeight& w, int64_t tap, int64_t byte) {
    return tap * w.channel_bytes + byte;
  }
  __device__ static int32_t value(uint8_t byte) { return __popc(byte); }
};

struct Int8Filters {  // [channel][tap]
  __device__ static int64_t at(const GemmWeight& w, int64_t tap, int64_t byte) {
    return byte * w.taps + tap;
  }
  __device__ static int32_t value(uint8_t byte) { return static_cast<int8_t>(byte); }
};

// The rows' zeros beyond k_bytes are there already.
template <class Filters>
__global__ void prepack_rows(const GemmWeight w, const uint8_t* weight, uint8_t* prepacked) {
  const int lane = threadIdx.x % 32;
  const int64_t warps = int64_t{gridDim.x} * (blockDim.x / 32);
  const int64_t first = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / 32;
  auto* sums = reinterpret_cast<int32_t*>(prepacked + w.sums_offset());
  for (int64_t row = first; row < w.rows; row += warps) {
    const uint8_t* from = weight + row * w.k_bytes();
    uint8_t* to = prepacked + kGemmRowsOffset + row * w.row_bytes();
    int32_t total = 0;
    for (int64_t tap = 0; tap < w.taps; ++tap) {
      int32_t sum = 0;
      for (int64_t byte = lane; byte < w.channel_bytes; byte += 32) {
        const uint8_t value = from[Filters::at(w, tap, byte)];
        to[tap * w.channel_bytes + byte] = value;
        sum += Filters::value(value);
      }
      for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
      if (lane == 0) sums[tap * w.rows + row] = sum;
      total += sum;
    }
    if (lane == 0) sums[w.taps * w.rows + row] = total;
  }
}

template <class Filters>
int prepack_gemm(const GemmWeight& w, const uint8_t* weight, uint8_t* prepacked, void* stream) {
  constexpr int kThreads = 256;
  constexpr int64_t kMostBlocks = 1 << 16;  // the kernel loops over what is left
  const int64_t blocks = std::min((w.rows + kThreads / 32 - 1) / (kThreads / 32), kMostBlocks);
  return launch(prepack_rows<Filters>, static_cast<unsigned>(blocks), kThreads, 0,
                static_cast<cudaStream_t>(stream), w, weight, prepacked);
}

}  // namespace nncx::cuda
