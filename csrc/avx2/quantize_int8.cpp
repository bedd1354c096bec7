// Two layouts have a vector loop: channels innermost (rows, channels_last), where neighbours stay
// neighbours, and pixels innermost (NCHW), where squares of 16 channels x 8 pixels are transposed as
// bytes. Other strides take the scalar loop. What becomes of a number is a `Rule`: of it, of 8, or of
// pixels by the scalar loop.
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

struct Rounding {
  using Lanes = QuantizerLanes;
  static constexpr auto scalar = nncx::scalar::quantize_int8;
  Int8Quantizer quantizer;

  Rounding(const QuantizeInt8Params& p, int64_t pixel) : quantizer(quantizer_of(p, pixel)) {}

  NNCX_INLINE Lanes lanes() const { return Lanes(quantizer); }

  template <class T>
  NNCX_INLINE int8_t operator()(T x) const {
    return quantize(quantizer, load_float(x));
  }
};

struct Sign {
  struct Lanes {
    NNCX_INLINE __m256i operator()(__m256 x) const {
      const __m256 negative = _mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_NGE_UQ);
      return _mm256_or_si256(_mm256_castps_si256(negative), _mm256_set1_epi32(1));
    }
  };
  static constexpr auto scalar = nncx::scalar::sign_int8;

  Sign(const QuantizeInt8Params&, int64_t) {}

  NNCX_INLINE Lanes lanes() const { return {}; }

  template <class T>
  NNCX_INLINE int8_t operator()(T x) const {
    return is_positive(x) ? 1 : -1;
  }
};

template <class Rule, class T>
void convert_run(Rule rule, const T* x, int64_t count, int8_t* out) {
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const auto lanes = rule.lanes();
  int64_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
    __m256i y[4];
    for_each<4>([&](auto v) NNCX_INLINE { y[v] = lanes(load_lanes(x + i + v * kLanes)); });
    const __m256i bytes = _mm256_permutevar8x32_epi32(narrow(y), order);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), bytes);
  }
  for (; i + kLanes <= count; i += kLanes) {
    store_bytes(lanes(load_lanes(x + i)), out + i);
  }
  for (; i < count; ++i) out[i] = rule(x[i]);
}

// Four channels of 8 pixels: pixel i's bytes in 32-bit lane i.
template <class Lanes, class T>
NNCX_INLINE inline __m256i convert_four(Lanes lanes, const T* x, int64_t stride_c) {
  const __m256i order = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  __m256i y[4];
  for_each<4>([&](auto c) NNCX_INLINE { y[c] = lanes(load_lanes(x + c * stride_c)); });
  return _mm256_shuffle_epi8(narrow(y), order);
}

// 8 pixels: `channels` neighbours in the output of each, which come `pixel` apart.
template <class Lanes, class T>
void convert_columns(Lanes lanes, const T* x, int64_t stride_c, int64_t channels, int8_t* out,
                     int64_t pixel) {
  int64_t c = 0;
  for (; c + 16 <= channels; c += 16) {
    __m256i y[4];
    for_each<4>([&](auto i) NNCX_INLINE {
      y[i] = convert_four(lanes, x + (c + 4 * i) * stride_c, stride_c);
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
    alignas(32) int32_t words[kLanes];
    _mm256_store_si256(reinterpret_cast<__m256i*>(words),
                       convert_four(lanes, x + c * stride_c, stride_c));
    for (int64_t i = 0; i < kLanes; ++i) std::memcpy(out + c + i * pixel, &words[i], 4);
  }
  for (; c < channels; ++c) {
    int8_t bytes[kLanes];
    store_bytes(lanes(load_lanes(x + c * stride_c)), bytes);
    for (int64_t i = 0; i < kLanes; ++i) out[c + i * pixel] = bytes[i];
  }
}

// `run` pixels of one image row, from pixel `begin` of the batch on.
template <class Rule, class T>
void convert_row(const QuantizeInt8Params& p, const T* x, int64_t begin, int64_t run) {
  int8_t* out = p.output + begin * p.channels;
  const bool one = !p.per_pixel;
  if (p.stride_c == 1 && one && (p.stride_w == p.channels || run == 1)) {
    return convert_run(Rule(p, begin), x, run * p.channels, out);
  }
  int64_t i = 0;
  if (p.stride_c == 1) {
    for (; i < run; ++i) {
      convert_run(Rule(p, begin + i), x + i * p.stride_w, p.channels, out + i * p.channels);
    }
  } else if (p.stride_w == 1 && one) {
    for (; i + kLanes <= run; i += kLanes) {
      convert_columns(Rule(p, begin).lanes(), x + i, p.stride_c, p.channels, out + i * p.channels,
                      p.channels);
    }
  }
  if (i < run) Rule::scalar(p, begin + i, begin + run);
}

template <class Rule, class T>
void convert_pixels(const QuantizeInt8Params& p, int64_t begin, int64_t end) {
  while (begin < end) {
    const int64_t w = begin % p.width, h = begin / p.width % p.height;
    const int64_t n = begin / (p.width * p.height);
    const int64_t run = std::min(end - begin, p.width - w);
    const int64_t at = n * p.stride_n + h * p.stride_h + w * p.stride_w;
    convert_row<Rule>(p, static_cast<const T*>(p.input) + at, begin, run);
    begin += run;
  }
}

template <class Rule>
void convert(const QuantizeInt8Params& p, int64_t begin, int64_t end) {
  switch (p.dtype) {
    case Dtype::float32:
      return convert_pixels<Rule, float>(p, begin, end);
    case Dtype::float16:
      return convert_pixels<Rule, Half>(p, begin, end);
    case Dtype::bfloat16:
      return convert_pixels<Rule, BFloat16>(p, begin, end);
    case Dtype::float64:
      return Rule::scalar(p, begin, end);
  }
}

}  // namespace

void quantize_int8(const QuantizeInt8Params& p, int64_t begin, int64_t end) {
  convert<Rounding>(p, begin, end);
}

void sign_int8(const QuantizeInt8Params& p, int64_t begin, int64_t end) {
  convert<Sign>(p, begin, end);
}

}  // namespace nncx::avx2
