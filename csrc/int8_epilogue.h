// What happens to the int32 sums of an int8 op before they leave:
//
//   v = sum * scale[o]
//   v = v * input_scale[m]                                      (rows only)
//   v = v + bias[o]
//   v = v + residual        or  v + (residual - residual_zero_point) * residual_scale
//   v = activation(v)
//   y = v in a float format  or  quantize(v, out_scale, out_zero_point)   (quantize_int8.h)
//
// Each operation is rounded to float32 on its own, in this order (the build forbids contraction),
// so every path gives the same bits, and an int8 output the bytes of quantize_int8 after the op.
#pragma once

#include "dtype.h"
#include "float_epilogue.h"
#include "quantize_int8.h"

namespace nncx {

// What four pointers of the epilogue point to. A CPU path has it from read_scalars(), once for the
// call; the host must not read a GPU's memory, for which it would have to wait.
struct Int8Scalars {
  float residual_scale;
  int32_t residual_zero_point;
  Int8Quantizer quantizer;
};

struct Int8Epilogue {
  const float* scale;        // [channels], or null for 1
  const float* bias;         // [channels], or null for 0
  const float* input_scale;  // [batch], or null for 1

  const void* residual;   // in the layout of the output, or null
  bool residual_is_int8;  // else of residual_dtype
  Dtype residual_dtype;
  const float* residual_scale;        // of an int8 residual
  const int8_t* residual_zero_point;  // the same

  Activation activation;

  void* output;
  bool output_is_int8;  // else of dtype
  Dtype dtype;
  const float* out_scale;        // of an int8 output
  const int8_t* out_zero_point;  // the same
  bool channels_last;            // [batch, image, channels], else [batch, channels, image]
  int64_t channels;              // output channels of all groups
  int64_t image;                 // output pixels of one image

  Int8Scalars scalars;  // on the CPU
};

static constexpr Int8Scalars read_scalars(const Int8Epilogue& e) {
  Int8Scalars s{};
  if (e.residual && e.residual_is_int8) {
    s.residual_scale = *e.residual_scale;
    s.residual_zero_point = *e.residual_zero_point;
  }
  if (e.output_is_int8) s.quantizer = int8_quantizer(*e.out_scale, *e.out_zero_point);
  return s;
}

// Where a number lies in the output; `pixel` counts through the batch.
static constexpr int64_t output_index(const Int8Epilogue& e, int64_t pixel, int64_t o) {
  if (e.channels_last) return pixel * e.channels + o;
  return (pixel / e.image * e.channels + o) * e.image + pixel % e.image;
}

static inline float residual_at(const Int8Epilogue& e, int64_t index) {
  if (!e.residual_is_int8) return load_float(e.residual, e.residual_dtype, index);
  const int32_t q = static_cast<const int8_t*>(e.residual)[index];
  return static_cast<float>(q - e.scalars.residual_zero_point) * e.scalars.residual_scale;
}

// One sum, of a pixel and the output channel `o`.
static inline void store_sum(const Int8Epilogue& e, int32_t sum, int64_t pixel, int64_t o) {
  const int64_t index = output_index(e, pixel, o);
  float v = static_cast<float>(sum);
  if (e.scale) v *= e.scale[o];
  if (e.input_scale) v *= e.input_scale[pixel / e.image];
  if (e.bias) v += e.bias[o];
  if (e.residual) v += residual_at(e, index);
  v = activate(e.activation, v);
  if (e.output_is_int8) {
    static_cast<int8_t*>(e.output)[index] = quantize(e.scalars.quantizer, v);
  } else {
    store_float(v, e.dtype, e.output, index);
  }
}

}  // namespace nncx
