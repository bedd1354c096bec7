// What the contracts of all 2-D convolutions have in common. A linear layer is one with a 1 x 1
// kernel on images of one pixel.
#pragma once

#include <cstdint>

namespace nncx {

// The CPU's kernels of float convolutions also take a part of an image (depthwise_separable_conv2d):
// padding_h may be negative, and out_height another than follows from the rest.
struct Conv2dGeometry {
  int64_t batch, height, width;
  int64_t kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
  int64_t out_height, out_width;
};

// The image row or column that a tap reads; outside [0, size) it is padding.
static constexpr int64_t tap_position(int64_t out, int64_t stride, int64_t padding, int64_t tap,
                                      int64_t dilation) {
  return out * stride - padding + tap * dilation;
}

struct Conv2dWeightShape {
  int64_t groups;
  int64_t out_channels;  // of one group
  int64_t taps;          // kernel_h * kernel_w
  int64_t channels;      // of one group
};

// A rectangle of the work: output pixels of batch * out_height * out_width, and blocks of as many
// output channels as the op says, counted over all groups.
struct Conv2dTile {
  int64_t pixel_begin, pixel_end;
  int64_t block_begin, block_end;
};

// A prepacked weight, as tensor: this header, then the bytes of the path that it names.
struct PrepackedHeader {
  char path[24];  // zero-padded, e.g. "binary/avx2"
  int64_t groups, out_channels, taps, channels, bytes;
};
static_assert(sizeof(PrepackedHeader) == 64);

}  // namespace nncx
