#include "quantize_int8.h"

namespace nncx::scalar {

void quantize_int8(const QuantizeInt8Params& p, int64_t begin, int64_t end) {
  const int64_t image = p.height * p.width;
  for (int64_t pixel = begin; pixel < end; ++pixel) {
    const int64_t n = pixel / image, y = pixel % image / p.width, x = pixel % p.width;
    const int64_t at = n * p.stride_n + y * p.stride_h + x * p.stride_w;
    const Int8Quantizer quantizer = quantizer_of(p, pixel);
    int8_t* out = p.output + pixel * p.channels;
    for (int64_t c = 0; c < p.channels; ++c) {
      out[c] = quantize(quantizer, load_float(p.input, p.dtype, at + c * p.stride_c));
    }
  }
}

}  // namespace nncx::scalar
