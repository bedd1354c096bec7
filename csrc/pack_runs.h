// How the vector paths walk the input of pack_signs. Two layouts have a vector loop, for float32,
// float16 and bfloat16:
//
//   channels innermost (rows, channels_last): comparisons of neighbours are bits of neighbours;
//   pixels innermost (NCHW): lane i gathers the 32 bits of pixel i, one channel after the other: no
//     transposition is needed.
//
// Any other stride, and float64, take the scalar loop. A `Path` gives
//   Path::pack_64(x, out)                                      64 neighbouring channels: 8 bytes
//   kPixels, Path::pack_columns<Vectors>(x, stride_c, channels, out, pixel_bytes)
//       Vectors * kPixels neighbouring pixels, up to 32 channels: 4 bytes of each pixel
#pragma once

#include <algorithm>
#include <cstring>

#include "pack_signs.h"

namespace nncx {
namespace {

template <class Path>
struct PackRuns {
  template <class T>
  static void pack_channels(const T* x, int64_t channels, uint8_t* out) {
    for (; channels >= 64; channels -= 64, x += 64, out += 8) Path::pack_64(x, out);
    if (channels == 0) return;
    uint64_t word = 0;
    for (int64_t c = 0; c < channels; ++c) word |= uint64_t{is_positive(x[c])} << c;
    std::memcpy(out, &word, 8);
  }

  // A run of pixels of one image row, channels at a stride; returns how many it packed.
  template <class T>
  static int64_t pack_columns(const PackSignsParams& p, const T* x, int64_t pixels, uint8_t* out) {
    constexpr int kVectors = 4;
    constexpr int64_t kPixels = Path::kPixels;
    const int64_t group_bytes = packed_bytes(p.channels);
    const int64_t pixel_bytes = p.groups * group_bytes;
    const int64_t whole = pixels / kPixels * kPixels;
    for (int64_t g = 0; g < p.groups; ++g) {
      for (int64_t byte = 0; byte < group_bytes; byte += 4) {
        const int64_t c = byte * 8;
        const int64_t channels = std::clamp<int64_t>(p.channels - c, 0, 32);
        const T* from = x + (g * p.channels + c) * p.stride_c;
        uint8_t* to = out + g * group_bytes + byte;
        int64_t i = 0;
        for (; i + kVectors * kPixels <= whole; i += kVectors * kPixels) {
          Path::template pack_columns<kVectors>(from + i, p.stride_c, channels,
                                                to + i * pixel_bytes, pixel_bytes);
        }
        for (; i < whole; i += kPixels) {
          Path::template pack_columns<1>(from + i, p.stride_c, channels, to + i * pixel_bytes,
                                         pixel_bytes);
        }
      }
    }
    return whole;
  }

  template <class T>
  static void pack_pixels(const PackSignsParams& p, int64_t begin, int64_t end) {
    const int64_t group_bytes = packed_bytes(p.channels);
    const int64_t pixel_bytes = p.groups * group_bytes;
    const int64_t image = p.height * p.width;
    while (begin < end) {
      const int64_t n = begin / image, h = begin / p.width % p.height, w = begin % p.width;
      const int64_t run = std::min(end - begin, p.width - w);
      const T* x =
          static_cast<const T*>(p.input) + n * p.stride_n + h * p.stride_h + w * p.stride_w;
      uint8_t* out = p.output + begin * pixel_bytes;
      if (p.stride_c == 1) {
        for (int64_t i = 0; i < run; ++i, x += p.stride_w) {
          for (int64_t g = 0; g < p.groups; ++g, out += group_bytes) {
            pack_channels(x + g * p.channels, p.channels, out);
          }
        }
      } else {
        const int64_t whole = p.stride_w == 1 ? pack_columns(p, x, run, out) : 0;
        if (whole < run) scalar::pack_signs(p, begin + whole, begin + run);
      }
      begin += run;
    }
  }

  static void pack(const PackSignsParams& p, int64_t begin, int64_t end) {
    switch (p.dtype) {
      case Dtype::float32:
        return pack_pixels<float>(p, begin, end);
      case Dtype::float16:
        return pack_pixels<Half>(p, begin, end);
      case Dtype::bfloat16:
        return pack_pixels<BFloat16>(p, begin, end);
      case Dtype::float64:
        return scalar::pack_signs(p, begin, end);
    }
  }
};

}  // namespace
}  // namespace nncx
