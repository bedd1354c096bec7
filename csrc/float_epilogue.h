// What happens to the float sums of an op before they leave:
//
//   y = activation(sum + bias[o])
//
// NaN stays NaN. The result is rounded once more, to the output's format.
#pragma once

#include "dtype.h"

namespace nncx {

enum class Activation { none, relu, relu6 };

struct FloatEpilogue {
  const float* bias;  // [out channels], or null for 0
  Activation activation;
  void* output;
  Dtype dtype;  // of the output
  // Of the output, in elements: channels innermost, or pixels innermost.
  int64_t stride_n, stride_pixel, stride_o;
};

static constexpr float activate(Activation activation, float y) {
  if (activation == Activation::none) return y;
  if (y < 0) return 0;
  return activation == Activation::relu6 && y > 6 ? 6 : y;
}

static constexpr float finish(const FloatEpilogue& e, float sum, int64_t o) {
  return activate(e.activation, e.bias ? sum + e.bias[o] : sum);
}

}  // namespace nncx
