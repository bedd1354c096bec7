// depthwise_conv2d: a convolution in which every channel is alone.
//
//   y[n, c * multiplier + m, y, x] = activation(bias[o] + sum over taps (i, j) of
//       a[n, c, y*stride_h - padding_h + i*dilation_h, ...] * w[o, i, j]),   o = c * multiplier + m
//
// Sums are float32, of inputs and weights that are converted to it, and rounded once to the output's
// format. Their order is a path's own and depends on the kernel size alone, so one path gives the
// same bits in either layout, on every run and thread count; against the exact sum the error is at
// most (taps + 1) * 2^-23 * (|bias| + sum |w a|). NaN and infinity pass as in any float convolution.
// Padding is a zero that is multiplied or left out, as a path likes.
//
// Input   [batch, channels, height, width], pixels innermost or channels innermost, dense
// Weight  [channels * multiplier, kernel_h, kernel_w], dense
// Bias    [channels * multiplier]
// Output  [batch, channels * multiplier, out_height, out_width], in the input's order, dense
#pragma once

#include <cstdint>

#include "conv2d.h"
#include "float_epilogue.h"

namespace nncx {

struct DepthwiseConv2dParams : Conv2dGeometry {
  int64_t channels;    // of the input
  int64_t multiplier;  // outputs of each
  Dtype dtype;         // of the input, weight, bias and output: float32, float16 or bfloat16
  bool channels_last;  // of the input and output: channels innermost, else pixels innermost
  const void* input;
  const void* weight;
  const void* bias;  // or null for 0
  Activation activation;
  void* output;
};

constexpr int64_t kDepthwiseBlock = 16;  // output channels

static constexpr int64_t depthwise_outputs(const DepthwiseConv2dParams& p) {
  return p.channels * p.multiplier;
}

// A tile's pixels are whole lines of the output.
namespace scalar {
int64_t depthwise_conv2d_scratch_bytes(const DepthwiseConv2dParams& params);  // of each call
void depthwise_conv2d(const DepthwiseConv2dParams& params, const Conv2dTile& tile,
                      uint8_t* scratch);
}  // namespace scalar

namespace avx2 {
int64_t depthwise_conv2d_scratch_bytes(const DepthwiseConv2dParams& params);
void depthwise_conv2d(const DepthwiseConv2dParams& params, const Conv2dTile& tile,
                      uint8_t* scratch);
}  // namespace avx2

namespace avx512 {
int64_t depthwise_conv2d_scratch_bytes(const DepthwiseConv2dParams& params);
void depthwise_conv2d(const DepthwiseConv2dParams& params, const Conv2dTile& tile,
                      uint8_t* scratch);
}  // namespace avx512

// Enqueues on `stream` (a cudaStream_t) and returns the launch's cudaError_t.
namespace cuda {
int depthwise_conv2d(const DepthwiseConv2dParams& params, void* stream);
}  // namespace cuda

}  // namespace nncx
