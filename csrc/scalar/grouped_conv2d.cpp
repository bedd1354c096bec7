#include "grouped_conv2d.h"

#include <algorithm>

namespace nncx::scalar {
namespace {

// The sum of output channel `o` of all, of channel `first` on of the input.
float sum_of_terms(const GroupedConv2dParams& p, int64_t n, int64_t y, int64_t x, int64_t o,
                   int64_t first) {
  const int64_t all = p.shape.groups * p.shape.channels, image = p.height * p.width;
  const int64_t step_c = p.channels_last ? 1 : image, step_x = p.channels_last ? all : 1;
  const float* weight = p.weight + o * p.shape.channels * p.shape.taps;
  float sum = p.bias ? p.bias[o] : 0.0f;
  for (int64_t c = 0; c < p.shape.channels; ++c) {
    for (int64_t i = 0; i < p.kernel_h; ++i) {
      const int64_t h = tap_position(y, p.stride_h, p.padding_h, i, p.dilation_h);
      for (int64_t j = 0; j < p.kernel_w; ++j, ++weight) {
        const int64_t w = tap_position(x, p.stride_w, p.padding_w, j, p.dilation_w);
        const bool inside = h >= 0 && h < p.height && w >= 0 && w < p.width;
        const int64_t at = n * all * image + (first + c) * step_c + (h * p.width + w) * step_x;
        sum += *weight * (inside ? load_float(p.input, p.dtype, at) : 0.0f);
      }
    }
  }
  return sum;
}

}  // namespace

int64_t grouped_conv2d_scratch_bytes(const GroupedConv2dParams&) { return 0; }

void grouped_conv2d(const GroupedConv2dParams& p, const Conv2dTile& tile, uint8_t*) {
  const Conv2dWeightShape& s = p.shape;
  const int64_t blocks = grouped_blocks(s), image = p.out_height * p.out_width;
  const int64_t outputs = s.groups * s.out_channels;
  for (int64_t block = tile.block_begin; block < tile.block_end; ++block) {
    const int64_t group = block / blocks;
    const int64_t first = block % blocks * kGroupedBlock;
    const int64_t end = std::min(first + kGroupedBlock, s.out_channels);
    for (int64_t o = group * s.out_channels + first; o < group * s.out_channels + end; ++o) {
      const int64_t to = stored_channel(p, o);
      for (int64_t pixel = tile.pixel_begin; pixel < tile.pixel_end; ++pixel) {
        const int64_t n = pixel / image, at = pixel % image;
        const float sum =
            sum_of_terms(p, n, at / p.out_width, at % p.out_width, o, group * s.channels);
        const int64_t index =
            n * outputs * image + (p.channels_last ? at * outputs + to : to * image + at);
        store_float(activate(p.activation, sum), p.dtype, p.output, index);
      }
    }
  }
}

}  // namespace nncx::scalar
