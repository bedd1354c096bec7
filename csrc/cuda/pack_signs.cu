// pack_signs on CUDA: bound by memory, one read of the input and 1/32 of it written (float32).
//
//   rows      channels innermost: a warp reads 32 neighbouring channels and ballots them into a word
//   strided   anything else, NCHW above all: a thread gathers the 32 channels of one pixel, and
//             neighbouring threads read neighbouring pixels
#include <algorithm>

#include "cuda/launch.h"
#include "pack_signs.h"

namespace nncx::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxBlocks = 1 << 20;  // kernels loop over what is left

__device__ const char* pixel_address(const PackSignsParams& p, int64_t pixel,
                                     int64_t element_size) {
  const int64_t n = pixel / (p.height * p.width);
  const int64_t h = pixel / p.width % p.height;
  const int64_t w = pixel % p.width;
  return static_cast<const char*>(p.input) +
         (n * p.stride_n + h * p.stride_h + w * p.stride_w) * element_size;
}

// One word is 32 bits of one group of one pixel; words are numbered in output order.
struct Word {
  int64_t pixel, group, channel;  // channel: the first of 32
};

__device__ Word locate(const PackSignsParams& p, int64_t word) {
  const int64_t per_group = packed_bytes(p.channels) / 4;
  return {word / (per_group * p.groups), word / per_group % p.groups, word % per_group * 32};
}

template <class T>
__global__ void pack_rows(const PackSignsParams p, int64_t words) {
  const int lane = threadIdx.x % 32;
  const int64_t warps = int64_t{gridDim.x} * (kThreads / 32);
  for (int64_t i = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / 32; i < words; i += warps) {
    const Word word = locate(p, i);
    const int64_t c = word.channel + lane;
    const T* x = reinterpret_cast<const T*>(pixel_address(p, word.pixel, sizeof(T)));
    const bool bit = c < p.channels && is_positive(x[word.group * p.channels + c]);
    const uint32_t bits = __ballot_sync(0xFFFFFFFF, bit);
    if (lane == 0) reinterpret_cast<uint32_t*>(p.output)[i] = bits;
  }
}

template <class T>
__global__ void pack_strided(const PackSignsParams p, int64_t words) {
  const int64_t per_pixel = packed_bytes(p.channels) / 4 * p.groups;
  const int64_t pixels = words / per_pixel;
  const int64_t threads = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < words; i += threads) {
    // pixels vary fastest over threads, so that the reads of a warp are neighbours
    const int64_t index = i % pixels * per_pixel + i / pixels;
    const Word word = locate(p, index);
    const T* x = reinterpret_cast<const T*>(pixel_address(p, word.pixel, sizeof(T))) +
                 (word.group * p.channels + word.channel) * p.stride_c;
    const int64_t left = p.channels - word.channel;
    const int channels = left < 32 ? static_cast<int>(left > 0 ? left : 0) : 32;
    uint32_t bits = 0;
    for (int c = 0; c < channels; ++c) {
      bits |= static_cast<uint32_t>(is_positive(x[c * p.stride_c])) << c;
    }
    reinterpret_cast<uint32_t*>(p.output)[index] = bits;
  }
}

template <class T>
int run(const PackSignsParams& p, cudaStream_t stream) {
  const int64_t words = p.batch * p.height * p.width * p.groups * packed_bytes(p.channels) / 4;
  const bool rows = p.stride_c == 1;
  const int64_t threads = rows ? words * 32 : words;
  const auto blocks =
      static_cast<unsigned>(std::min<int64_t>((threads + kThreads - 1) / kThreads, kMaxBlocks));
  return launch(rows ? pack_rows<T> : pack_strided<T>, blocks, kThreads, 0, stream, p, words);
}

}  // namespace

int pack_signs(const PackSignsParams& p, void* stream) {
  auto* cuda_stream = static_cast<cudaStream_t>(stream);
  switch (p.dtype) {
    case Dtype::float32:
      return run<float>(p, cuda_stream);
    case Dtype::float64:
      return run<double>(p, cuda_stream);
    case Dtype::float16:
      return run<Half>(p, cuda_stream);
    case Dtype::bfloat16:
      return run<BFloat16>(p, cuda_stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace nncx::cuda
