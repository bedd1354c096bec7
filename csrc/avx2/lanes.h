// Eight numbers at a time, between float32 and the other formats; the AVX-512 path uses them too.
#pragma once

#include <immintrin.h>

#include "dtype.h"
#include "quantize_int8.h"
#include "unroll.h"

namespace nncx {
namespace {

constexpr int64_t kLanes = 8;

NNCX_INLINE inline __m256 load_lanes(const float* from) { return _mm256_loadu_ps(from); }

NNCX_INLINE inline __m256 load_lanes(const Half* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}

NNCX_INLINE inline __m256 load_lanes(const BFloat16* from) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

NNCX_INLINE inline void store_lanes(__m256 y, float* out) { _mm256_storeu_ps(out, y); }

NNCX_INLINE inline void store_lanes(__m256 y, Half* out) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_cvtps_ph(y, _MM_FROUND_TO_NEAREST_INT));
}

NNCX_INLINE inline void store_lanes(__m256 y, BFloat16* out) {  // as store_float rounds
  const __m256i bits = _mm256_castps_si256(y), high = _mm256_srli_epi32(bits, 16);
  const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
  const __m256i half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, half), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(y, y, _CMP_UNORD_Q));
  const __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
  const __m256i words = _mm256_blendv_epi8(rounded, quiet, nan);
  _mm_storeu_si128(
      reinterpret_cast<__m128i*>(out),
      _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}

// quantize() of 8 numbers. By value: a store of bytes might change what a reference refers to.
struct QuantizerLanes {
  __m256 inverse_scale, lowest, highest;
  __m256i zero_point;

  NNCX_INLINE explicit QuantizerLanes(Int8Quantizer q)
      : inverse_scale(_mm256_set1_ps(q.inverse_scale)),
        lowest(_mm256_set1_ps(nncx::lowest(q))),
        highest(_mm256_set1_ps(nncx::highest(q))),
        zero_point(_mm256_set1_epi32(q.zero_point)) {}

  // 32-bit integers in the range of int8.
  NNCX_INLINE __m256i operator()(__m256 x) const {
    __m256 y = _mm256_mul_ps(x, inverse_scale);
    y = _mm256_and_ps(y, _mm256_cmp_ps(y, y, _CMP_ORD_Q));
    y = _mm256_round_ps(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    y = _mm256_min_ps(_mm256_max_ps(y, lowest), highest);
    return _mm256_add_epi32(_mm256_cvtps_epi32(y), zero_point);
  }
};

NNCX_INLINE inline void store_bytes(__m256i x, int8_t* out) {
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(out), _mm_packs_epi16(words, words));
}

}  // namespace
}  // namespace nncx
