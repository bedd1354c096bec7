#include "max_pool2d_signs.h"

#include <cstring>

namespace nncx::scalar {
namespace {

void or_pixel(const uint8_t* from, int64_t bytes, uint8_t* to) {
  for (int64_t i = 0; i < bytes; i += 8) {
    uint64_t x, y;
    std::memcpy(&x, from + i, 8);
    std::memcpy(&y, to + i, 8);
    y |= x;
    std::memcpy(to + i, &y, 8);
  }
}

}  // namespace

void max_pool2d_signs(const MaxPool2dSignsParams& p, int64_t begin, int64_t end) {
  const int64_t line_bytes = p.width * p.pixel_bytes;
  for (int64_t line = begin; line < end; ++line) {
    const int64_t n = line / p.out_height, y = line % p.out_height;
    const uint8_t* image = p.input + n * p.height * line_bytes;
    uint8_t* out = p.output + line * p.out_width * p.pixel_bytes;
    std::memset(out, 0, p.out_width * p.pixel_bytes);
    for (int64_t x = 0; x < p.out_width; ++x, out += p.pixel_bytes) {
      for (int64_t i = 0; i < p.kernel_h; ++i) {
        const int64_t h = y * p.stride_h - p.padding_h + i * p.dilation_h;
        if (h < 0 || h >= p.height) continue;
        for (int64_t j = 0; j < p.kernel_w; ++j) {
          const int64_t w = x * p.stride_w - p.padding_w + j * p.dilation_w;
          if (w < 0 || w >= p.width) continue;
          or_pixel(image + h * line_bytes + w * p.pixel_bytes, p.pixel_bytes, out);
        }
      }
    }
  }
}

}  // namespace nncx::scalar
