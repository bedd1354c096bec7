// The input of a binary convolution as the table GEMM reads it: one byte per 4 signs, which is half
// the offset of their table, with the padding written out.
//
// A line is width + 2 * padding_w pixels of one group. Lines are numbered through the batch, those
// of the padding included: line n * padded_height + h is row h - padding_h of image n. Only the
// lines that the output pixels at hand read are expanded, into scratch that stays in the L2 cache;
// each pixel of them once, however many taps read it.
#pragma once

#include <immintrin.h>

#include <algorithm>

#include "binary_conv2d.h"
#include "pack_signs.h"

namespace nncx::avx2 {
namespace {

constexpr int64_t kLinesBytes = 1 << 16;  // of scratch, if the kernel's span is not larger
constexpr int64_t kSlack = 16;            // 16 bytes are written at a time

constexpr uint8_t kNotCounted = 16 * 2;  // the table of zeros: a pixel that does not count

constexpr int64_t channel_bytes(int64_t channels) { return (channels + 7) / 8; }

// Bytes of one pixel, and of one line.
inline int64_t pixel_indices(const BinaryConv2dParams& p) {
  return 2 * channel_bytes(p.shape.channels);
}
inline int64_t line_indices(const BinaryConv2dParams& p) {
  return (p.width + 2 * p.padding_w) * pixel_indices(p);
}

// How many lines the taps of one output pixel span, and how many are held at a time.
inline int64_t lines_spanned(const BinaryConv2dParams& p) {
  return (p.kernel_h - 1) * p.dilation_h + 1;
}
inline int64_t lines_held(const BinaryConv2dParams& p) {
  return std::max(lines_spanned(p), kLinesBytes / std::max<int64_t>(line_indices(p), 1));
}

// 8 bytes of signs -> 16 indices, low half of each byte first.
inline void expand_8_bytes(const uint8_t* signs, uint8_t* indices) {
  const __m128i mask = _mm_set1_epi8(0x1E);
  const __m128i x = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(signs));
  const __m128i low = _mm_and_si128(_mm_add_epi8(x, x), mask);
  const __m128i high = _mm_and_si128(_mm_srli_epi16(x, 3), mask);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(indices), _mm_unpacklo_epi8(low, high));
}

inline uint8_t* expand_pixels(const uint8_t* signs, int64_t pixels, int64_t signs_step,
                              int64_t bytes, uint8_t* indices) {
  for (int64_t i = 0; i < pixels; ++i, signs += signs_step, indices += 2 * bytes) {
    for (int64_t k = 0; k < bytes; k += 8) expand_8_bytes(signs + k, indices + 2 * k);
  }
  return indices;
}

// Pixels outside the image. Bits beyond the last channel are 0 in the weights and stay 0 here.
inline uint8_t* expand_padding(const BinaryConv2dParams& p, int64_t pixels, uint8_t* indices) {
  if (pixels == 0) return indices;
  const int64_t bytes = channel_bytes(p.shape.channels);
  uint8_t* end = indices + pixels * 2 * bytes;
  std::memset(indices,
              p.pad_value == 0  ? kNotCounted
              : p.pad_value > 0 ? 15 * 2
                                : 0,
              end - indices);
  if (p.pad_value <= 0) return end;
  for (; indices < end; indices += 2 * bytes) {
    for (int64_t c = p.shape.channels; c < 8 * bytes; ++c) {
      indices[c / 4] &= static_cast<uint8_t>(~(2u << (c % 4)));
    }
  }
  return end;
}

// Lines [first, end) of one group.
inline void expand_lines(const BinaryConv2dParams& p, int64_t group, int64_t first, int64_t end,
                         uint8_t* indices) {
  const int64_t group_bytes = packed_bytes(p.shape.channels);
  const int64_t pixel_bytes = p.shape.groups * group_bytes;
  const int64_t padded_height = p.height + 2 * p.padding_h;
  int64_t n = first / padded_height;
  int64_t h = first % padded_height - p.padding_h;
  for (int64_t line = first; line < end; ++line, ++h) {
    if (h == p.height + p.padding_h) {
      h = -p.padding_h;
      ++n;
    }
    if (h < 0 || h >= p.height) {
      indices = expand_padding(p, p.width + 2 * p.padding_w, indices);
      continue;
    }
    const uint8_t* signs =
        p.input + (n * p.height + h) * p.width * pixel_bytes + group * group_bytes;
    indices = expand_padding(p, p.padding_w, indices);
    indices = expand_pixels(signs, p.width, pixel_bytes, channel_bytes(p.shape.channels), indices);
    indices = expand_padding(p, p.padding_w, indices);
  }
}

}  // namespace
}  // namespace nncx::avx2
