// The convolutions of floats, for ops that are made of them.
#pragma once

#include "conv2d_ops.h"
#include "depthwise_conv2d.h"
#include "grouped_conv2d.h"

namespace nncx {

// On the device of `input`, in all threads that the work is worth. The second takes weight and bias
// in the input's format, and brings them into the one that the device's kernel reads.
void run_depthwise_conv2d(const DepthwiseConv2dParams& p, const Tensor& input);
void run_grouped_conv2d(GroupedConv2dParams p, const Tensor& input, const Tensor& weight,
                        const std::optional<Tensor>& bias);

// Outputs of a channel by a depthwise weight, which is checked: of one with no channels, 1.
inline int64_t read_multiplier(const char* op, const char* name, const Tensor& input,
                               const Tensor& weight) {
  const int64_t channels = input.size(1);
  const bool fits = weight.dim() == 4 && weight.size(1) == 1 &&
                    (channels ? weight.size(0) % channels == 0 : weight.size(0) == 0) &&
                    weight.size(2) >= 1 && weight.size(3) >= 1;
  NNCX_CHECK(fits, op, ": ", name,
             " must be [C * multiplier, 1, kh, kw] for an input of C = ", channels,
             " channels, got shape ", shape_text(weight));
  return channels ? weight.size(0) / channels : 1;
}

inline Tensor as_floats(const Tensor& tensor) {
  const Tensor floats = tensor.scalar_type() == ScalarType::Float
                            ? tensor
                            : torch::stable::to(tensor, ScalarType::Float);
  return dense(floats);
}

}  // namespace nncx
