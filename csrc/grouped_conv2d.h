// grouped_conv2d: a float convolution in groups, whose output may leave with its channels shuffled.
//
//   r[n, o, y, x] = activation(bias[o] + sum over channels c of the group and taps (i, j) of
//                              a[n, c, y*stride_h - padding_h + i*dilation_h, ...] * w[o, c, i, j])
//   output        = channel_shuffle(r, shuffle)                              (channel_shuffle.h)
//
// Sums are float32 and rounded once to the output's format. They begin with the bias and run through
// the weight's order [channel][tap] term by term (on CUDA [tap][channel], and end with the bias): one
// path gives the same bits in either layout, on every run and thread count; against the exact sum of
// the K = channels * taps terms the error is at most (K + 1) * 2^-23 * (|bias| + sum |w a|). NaN and infinity pass as in any float convolution;
// padding is a zero that is multiplied, so an infinite weight makes NaN there.
//
// Input   [batch, groups * channels, height, width], pixels innermost or channels innermost, dense
// Weight  float32 [groups * out_channels, channels, kernel_h, kernel_w], dense
// Bias    float32 [groups * out_channels], in the order before the shuffle
// Output  [batch, groups * out_channels, out_height, out_width], in the input's order, dense
#pragma once

#include <cstdint>

#include "channel_shuffle.h"
#include "conv2d.h"
#include "float_epilogue.h"

namespace nncx {

struct GroupedConv2dParams : Conv2dGeometry {
  Conv2dWeightShape shape;
  int64_t shuffle;     // divides the output's channels
  Dtype dtype;         // of the input and output: float32, float16 or bfloat16
  bool channels_last;  // of the input and output
  const void* input;
  const float* weight;
  const float* bias;  // or null for 0
  Activation activation;
  void* output;
};

constexpr int64_t kGroupedBlock = 24;  // output channels, of one group

static constexpr int64_t grouped_blocks(const Conv2dWeightShape& s) {
  return (s.out_channels + kGroupedBlock - 1) / kGroupedBlock;
}

// Where output channel `o`, counted over all groups, is stored.
static constexpr int64_t stored_channel(const GroupedConv2dParams& p, int64_t o) {
  return shuffled(o, p.shuffle, p.shape.groups * p.shape.out_channels / p.shuffle);
}

namespace scalar {
int64_t grouped_conv2d_scratch_bytes(const GroupedConv2dParams& params);  // of each call
void grouped_conv2d(const GroupedConv2dParams& params, const Conv2dTile& tile, uint8_t* scratch);
}  // namespace scalar

namespace avx2 {
int64_t grouped_conv2d_scratch_bytes(const GroupedConv2dParams& params);
void grouped_conv2d(const GroupedConv2dParams& params, const Conv2dTile& tile, uint8_t* scratch);
}  // namespace avx2

namespace avx512 {
int64_t grouped_conv2d_scratch_bytes(const GroupedConv2dParams& params);
void grouped_conv2d(const GroupedConv2dParams& params, const Conv2dTile& tile, uint8_t* scratch);
}  // namespace avx512

// Enqueues the whole op on `stream` (a cudaStream_t); returns the launch's cudaError_t. Instead of
// those of `params` it takes a weight, as [output][tap][channel], and a bias in the input's format.
namespace cuda {
int grouped_conv2d(const GroupedConv2dParams& params, const void* weight, const void* bias,
                   void* stream);
}

}  // namespace nncx
