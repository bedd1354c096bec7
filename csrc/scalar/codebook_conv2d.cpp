// One filter at a time is decoded and meets all pixels of the tile.
#include "codebook_conv2d.h"

#include <algorithm>

namespace nncx::scalar {
namespace {

// w[tap][channel] of output channel `o`, counted over all groups.
void decode_filter(const CodebookConv2dParams& p, int64_t o, float* w) {
  const Conv2dWeightShape& s = p.shape;
  const float* codebook = p.codebook + o * p.codebook_stride;
  const int64_t first = o * s.channels * s.taps;
  for (int64_t c = 0; c < s.channels; ++c) {
    for (int64_t tap = 0; tap < s.taps; ++tap) {
      w[tap * s.channels + c] = codebook[code_at(p.weight, first + c * s.taps + tap, p.bits)];
    }
  }
}

float dot(const CodebookConv2dParams& p, int64_t n, int64_t y, int64_t x, int64_t group,
          const float* w) {
  const int64_t channels = p.shape.channels;
  float sum = 0;
  for (int64_t i = 0; i < p.kernel_h; ++i) {
    const int64_t h = tap_position(y, p.stride_h, p.padding_h, i, p.dilation_h);
    for (int64_t j = 0; j < p.kernel_w; ++j, w += channels) {
      const int64_t v = tap_position(x, p.stride_w, p.padding_w, j, p.dilation_w);
      const bool inside = h >= 0 && h < p.height && v >= 0 && v < p.width;
      const int64_t at = ((n * p.height + h) * p.width + v) * p.shape.groups + group;
      const float* a = inside ? static_cast<const float*>(p.input) + at * channels : nullptr;
      for (int64_t c = 0; c < channels; ++c) sum += (a ? a[c] : 0.0f) * w[c];
    }
  }
  return sum;
}

}  // namespace

int64_t codebook_conv2d_prepacked_bytes(const Conv2dWeightShape& s, int bits) {
  return (s.groups * s.out_channels * s.taps * s.channels * bits + 7) / 8;
}

void codebook_conv2d_prepack(const Conv2dWeightShape& s, int bits, const uint8_t* codes,
                             uint8_t* prepacked) {
  std::memcpy(prepacked, codes, codebook_conv2d_prepacked_bytes(s, bits));
}

int64_t codebook_conv2d_scratch_bytes(const CodebookConv2dParams& p) {
  return p.shape.taps * p.shape.channels * static_cast<int64_t>(sizeof(float));
}

void codebook_conv2d(const CodebookConv2dParams& p, const Conv2dTile& tile, uint8_t* scratch) {
  const Conv2dWeightShape& s = p.shape;
  const int64_t blocks = codebook_blocks(s);
  const int64_t image = p.out_height * p.out_width;
  float* w = reinterpret_cast<float*>(scratch);
  for (int64_t block = tile.block_begin; block < tile.block_end; ++block) {
    const int64_t group = block / blocks;
    const int64_t first = block % blocks * kCodebookBlock;
    const int64_t end = std::min(first + kCodebookBlock, s.out_channels);
    for (int64_t o = group * s.out_channels + first; o < group * s.out_channels + end; ++o) {
      decode_filter(p, o, w);
      for (int64_t pixel = tile.pixel_begin; pixel < tile.pixel_end; ++pixel) {
        const int64_t n = pixel / image, in_image = pixel % image;
        const float sum = dot(p, n, in_image / p.out_width, in_image % p.out_width, group, w);
        const FloatEpilogue& e = p.epilogue;
        store_float(finish(e, sum, o), e.dtype, e.output,
                    n * e.stride_n + in_image * e.stride_pixel + o * e.stride_o);
      }
    }
  }
}

}  // namespace nncx::scalar
