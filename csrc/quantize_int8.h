// quantize_int8: floats to 8-bit integers, with a scale and a zero point.
//
//   q = clamp(rint(x * (1 / scale)) + zero_point, -128, 127)
//
// The reciprocal and the product are rounded to float32, rint rounds ties to even, and where the
// product is NaN, q is zero_point. The number that q stands for is (q - zero_point) * scale.
//
// sign_int8: signs as such integers.
//
//   q = +1 if x >= 0 else -1             (0 and -0 give +1, NaN gives -1)
//
// Input: pixels of `channels` numbers at any strides. A pixel is one (n, h, w); a matrix [M, K] is
// M pixels of a 1 x 1 image. Output, dense: [batch, height, width, channels].
#pragma once

#include <cmath>
#include <cstdint>

#include "dtype.h"

namespace nncx {

struct Int8Quantizer {
  float inverse_scale;
  int32_t zero_point;
};

static constexpr Int8Quantizer int8_quantizer(float scale, int32_t zero_point) {
  return {1 / scale, zero_point};
}

// What the rounded product is clamped to, so that its sum with the zero point is in range.
static constexpr float lowest(const Int8Quantizer& q) {
  return static_cast<float>(-128 - q.zero_point);
}
static constexpr float highest(const Int8Quantizer& q) {
  return static_cast<float>(127 - q.zero_point);
}

// Of the product, rounded.
static constexpr int8_t quantize_rounded(const Int8Quantizer& q, float rounded) {
  if (rounded != rounded) rounded = 0;
  rounded = rounded < lowest(q) ? lowest(q) : rounded > highest(q) ? highest(q) : rounded;
  return static_cast<int8_t>(static_cast<int32_t>(rounded) + q.zero_point);
}

static inline int8_t quantize(const Int8Quantizer& q, float x) {
  return quantize_rounded(q, std::nearbyint(x * q.inverse_scale));
}

struct QuantizeInt8Params {
  const void* input;
  int8_t* output;
  Dtype dtype;
  const float* scale;        // of the whole tensor, or of each pixel; sign_int8 has none
  const int8_t* zero_point;  // the same
  bool per_pixel;
  int64_t batch, height, width, channels;
  int64_t stride_n, stride_c, stride_h, stride_w;  // of the input, in elements
};

static constexpr Int8Quantizer quantizer_of(const QuantizeInt8Params& p, int64_t pixel) {
  const int64_t at = p.per_pixel ? pixel : 0;
  return int8_quantizer(p.scale[at], p.zero_point[at]);
}

// Quantizes the pixels [begin, end) of the batch * height * width. Paths agree bit for bit.
namespace scalar {
void quantize_int8(const QuantizeInt8Params& params, int64_t begin, int64_t end);
void sign_int8(const QuantizeInt8Params& params, int64_t begin, int64_t end);
}  // namespace scalar
namespace avx2 {
void quantize_int8(const QuantizeInt8Params& params, int64_t begin, int64_t end);
void sign_int8(const QuantizeInt8Params& params, int64_t begin, int64_t end);
}  // namespace avx2
// Bound by memory, so wider registers would not show.
namespace avx512 {
using avx2::quantize_int8;
using avx2::sign_int8;
}  // namespace avx512
// Enqueues the whole tensor on `stream` (a cudaStream_t); returns the launch's cudaError_t.
namespace cuda {
int quantize_int8(const QuantizeInt8Params& params, void* stream);
}

}  // namespace nncx
