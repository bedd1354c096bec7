// Two layouts have a vector loop, for float32, float16 and bfloat16:
//
//   channels innermost (rows, channels_last): 8 channels -> one compare, one movemask, one byte;
//   pixels innermost (NCHW): 8 pixels x 32 channels -> lane i gathers the 32 bits of pixel i, by
//     (mask of channel c) & (1 << c), or-ed together: no transposition is needed.
//
// Any other stride, and float64, take the scalar loop.
#include "pack_signs.h"

#include <immintrin.h>

#include <algorithm>

namespace nncx::avx2 {
namespace {

// 8 numbers as float32. Widening keeps signs, zeros and NaN.
__m256 load8(const float* x) { return _mm256_loadu_ps(x); }
__m256 load8(const Half* x) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
}
__m256 load8(const BFloat16* x) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}

__m256 positive(__m256 x) { return _mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_GE_OQ); }

template <class T>
void pack_channels(const T* x, int64_t channels, uint8_t* out) {
  int64_t c = 0;
  for (; c + 8 <= channels; c += 8) {
    *out++ = static_cast<uint8_t>(_mm256_movemask_ps(positive(load8(x + c))));
  }
  if (c < channels) {
    uint8_t byte = 0;
    for (int64_t bit = 0; c + bit < channels; ++bit) {
      byte |= static_cast<uint8_t>(is_positive(x[c + bit]) << bit);
    }
    *out++ = byte;
  }
  std::memset(out, 0, packed_bytes(channels) - (channels + 7) / 8);
}

// 8 adjacent pixels, up to 32 channels: 4 bytes of each pixel.
template <class T>
void pack_8_pixels(const T* x, int64_t stride_c, int64_t channels, uint8_t* out,
                   int64_t pixel_bytes) {
  __m256 words = _mm256_setzero_ps();
  for (int64_t c = 0; c < channels; ++c) {
    const __m256 bit = _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(1u << c)));
    words = _mm256_or_ps(words, _mm256_and_ps(positive(load8(x + c * stride_c)), bit));
  }
  alignas(32) uint32_t lanes[8];
  _mm256_store_ps(reinterpret_cast<float*>(lanes), words);
  for (int i = 0; i < 8; ++i) std::memcpy(out + i * pixel_bytes, &lanes[i], 4);
}

// One run of pixels of one image row, channels at a stride.
template <class T>
void pack_run(const PackSignsParams& p, const T* x, int64_t pixels, uint8_t* out) {
  const int64_t group_bytes = packed_bytes(p.channels);
  const int64_t pixel_bytes = p.groups * group_bytes;
  for (int64_t g = 0; g < p.groups; ++g) {
    for (int64_t byte = 0; byte < group_bytes; byte += 4) {
      const int64_t c = byte * 8;
      const int64_t channels = std::clamp<int64_t>(p.channels - c, 0, 32);
      const T* from = x + (g * p.channels + c) * p.stride_c;
      for (int64_t i = 0; i < pixels; i += 8) {
        pack_8_pixels(from + i, p.stride_c, channels,
                      out + i * pixel_bytes + g * group_bytes + byte, pixel_bytes);
      }
    }
  }
}

template <class T>
void pack_pixels(const PackSignsParams& p, int64_t begin, int64_t end) {
  const int64_t pixel_bytes = p.groups * packed_bytes(p.channels);
  const int64_t image = p.height * p.width;
  while (begin < end) {
    const int64_t n = begin / image, h = begin / p.width % p.height, w = begin % p.width;
    const int64_t run = std::min(end - begin, p.width - w);
    const T* x = static_cast<const T*>(p.input) + n * p.stride_n + h * p.stride_h + w * p.stride_w;
    uint8_t* out = p.output + begin * pixel_bytes;
    if (p.stride_c == 1) {
      for (int64_t i = 0; i < run; ++i) {
        for (int64_t g = 0; g < p.groups; ++g) {
          pack_channels(x + i * p.stride_w + g * p.channels, p.channels,
                        out + i * pixel_bytes + g * packed_bytes(p.channels));
        }
      }
    } else {
      const int64_t whole = p.stride_w == 1 ? run / 8 * 8 : 0;
      pack_run(p, x, whole, out);
      if (whole < run) scalar::pack_signs(p, begin + whole, begin + run);
    }
    begin += run;
  }
}

}  // namespace

void pack_signs(const PackSignsParams& p, int64_t begin, int64_t end) {
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

}  // namespace nncx::avx2
