// int8_conv2d: a convolution of 8-bit integers, exact.
//
//   sum[n, o, y, x] = sum over taps (i, j) and channels c of the group of
//                     (a[n, c, y*stride_h - padding_h + i*dilation_h, ...] - zero_point) * w[o, c, i, j]
//
// a and w are any int8 values; positions outside the image add nothing. |sum| is at most 255 * 128 a
// term, so up to kMostInt8Terms terms it fits int32. What leaves is a number or int8 again, as the
// epilogue says (int8_epilogue.h).
//
// Input   [batch, height, width, groups * channels] int8, channels innermost
// Weight  prepacked: an order that one path likes, made by its int8_conv2d_prepack from
//         [groups * out_channels, channels, taps]
#pragma once

#include <cstdint>

#include "conv2d.h"
#include "int8_epilogue.h"

namespace nncx {

struct Int8Conv2dParams : Conv2dGeometry {
  const int8_t* input;
  const uint8_t* weight;
  Conv2dWeightShape shape;
  const int8_t* zero_point;  // of the input, or null for 0
  bool zero_point_per_image;
  Int8Epilogue epilogue;
};

static constexpr int32_t zero_point_of(const Int8Conv2dParams& p, int64_t n) {
  return p.zero_point ? p.zero_point[p.zero_point_per_image ? n : 0] : 0;
}

constexpr int64_t kMostInt8Terms = 65'793;  // of a dot product: (2^31 - 1) / (255 * 128)

constexpr int64_t kInt8Block = 16;  // output channels

static constexpr int64_t int8_blocks(int64_t out_channels) {
  return (out_channels + kInt8Block - 1) / kInt8Block;
}

static constexpr bool is_depthwise(const Conv2dWeightShape& s) {
  return s.channels == 1 && s.groups > 1;
}

// How many groups share their blocks: all of a depthwise convolution, of others as many as one block
// holds, so that the lanes of small groups are not left empty.
static constexpr int64_t groups_together(const Conv2dWeightShape& s) {
  if (is_depthwise(s)) return s.groups;
  int64_t together = s.out_channels ? kInt8Block / s.out_channels : 1;
  if (together > s.groups) together = s.groups;
  while (together > 1 && s.groups % together) --together;
  return together ? together : 1;
}

// How many output channels are cut into blocks together.
static constexpr int64_t channels_in_blocks(const Conv2dWeightShape& s) {
  return groups_together(s) * s.out_channels;
}

static constexpr int64_t int8_blocks(const Conv2dWeightShape& s) {
  return s.groups / groups_together(s) * int8_blocks(channels_in_blocks(s));
}

namespace scalar {
int64_t int8_conv2d_prepacked_bytes(const Conv2dWeightShape& shape);
void int8_conv2d_prepack(const Conv2dWeightShape& shape, const int8_t* weight, uint8_t* prepacked);
int64_t int8_conv2d_scratch_bytes(const Int8Conv2dParams& params);  // of each concurrent call
void int8_conv2d(const Int8Conv2dParams& params, const Conv2dTile& tile, uint8_t* scratch);
}  // namespace scalar

namespace avx2 {
int64_t int8_conv2d_prepacked_bytes(const Conv2dWeightShape& shape);
void int8_conv2d_prepack(const Conv2dWeightShape& shape, const int8_t* weight, uint8_t* prepacked);
int64_t int8_conv2d_scratch_bytes(const Int8Conv2dParams& params);
void int8_conv2d(const Int8Conv2dParams& params, const Conv2dTile& tile, uint8_t* scratch);
}  // namespace avx2

namespace avx512 {
int64_t int8_conv2d_prepacked_bytes(const Conv2dWeightShape& shape);
void int8_conv2d_prepack(const Conv2dWeightShape& shape, const int8_t* weight, uint8_t* prepacked);
int64_t int8_conv2d_scratch_bytes(const Int8Conv2dParams& params);
void int8_conv2d(const Int8Conv2dParams& params, const Conv2dTile& tile, uint8_t* scratch);
}  // namespace avx512

// Enqueue on `stream` (a cudaStream_t) and return the launch's cudaError_t.
namespace cuda {
int64_t int8_conv2d_prepacked_bytes(const Conv2dWeightShape& shape);
int int8_conv2d_prepack(const Conv2dWeightShape& shape, const int8_t* weight, uint8_t* prepacked,
                        void* stream);
int int8_conv2d(const Int8Conv2dParams& params, void* stream);
}  // namespace cuda

}  // namespace nncx
