#include "binary_conv2d.h"

#include <algorithm>
#include <bit>

#include "pack_signs.h"

namespace nncx::scalar {
namespace {

int64_t popcount_xor(const uint8_t* a, const uint8_t* b, int64_t bytes) {
  int64_t count = 0;
  for (int64_t i = 0; i < bytes; i += 8) {
    uint64_t x, y;
    std::memcpy(&x, a + i, 8);
    std::memcpy(&y, b + i, 8);
    count += std::popcount(x ^ y);
  }
  return count;
}

// The dot product of `channels` signs that are all pad_value with those of w.
int64_t pad_dot(const uint8_t* w, int64_t channels, int pad_value) {
  int64_t positive = 0;
  for (int64_t i = 0; i < packed_bytes(channels); ++i) positive += std::popcount(w[i]);
  return pad_value * (2 * positive - channels);
}

int32_t dot(const BinaryConv2dParams& p, int64_t n, int64_t y, int64_t x, int64_t group,
            const uint8_t* w) {
  const int64_t bytes = packed_bytes(p.shape.channels);
  int64_t sum = 0;
  for (int64_t i = 0; i < p.kernel_h; ++i) {
    for (int64_t j = 0; j < p.kernel_w; ++j, w += bytes) {
      const int64_t h = y * p.stride_h - p.padding_h + i * p.dilation_h;
      const int64_t v = x * p.stride_w - p.padding_w + j * p.dilation_w;
      if (h < 0 || h >= p.height || v < 0 || v >= p.width) {
        if (p.pad_value) sum += pad_dot(w, p.shape.channels, p.pad_value);
      } else {
        const int64_t pixel = (n * p.height + h) * p.width + v;
        const uint8_t* a = p.input + (pixel * p.shape.groups + group) * bytes;
        sum += p.shape.channels - 2 * popcount_xor(a, w, bytes);
      }
    }
  }
  return static_cast<int32_t>(sum);
}

}  // namespace

int64_t binary_conv2d_prepacked_bytes(const BinaryWeightShape& s) {
  return s.groups * s.out_channels * s.taps * packed_bytes(s.channels);
}

void binary_conv2d_prepack(const BinaryWeightShape& s, const uint8_t* weight, uint8_t* prepacked) {
  std::memcpy(prepacked, weight, binary_conv2d_prepacked_bytes(s));
}

int64_t binary_conv2d_scratch_bytes(const BinaryConv2dParams&) { return 0; }

void binary_conv2d(const BinaryConv2dParams& p, const BinaryTile& tile, uint8_t*) {
  const BinaryWeightShape& s = p.shape;
  const BinaryEpilogue& e = p.epilogue;
  const int64_t blocks = binary_blocks(s.out_channels);
  const int64_t filter_bytes = s.taps * packed_bytes(s.channels);
  for (int64_t pixel = tile.pixel_begin; pixel < tile.pixel_end; ++pixel) {
    const int64_t n = pixel / e.image, in_image = pixel % e.image;
    const int64_t y = in_image / p.out_width, x = in_image % p.out_width;
    for (int64_t block = tile.block_begin; block < tile.block_end; ++block) {
      const int64_t group = block / blocks;
      const int64_t first = block % blocks * kBinaryBlock;
      const int64_t count = std::min(kBinaryBlock, s.out_channels - first);
      const float input_scale =
          e.input_scale ? e.input_scale[(n * s.groups + group) * e.image + in_image] : 1;
      for (int64_t i = 0; i < count; ++i) {
        const int64_t o = group * s.out_channels + first + i;
        store_dot(e, dot(p, n, y, x, group, p.weight + o * filter_bytes), input_scale, pixel, o);
      }
    }
  }
}

}  // namespace nncx::scalar
