// What happens to the integer dot products of a binary op before they leave:
//
//   y = (dot * scale[o]) * input_scale + bias[o]
//
// Each operation is rounded to float32 on its own, in this order (the build forbids contraction),
// and the result is rounded once more to the output's format: every path gives the same bits.
#pragma once

#include "dtype.h"

namespace nncx {

struct BinaryEpilogue {
  const float* scale;        // [out channels], or null for 1
  const float* bias;         // [out channels], or null for 0
  const float* input_scale;  // one per row, or per pixel of a group; or null for 1
  void* output;
  Dtype dtype;  // of the output
};

constexpr int64_t kMaxRowOutputs = 64;

// `count` <= kMaxRowOutputs outputs of one row, starting at output channel `o`, stored from element
// `at` on. One plain loop a step, over a buffer on the stack: each becomes vector code.
template <class T>
static inline void store_row(const BinaryEpilogue& e, const int32_t* dots, int64_t count, int64_t o,
                             const float* input_scale, int64_t at) {
  float y[kMaxRowOutputs];
  for (int64_t i = 0; i < count; ++i) y[i] = static_cast<float>(dots[i]);
  if (e.scale) {
    for (int64_t i = 0; i < count; ++i) y[i] *= e.scale[o + i];
  }
  if (input_scale) {
    const float k = *input_scale;
    for (int64_t i = 0; i < count; ++i) y[i] *= k;
  }
  if (e.bias) {
    for (int64_t i = 0; i < count; ++i) y[i] += e.bias[o + i];
  }
  T* out = static_cast<T*>(e.output) + at;
  for (int64_t i = 0; i < count; ++i) store_float(y[i], out + i);
}

static inline void store_row(const BinaryEpilogue& e, const int32_t* dots, int64_t count, int64_t o,
                             const float* input_scale, int64_t at) {
  switch (e.dtype) {
    case Dtype::float32:
      return store_row<float>(e, dots, count, o, input_scale, at);
    case Dtype::float16:
      return store_row<Half>(e, dots, count, o, input_scale, at);
    case Dtype::bfloat16:
      return store_row<BFloat16>(e, dots, count, o, input_scale, at);
    case Dtype::float64:
      return;  // out_dtype is never that: the op refuses it
  }
}

}  // namespace nncx
