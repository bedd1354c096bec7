// binary_conv2d: a convolution of signs, exact in integers.
//
//   dot[n, o, y, x] = sum over taps (i, j) and channels c of the group of
//                     a[n, c, y*stride_h - padding_h + i*dilation_h, ...] * w[o, c, i, j]
//
// with a and w in {-1, +1}, stored as bits (pack_signs.h). A product of signs is +1 where the bits
// agree, so over `bits` valid positions   dot = bits - 2 * popcount(a xor w).
//
// A bit can't be 0, so padding is this op's own business. Positions outside the image contribute
// `pad_value`: 0 (like torch's zero padding, those taps are left out of the sum), +1 or -1.
//
// Input   [batch, height, width, groups, packed_bytes(channels)], bits beyond the last channel 0,
//         as pack_signs leaves them (otherwise the result is unspecified)
// Weight  prepacked: an order that one path likes, made by its binary_conv2d_prepack from
//         [groups * out_channels, kernel_h, kernel_w, packed_bytes(channels)]
// Output  numbers or signs, as the epilogue says (binary_epilogue.h)
#pragma once

#include <cstdint>

#include "binary_epilogue.h"
#include "conv2d.h"

namespace nncx {

using BinaryWeightShape = Conv2dWeightShape;

struct BinaryConv2dParams : Conv2dGeometry {
  const uint8_t* input;
  const uint8_t* weight;
  BinaryWeightShape shape;
  int pad_value;  // -1, 0 or +1
  BinaryEpilogue epilogue;
};

using BinaryTile = Conv2dTile;  // in blocks of kBinaryBlock output channels

constexpr int64_t kBinaryBlock = 32;

static constexpr int64_t binary_blocks(int64_t out_channels) {
  return (out_channels + kBinaryBlock - 1) / kBinaryBlock;
}

namespace scalar {
int64_t binary_conv2d_prepacked_bytes(const BinaryWeightShape& shape);
void binary_conv2d_prepack(const BinaryWeightShape& shape, const uint8_t* weight,
                           uint8_t* prepacked);
int64_t binary_conv2d_scratch_bytes(const BinaryConv2dParams& params);  // of each concurrent call
void binary_conv2d(const BinaryConv2dParams& params, const BinaryTile& tile, uint8_t* scratch);
}  // namespace scalar

namespace avx2 {
int64_t binary_conv2d_prepacked_bytes(const BinaryWeightShape& shape);
void binary_conv2d_prepack(const BinaryWeightShape& shape, const uint8_t* weight,
                           uint8_t* prepacked);
int64_t binary_conv2d_scratch_bytes(const BinaryConv2dParams& params);
void binary_conv2d(const BinaryConv2dParams& params, const BinaryTile& tile, uint8_t* scratch);
}  // namespace avx2

namespace avx512 {
int64_t binary_conv2d_prepacked_bytes(const BinaryWeightShape& shape);
void binary_conv2d_prepack(const BinaryWeightShape& shape, const uint8_t* weight,
                           uint8_t* prepacked);
int64_t binary_conv2d_scratch_bytes(const BinaryConv2dParams& params);
void binary_conv2d(const BinaryConv2dParams& params, const BinaryTile& tile, uint8_t* scratch);
}  // namespace avx512

// Enqueue on `stream` (a cudaStream_t) and return the launch's cudaError_t.
namespace cuda {
int64_t binary_conv2d_prepacked_bytes(const BinaryWeightShape& shape);
int binary_conv2d_prepack(const BinaryWeightShape& shape, const uint8_t* weight, uint8_t* prepacked,
                          void* stream);
int binary_conv2d(const BinaryConv2dParams& params, void* stream);
}  // namespace cuda

}  // namespace nncx
