// What the tiles of a binary convolution (conv2d_lines.h) know of their rows.
#pragma once

#include "binary_conv2d.h"
#include "conv2d_lines.h"

namespace nncx {
namespace {

constexpr int64_t kBinaryTileRows = 16;

// Neighbouring output pixels: of how many products of signs their dot products are the sum, and the
// input's scale there.
struct BinaryRows {
  int64_t first, count;
  int32_t bits[kBinaryTileRows];
  float input_scale[kBinaryTileRows];
};

// How many of a kernel's taps along one dimension lie inside the image.
inline int64_t taps_inside(int64_t first, int64_t kernel, int64_t dilation, int64_t size) {
  if (first >= 0 && first + (kernel - 1) * dilation < size) return kernel;
  int64_t inside = 0;
  for (int64_t i = 0; i < kernel; ++i) {
    const int64_t at = first + i * dilation;
    inside += at >= 0 && at < size;
  }
  return inside;
}

// How many products of signs make up the dot product of an output pixel.
inline int64_t counted_bits(const BinaryConv2dParams& p, const Position& at) {
  if (p.pad_value) return p.shape.taps * p.shape.channels;
  return p.shape.channels *
         taps_inside(at.y * p.stride_h - p.padding_h, p.kernel_h, p.dilation_h, p.height) *
         taps_inside(at.x * p.stride_w - p.padding_w, p.kernel_w, p.dilation_w, p.width);
}

// What both vector paths tell the walk.
struct BinaryPath {
  using Params = BinaryConv2dParams;
  using Rows = BinaryRows;
  static constexpr int64_t kTileRows = kBinaryTileRows;
  static constexpr int64_t kTileBlocks = 2;
  static constexpr int64_t kBlock = kBinaryBlock;

  static int64_t group_bytes(const Params& p) { return packed_bytes(p.shape.channels); }

  static bool by_image(const Params& p) {
    return !p.epilogue.threshold && !p.epilogue.channels_last;
  }

  static void describe(const Params& p, const Position& at, int64_t group, int64_t r, Rows& rows) {
    const BinaryEpilogue& e = p.epilogue;
    const int64_t pixel = at.y * p.out_width + at.x;
    rows.bits[r] = static_cast<int32_t>(counted_bits(p, at));
    rows.input_scale[r] =
        e.input_scale ? e.input_scale[(at.n * p.shape.groups + group) * e.image + pixel] : 1;
  }
};

}  // namespace
}  // namespace nncx
