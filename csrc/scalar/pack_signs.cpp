#include "pack_signs.h"

namespace nncx::scalar {
namespace {

template <class T>
void pack_pixels(const PackSignsParams& p, int64_t begin, int64_t end) {
  const int64_t group_bytes = packed_bytes(p.channels);
  for (int64_t pixel = begin; pixel < end; ++pixel) {
    const int64_t n = pixel / (p.height * p.width);
    const int64_t h = pixel / p.width % p.height;
    const int64_t w = pixel % p.width;
    const T* x = static_cast<const T*>(p.input) + n * p.stride_n + h * p.stride_h + w * p.stride_w;
    uint8_t* out = p.output + pixel * p.groups * group_bytes;
    for (int64_t g = 0; g < p.groups; ++g, out += group_bytes) {
      std::memset(out, 0, group_bytes);
      for (int64_t c = 0; c < p.channels; ++c, x += p.stride_c) {
        out[c / 8] |= static_cast<uint8_t>(is_positive(*x) << (c % 8));
      }
    }
  }
}

}  // namespace

void pack_signs(const PackSignsParams& p, int64_t begin, int64_t end) {
  switch (p.dtype) {
    case Dtype::float32:
      return pack_pixels<float>(p, begin, end);
    case Dtype::float64:
      return pack_pixels<double>(p, begin, end);
    case Dtype::float16:
      return pack_pixels<Half>(p, begin, end);
    case Dtype::bfloat16:
      return pack_pixels<BFloat16>(p, begin, end);
  }
}

}  // namespace nncx::scalar
