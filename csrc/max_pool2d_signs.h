// max_pool2d_signs: max-pooling of packed signs (pack_signs.h). The maximum of signs is -1 where all
// are -1 and +1 elsewhere, hence the OR of their bits. Padding, which torch's max-pool counts as
// -infinity, is left out.
//
// Input [batch, height, width, pixel_bytes] -> output [batch, out_height, out_width, pixel_bytes],
// whatever the groups and channels within a pixel; pixel_bytes is a multiple of 8.
#pragma once

#include <cstdint>

namespace nncx {

struct MaxPool2dSignsParams {
  const uint8_t* input;
  uint8_t* output;
  int64_t height, width, pixel_bytes;
  int64_t kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
  int64_t out_height, out_width;
};

// Output lines [begin, end) of the batch * out_height.
namespace scalar {
void max_pool2d_signs(const MaxPool2dSignsParams& params, int64_t begin, int64_t end);
}
// 64 bits at a time, bound by the layers around it: no vector path would show.
namespace avx2 {
using scalar::max_pool2d_signs;
}
namespace avx512 {
using scalar::max_pool2d_signs;
}
// Enqueues `lines` output lines on `stream` (a cudaStream_t); returns the launch's cudaError_t.
namespace cuda {
int max_pool2d_signs(const MaxPool2dSignsParams& params, int64_t lines, void* stream);
}

}  // namespace nncx
