// The sums as they are written down; zero points are subtracted before the products.
#include "int8_conv2d.h"

#include <algorithm>
#include <cstring>

namespace nncx::scalar {
namespace {

int32_t dot(const Int8Conv2dParams& p, int64_t n, int64_t y, int64_t x, int64_t group,
            const int8_t* w) {
  const int64_t channels = p.shape.channels;
  const int32_t zero_point = zero_point_of(p, n);
  int32_t sum = 0;
  for (int64_t i = 0; i < p.kernel_h; ++i) {
    const int64_t h = tap_position(y, p.stride_h, p.padding_h, i, p.dilation_h);
    for (int64_t j = 0; j < p.kernel_w; ++j, w += channels) {
      const int64_t v = tap_position(x, p.stride_w, p.padding_w, j, p.dilation_w);
      if (h < 0 || h >= p.height || v < 0 || v >= p.width) continue;
      const int64_t pixel = (n * p.height + h) * p.width + v;
      const int8_t* a = p.input + (pixel * p.shape.groups + group) * channels;
      for (int64_t c = 0; c < channels; ++c) sum += (a[c] - zero_point) * w[c];
    }
  }
  return sum;
}

}  // namespace

int64_t int8_conv2d_prepacked_bytes(const Conv2dWeightShape& s) {
  return s.groups * s.out_channels * s.taps * s.channels;
}

// [o][tap][channel]
void int8_conv2d_prepack(const Conv2dWeightShape& s, const int8_t* weight, uint8_t* prepacked) {
  for (int64_t o = 0; o < s.groups * s.out_channels; ++o, weight += s.channels * s.taps) {
    for (int64_t tap = 0; tap < s.taps; ++tap) {
      for (int64_t c = 0; c < s.channels; ++c) {
        *prepacked++ = static_cast<uint8_t>(weight[c * s.taps + tap]);
      }
    }
  }
}

int64_t int8_conv2d_scratch_bytes(const Int8Conv2dParams&) { return 0; }

void int8_conv2d(const Int8Conv2dParams& p, const Conv2dTile& tile, uint8_t*) {
  const Conv2dWeightShape& s = p.shape;
  const int64_t together = channels_in_blocks(s), blocks = int8_blocks(together);
  const int64_t image = p.out_height * p.out_width;
  const auto* weight = reinterpret_cast<const int8_t*>(p.weight);
  for (int64_t block = tile.block_begin; block < tile.block_end; ++block) {
    const int64_t begin = block / blocks * together, first = block % blocks * kInt8Block;
    const int64_t end = std::min(first + kInt8Block, together);
    for (int64_t o = begin + first; o < begin + end; ++o) {
      for (int64_t pixel = tile.pixel_begin; pixel < tile.pixel_end; ++pixel) {
        const int64_t n = pixel / image, in_image = pixel % image;
        const int32_t sum = dot(p, n, in_image / p.out_width, in_image % p.out_width,
                                o / s.out_channels, weight + o * s.taps * s.channels);
        store_sum(p.epilogue, sum, pixel, o);
      }
    }
  }
}

}  // namespace nncx::scalar
