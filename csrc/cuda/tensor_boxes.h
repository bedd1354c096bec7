// What TMA is told of a tensor: what tensor_map.h encodes. Plain C++. Elements are bytes; what lies
// outside the tensor reads as zeros. Addresses and strides are multiples of 16, and a box is at most as
// wide as the span of its swizzle: 32, 64 or 128 bytes, or 0 for none.
#pragma once

#include <cstdint>

namespace nncx::cuda {

// A matrix, read in boxes of box_height rows of box_width bytes.
struct TiledMap {
  const void* address;
  uint64_t width, height, row_stride;
  uint32_t box_width, box_height;
  uint32_t swizzle;
};

// Images [batch, height, width, channels], read in columns of pixels_per_column pixels, of
// channels_per_pixel bytes each. A column walks in steps through the pixels from (lower_w, lower_h) to
// (width + upper_w, height + upper_h), exclusive: along w first, then h, then through the batch.
struct Im2colMap {
  const void* address;
  uint64_t channels, width, height, batch;
  uint64_t stride_w, stride_h, stride_n;
  int lower_w, lower_h, upper_w, upper_h;
  uint32_t channels_per_pixel, pixels_per_column;
  uint32_t step_w, step_h;
  uint32_t swizzle;
};

}  // namespace nncx::cuda
