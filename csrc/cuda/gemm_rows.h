// The rows of A in an implicit GEMM: row m is output pixel m, its byte k = tap * channel_bytes + byte
// is a channel byte of the input pixel that the tap reads. Nothing is written out: loaders compute
// addresses, from a row's origin (once a tile) and a tap's offset (once for all rows).
#pragma once

#include "conv2d.h"

namespace nncx::cuda {

struct OutputPixel {
  int64_t n, in_image;
  int64_t y, x;
};

template <class Integer>
constexpr OutputPixel output_pixel_in(const Conv2dGeometry& g, Integer pixel) {
  const auto width = static_cast<Integer>(g.out_width);
  const auto height = static_cast<Integer>(g.out_height);
  const Integer line = pixel / width;
  const Integer n = line / height;
  const Integer y = line - n * height;
  const Integer x = pixel - line * width;
  return {n, y * g.out_width + x, y, x};
}

// `pixel` counts through the batch. A division of 32 bits takes a third of the time.
constexpr OutputPixel output_pixel(const Conv2dGeometry& g, int64_t pixel) {
  constexpr int64_t kMost = 0xFFFFFFFF;
  if (pixel <= kMost && g.out_width <= kMost && g.out_height <= kMost) {
    return output_pixel_in(g, static_cast<uint32_t>(pixel));
  }
  return output_pixel_in(g, pixel);
}

// Of one direction: the taps in [begin, end) lie inside the image.
struct TapRange {
  int32_t begin, end;

  constexpr bool holds(int32_t tap) const { return tap >= begin && tap < end; }
};

constexpr TapRange valid_taps(int64_t out, int64_t stride, int64_t padding, int64_t dilation,
                              int64_t kernel, int64_t size) {
  const int64_t origin = tap_position(out, stride, padding, 0, dilation);
  const auto taps_before = [=](int64_t position) {  // that lie before it, of the kernel's
    const int64_t distance = position - origin;
    if (distance <= 0) return int32_t{0};
    const int64_t taps = dilation == 1 ? distance : (distance + dilation - 1) / dilation;
    return static_cast<int32_t>(taps < kernel ? taps : kernel);
  };
  return {taps_before(0), taps_before(size)};
}

constexpr TapRange valid_taps_y(const Conv2dGeometry& g, const OutputPixel& at) {
  return valid_taps(at.y, g.stride_h, g.padding_h, g.dilation_h, g.kernel_h, g.height);
}

constexpr TapRange valid_taps_x(const Conv2dGeometry& g, const OutputPixel& at) {
  return valid_taps(at.x, g.stride_w, g.padding_w, g.dilation_w, g.kernel_w, g.width);
}

// Whether all of the pixel's taps lie inside the image; without the divisions of their ranges.
constexpr bool is_interior(const Conv2dGeometry& g, const OutputPixel& at) {
  const int64_t y = at.y * g.stride_h - g.padding_h, x = at.x * g.stride_w - g.padding_w;
  return y >= 0 && y + (g.kernel_h - 1) * g.dilation_h < g.height && x >= 0 &&
         x + (g.kernel_w - 1) * g.dilation_w < g.width;
}

// Where tap (0, 0) of a row lies. Unsigned, so that positions before the image are beyond it too,
// and one comparison tells: a padded image has at most 2^31 pixels.
struct alignas(16) RowOrigin {
  // In bytes, from the first input pixel; nothing lies there where y, x are outside.
  int64_t offset;
  uint32_t y, x;
};

constexpr RowOrigin kNoRow = {0, 1u << 31, 1u << 31};  // its taps are all outside

// Of output pixel `pixel`; `pixel_bytes` are an input pixel's, of all groups.
constexpr RowOrigin row_origin(const Conv2dGeometry& g, int64_t pixel_bytes, int64_t pixel) {
  const OutputPixel at = output_pixel(g, pixel);
  const int64_t y = tap_position(at.y, g.stride_h, g.padding_h, 0, g.dilation_h);
  const int64_t x = tap_position(at.x, g.stride_w, g.padding_w, 0, g.dilation_w);
  return {((at.n * g.height + y) * g.width + x) * pixel_bytes, static_cast<uint32_t>(y),
          static_cast<uint32_t>(x)};
}

// A byte of every row: a channel byte of a tap.
class TapCursor {
 public:
  uint32_t byte, x, y;

  constexpr TapCursor(const Conv2dGeometry& g, int64_t channel_bytes, int64_t k)
      : byte(static_cast<uint32_t>(k % channel_bytes)),
        x(static_cast<uint32_t>(k / channel_bytes % g.kernel_w)),
        y(static_cast<uint32_t>(k / channel_bytes / g.kernel_w)) {}

  constexpr void advance(const Conv2dGeometry& g, int64_t channel_bytes, uint32_t bytes) {
    const auto tap_bytes = static_cast<uint32_t>(channel_bytes);
    for (byte += bytes; byte >= tap_bytes; byte -= tap_bytes) {
      if (++x == static_cast<uint32_t>(g.kernel_w)) {
        x = 0;
        ++y;
      }
    }
  }

  // In bytes, from the row's origin.
  constexpr int64_t offset(const Conv2dGeometry& g, int64_t pixel_bytes) const {
    return (y * g.dilation_h * g.width + x * g.dilation_w) * pixel_bytes + byte;
  }

  // Whether the row has a pixel there; not beyond the last tap either.
  constexpr bool is_inside(const Conv2dGeometry& g, const RowOrigin& row) const {
    const uint32_t row_y = row.y + y * static_cast<uint32_t>(g.dilation_h);
    const uint32_t row_x = row.x + x * static_cast<uint32_t>(g.dilation_w);
    return y < static_cast<uint32_t>(g.kernel_h) && row_y < static_cast<uint32_t>(g.height) &&
           row_x < static_cast<uint32_t>(g.width);
  }
};

}  // namespace nncx::cuda
