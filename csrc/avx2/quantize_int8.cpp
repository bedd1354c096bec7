// Two layouts have a vector loop: channels innermost (rows, channels_last), where neighbours stay
// neighbours, and pixels innermost (NCHW), where squares of 16 channels x 8 pixels are transposed as
// bytes. Other strides take the scalar loop.
#include "quantize_int8.h"

#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "lanes.h"
#include "unroll.h"

namespace nncx::avx2 {
namespace {

// Narrowing works within 128-bit halves: of four vectors a, b, c, d the first half of the result has
// the first halves of a, b, c, d, four numbers each.
NNCX_INLINE inline __m256i narrow(const __m256i (&x)[4]) {
  return _mm256_packs_epi16(_mm256_packs_epi32(x[0], x[1]), _mm256_packs_epi32(x[2], x[3]));
}

template <class T>
void quantize_run(Int8Quantizer q, const T* x, int64_t count, int8_t* out) {
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const QuantizerLanes quantize_lanes(q);
  int64_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
    __m256i y[4];
    for_each<4>([&](auto v) NNCX_INLINE { y[v] = quantize_lanes(load_lanes(x + i + v * kLanes)); });
    const __m256i bytes = _mm256_permutevar8x32_epi32(narrow(y), order);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), bytes);
  }
  for (; i + kLanes <= count; i += kLanes) {
    store_bytes(quantize_lanes(load_lanes(x + i)), out + i);
  }
  for (; i < count; ++i) out[i] = quantize(q, load_float(x[i]));
}

// Four channels of 8 pixels: pixel i's bytes in 32-bit lane i.
template <class T>
NNCX_INLINE inline __m256i quantize_four(QuantizerLanes quantize, const T* x, int64_t stride_c) {
  const __m256i order = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  __m256i y[4];
  for_each<4>([&](auto c) NNCX_INLINE { y[c] = quantize(load_lanes(x + c * stride_c)); });
  return _mm256_shuffle_epi8(narrow(y), order);
}

// 8 pixels: `channels` neighbours in the output of each, which come `pixel` apart.
template <class T>
void quantize_columns(Int8Quantizer q, const T* x, int64_t stride_c, int64_t channels, int8_t* out,
                      int64_t pixel) {
  const QuantizerLanes quantize_lanes(q);
  int64_t c = 0;
  for (; c + 16 <= channels; c += 16) {
    __m256i y[4];
    for_each<4>([&](auto i) NNCX_INLINE {
      y[i] = quantize_four(quantize_lanes, x + (c + 4 * i) * stride_c, stride_c);
    });
    const __m256i low[2] = {_mm256_unpacklo_epi32(y[0], y[1]), _mm256_unpacklo_epi32(y[2], y[3])};
    const __m256i high[2] = {_mm256_unpackhi_epi32(y[0], y[1]), _mm256_unpackhi_epi32(y[2], y[3])};
    const __m256i pixels[4] = {
        _mm256_unpacklo_epi64(low[0], low[1]), _mm256_unpackhi_epi64(low[0], low[1]),
        _mm256_unpacklo_epi64(high[0], high[1]), _mm256_unpackhi_epi64(high[0], high[1])};
    for_each<4>([&](auto i) NNCX_INLINE {
      auto* first = reinterpret_cast<__m128i*>(out + c + i * pixel);
      auto* second = reinterpret_cast<__m128i*>(out + c + (i + 4) * pixel);
      _mm_storeu_si128(first, _mm256_castsi256_si128(pixels[i]));
      _mm_storeu_si128(second, _mm256_extracti128_si256(pixels[i], 1));
    });
  }
  for (; c + 4 <= channels; c += 4) {
    alignas(32) int32_t lanes[kLanes];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes),
                       quantize_four(quantize_lanes, x + c * stride_c, stride_c));
    for (int64_t i = 0; i < kLanes; ++i) std::memcpy(out + c + i * pixel, &lanes[i], 4);
  }
  for (; c < channels; ++c) {
    int8_t bytes[kLanes];
    store_bytes(quantize_lanes(load_lanes(x + c * stride_c)), bytes);
    for (int64_t i = 0; i < kLanes; ++i) out[c + i * pixel] = bytes[i];
  }
}

// `run` pixels of one image row, from pixel `begin` of the batch on.
template <class T>
void quantize_row(const QuantizeInt8Params& p, const T* x, int64_t begin, int64_t run) {
  int8_t* out = p.output + begin * p.channels;
  const bool one = !p.per_pixel;
  if (p.stride_c == 1 && one && (p.stride_w == p.channels || run == 1)) {
    return quantize_run(quantizer_of(p, begin), x, run * p.channels, out);
  }
  int64_t i = 0;
  if (p.stride_c == 1) {
    for (; i < run; ++i) {
      quantize_run(quantizer_of(p, begin + i), x + i * p.stride_w, p.channels,
                   out + i * p.channels);
    }
  } else if (p.stride_w == 1 && one) {
    for (; i + kLanes <= run; i += kLanes) {
      quantize_columns(quantizer_of(p, begin), x + i, p.stride_c, p.channels, out + i * p.channels,
                       p.channels);
    }
  }
  if (i < run) scalar::quantize_int8(p, begin + i, begin + run);
}

template <class T>
void quantize_pixels(const QuantizeInt8Params& p, int64_t begin, int64_t end) {
  while (begin < end) {
    const int64_t w = begin % p.width, h = begin / p.width % p.height;
    const int64_t n = begin / (p.width * p.height);
    const int64_t run = std::min(end - begin, p.width - w);
    const int64_t at = n * p.stride_n + h * p.stride_h + w * p.stride_w;
    quantize_row(p, static_cast<const T*>(p.input) + at, begin, run);
    begin += run;
  }
}

}  // namespace

void quantize_int8(const QuantizeInt8Params& p, int64_t begin, int64_t end) {
  switch (p.dtype) {
    case Dtype::float32:
      return quantize_pixels<float>(p, begin, end);
    case Dtype::float16:
      return quantize_pixels<Half>(p, begin, end);
    case Dtype::bfloat16:
      return quantize_pixels<BFloat16>(p, begin, end);
    case Dtype::float64:
      return scalar::quantize_int8(p, begin, end);
  }
}

}  // namespace nncx::avx2
