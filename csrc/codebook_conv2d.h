// codebook_conv2d: a float convolution whose weights are small integers into a table of values.
//
//   y[n, o, y, x] = activation(bias[o] + sum over taps (i, j) and channels c of the group of
//                              a[n, c, y*stride_h - padding_h + i*dilation_h, ...] * w[o, c, i, j])
//   w[o, c, i, j] = codebook[code]  or  codebook[o][code],   0 <= code < 2^bits,  bits = 1 to 8
//
// The weight is never unpacked as a whole: a path decodes a cache-sized part at a time.
//
// Sums are float32. Their order is a path's own and depends on the shape alone, so one path gives
// the same bits on every run and thread count; against the exact sum of the K = taps * channels
// terms the error is at most K * 2^-23 * sum |w a|. NaN and infinity pass as in a float
// convolution; padding is a zero that is multiplied, so an infinite weight makes NaN there.
//
// Input   [batch, height, width, groups * channels], channels innermost: float32 for the paths of
//         the CPU, and float16 or bfloat16 too for CUDA
// Weight  prepacked: an order that one path likes, made by its codebook_conv2d_prepack from codes
//         in weight order [groups * out_channels, channels, kernel_h, kernel_w], dense: code i is
//         the bits i*bits ... (i+1)*bits - 1, least significant bit first
#pragma once

#include <cstdint>

#include "conv2d.h"
#include "float_epilogue.h"

namespace nncx {

struct CodebookConv2dParams : Conv2dGeometry {
  const void* input;
  Dtype input_dtype;
  const uint8_t* weight;
  const float* codebook;
  int64_t codebook_stride;  // to the next output channel's; 0: one codebook for all
  int bits;
  Conv2dWeightShape shape;
  FloatEpilogue epilogue;
};

constexpr int64_t kCodebookBlock = 16;  // output channels, of one group

// Prepacked codes have slots of 2^this bits, so that none straddles words.
static constexpr int slot_log2(int bits) { return bits <= 2 ? bits - 1 : bits <= 4 ? 2 : 3; }

static constexpr int64_t codebook_blocks(const Conv2dWeightShape& s) {
  return (s.out_channels + kCodebookBlock - 1) / kCodebookBlock;
}

// Code `index` of a dense stream.
static constexpr uint8_t code_at(const uint8_t* codes, int64_t index, int bits) {
  const int64_t first = index * bits;
  const int shift = static_cast<int>(first % 8);
  unsigned window = codes[first / 8];
  if (shift + bits > 8) window |= codes[first / 8 + 1] << 8;
  return static_cast<uint8_t>(window >> shift & ((1u << bits) - 1));
}

namespace scalar {
int64_t codebook_conv2d_prepacked_bytes(const Conv2dWeightShape& shape, int bits);
void codebook_conv2d_prepack(const Conv2dWeightShape& shape, int bits, const uint8_t* codes,
                             uint8_t* prepacked);
int64_t codebook_conv2d_scratch_bytes(const CodebookConv2dParams& params);  // of each call
void codebook_conv2d(const CodebookConv2dParams& params, const Conv2dTile& tile, uint8_t* scratch);
}  // namespace scalar

namespace avx2 {
int64_t codebook_conv2d_prepacked_bytes(const Conv2dWeightShape& shape, int bits);
void codebook_conv2d_prepack(const Conv2dWeightShape& shape, int bits, const uint8_t* codes,
                             uint8_t* prepacked);
int64_t codebook_conv2d_scratch_bytes(const CodebookConv2dParams& params);
void codebook_conv2d(const CodebookConv2dParams& params, const Conv2dTile& tile, uint8_t* scratch);
}  // namespace avx2

namespace avx512 {
int64_t codebook_conv2d_prepacked_bytes(const Conv2dWeightShape& shape, int bits);
void codebook_conv2d_prepack(const Conv2dWeightShape& shape, int bits, const uint8_t* codes,
                             uint8_t* prepacked);
int64_t codebook_conv2d_scratch_bytes(const CodebookConv2dParams& params);
void codebook_conv2d(const CodebookConv2dParams& params, const Conv2dTile& tile, uint8_t* scratch);
}  // namespace avx512

// Enqueue on `stream` (a cudaStream_t) and return the launch's cudaError_t.
namespace cuda {
int64_t codebook_conv2d_prepacked_bytes(const Conv2dWeightShape& shape, int bits);
int codebook_conv2d_prepack(const Conv2dWeightShape& shape, int bits, const uint8_t* codes,
                            uint8_t* prepacked, void* stream);
int codebook_conv2d(const CodebookConv2dParams& params, void* stream);
}  // namespace cuda

}  // namespace nncx
