#include "quantize_int8.h"

namespace nncx::scalar {
namespace {

// Calls put(pixel, index of its first number).
template <class Put>
void for_each_pixel(const QuantizeInt8Params& p, int64_t begin, int64_t end, const Put& put) {
  const int64_t image = p.height * p.width;
  for (int64_t pixel = begin; pixel < end; ++pixel) {
    const int64_t n = pixel / image, y = pixel % image / p.width, x = pixel % p.width;
    put(pixel, n * p.stride_n + y * p.stride_h + x * p.stride_w);
  }
}

template <class T>
void sign_pixels(const QuantizeInt8Params& p, int64_t begin, int64_t end) {
  for_each_pixel(p, begin, end, [&](int64_t pixel, int64_t at) {
    const T* x = static_cast<const T*>(p.input) + at;
    int8_t* out = p.output + pixel * p.channels;
    for (int64_t c = 0; c < p.channels; ++c) out[c] = is_positive(x[c * p.stride_c]) ? 1 : -1;
  });
}

}  // namespace

void quantize_int8(const QuantizeInt8Params& p, int64_t begin, int64_t end) {
  for_each_pixel(p, begin, end, [&](int64_t pixel, int64_t at) {
    const Int8Quantizer quantizer = quantizer_of(p, pixel);
    int8_t* out = p.output + pixel * p.channels;
    for (int64_t c = 0; c < p.channels; ++c) {
      out[c] = quantize(quantizer, load_float(p.input, p.dtype, at + c * p.stride_c));
    }
  });
}

void sign_int8(const QuantizeInt8Params& p, int64_t begin, int64_t end) {
  switch (p.dtype) {
    case Dtype::float32:
      return sign_pixels<float>(p, begin, end);
    case Dtype::float64:
      return sign_pixels<double>(p, begin, end);
    case Dtype::float16:
      return sign_pixels<Half>(p, begin, end);
    case Dtype::bfloat16:
      return sign_pixels<BFloat16>(p, begin, end);
  }
}

}  // namespace nncx::scalar
