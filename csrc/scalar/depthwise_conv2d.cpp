#include "depthwise_conv2d.h"

#include <algorithm>

namespace nncx::scalar {
namespace {

float sum_of_taps(const DepthwiseConv2dParams& p, int64_t n, int64_t o, int64_t y, int64_t x) {
  const int64_t c = o / p.multiplier;
  const int64_t step_c = p.channels_last ? 1 : p.height * p.width;
  const int64_t step_x = p.channels_last ? p.channels : 1;
  const int64_t image = n * p.channels * p.height * p.width + c * step_c;
  float sum = p.bias ? load_float(p.bias, p.dtype, o) : 0.0f;
  for (int64_t i = 0; i < p.kernel_h; ++i) {
    const int64_t h = tap_position(y, p.stride_h, p.padding_h, i, p.dilation_h);
    if (h < 0 || h >= p.height) continue;
    for (int64_t j = 0; j < p.kernel_w; ++j) {
      const int64_t w = tap_position(x, p.stride_w, p.padding_w, j, p.dilation_w);
      if (w < 0 || w >= p.width) continue;
      sum += load_float(p.input, p.dtype, image + (h * p.width + w) * step_x) *
             load_float(p.weight, p.dtype, (o * p.kernel_h + i) * p.kernel_w + j);
    }
  }
  return sum;
}

}  // namespace

int64_t depthwise_conv2d_scratch_bytes(const DepthwiseConv2dParams&) { return 0; }

void depthwise_conv2d(const DepthwiseConv2dParams& p, const Conv2dTile& tile, uint8_t*) {
  const int64_t outputs = depthwise_outputs(p), image = p.out_height * p.out_width;
  const int64_t end = std::min(tile.block_end * kDepthwiseBlock, outputs);
  for (int64_t pixel = tile.pixel_begin; pixel < tile.pixel_end; ++pixel) {
    const int64_t n = pixel / image, at = pixel % image;
    for (int64_t o = tile.block_begin * kDepthwiseBlock; o < end; ++o) {
      const float sum = sum_of_taps(p, n, o, at / p.out_width, at % p.out_width);
      const int64_t index =
          n * outputs * image + (p.channels_last ? at * outputs + o : o * image + at);
      store_float(activate(p.activation, sum), p.dtype, p.output, index);
    }
  }
}

}  // namespace nncx::scalar
