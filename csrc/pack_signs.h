// pack_signs: the signs of a tensor, one bit each.
//
//   bit(x) = 1 if x >= 0 else 0          (0 and -0 give 1, NaN gives 0; bit 1 means +1)
//
// Input: pixels of `groups * channels` numbers, at any strides. A pixel is one (n, h, w); a matrix
// [M, K] is M pixels of a 1 x 1 image. Output, dense:
//
//   [batch, height, width, groups, group_bytes],   group_bytes = packed_bytes(channels)
//
// Channel c of a group is bit c % 8 of byte c / 8 (least significant bit first). Each group is
// padded with 0 bits to a multiple of 64, so that a kernel may read whole 64-bit words.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace nncx {

static constexpr int64_t packed_bytes(int64_t channels) { return (channels + 63) / 64 * 8; }

struct PackSignsParams {
  const void* input;
  uint8_t* output;
  Dtype dtype;
  int64_t batch, groups, channels;  // channels of one group
  int64_t height, width;
  int64_t stride_n, stride_c, stride_h, stride_w;  // of the input, in elements
};

// Packs the pixels [begin, end) of the batch * height * width. Paths agree bit for bit.
namespace scalar {
void pack_signs(const PackSignsParams& params, int64_t begin, int64_t end);
}
namespace avx2 {
void pack_signs(const PackSignsParams& params, int64_t begin, int64_t end);
}
namespace avx512 {
void pack_signs(const PackSignsParams& params, int64_t begin, int64_t end);
}
// Enqueues the whole tensor on `stream` (a cudaStream_t); returns the launch's cudaError_t.
namespace cuda {
int pack_signs(const PackSignsParams& params, void* stream);
}

}  // namespace nncx
