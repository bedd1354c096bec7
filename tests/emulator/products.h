// The products of mma and wgmma: 32 bytes of a row with 32 bytes of a column.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

#include "dtype.h"

#ifdef __SSE4_1__
#include <immintrin.h>
#endif

namespace nncx::emulator {

// 256 bits: how many are set in both.
inline int dot_b1(const uint32_t* a, const uint32_t* b) {
  int sum = 0;
  for (int i = 0; i < 8; i += 2) {
    uint64_t x, y;
    std::memcpy(&x, a + i, 8);
    std::memcpy(&y, b + i, 8);
    sum += std::popcount(x & y);
  }
  return sum;
}

// 32 int8: the sum of products.
inline int dot_s8(const uint32_t* a, const uint32_t* b) {
#ifdef __SSE4_1__
  __m128i sums = _mm_setzero_si128();
  for (int i = 0; i < 8; i += 2) {
    const __m128i x = _mm_cvtepi8_epi16(_mm_loadu_si64(a + i));
    const __m128i y = _mm_cvtepi8_epi16(_mm_loadu_si64(b + i));
    sums = _mm_add_epi32(sums, _mm_madd_epi16(x, y));
  }
  sums = _mm_add_epi32(sums, _mm_srli_si128(sums, 8));
  return _mm_cvtsi128_si32(sums) + _mm_extract_epi32(sums, 1);
#else
  const auto* x = reinterpret_cast<const int8_t*>(a);
  const auto* y = reinterpret_cast<const int8_t*>(b);
  int sum = 0;
  for (int i = 0; i < 32; ++i) sum += x[i] * y[i];
  return sum;
#endif
}

// 16 words of 16 bits: the sum of products, in a precision that keeps every one of them.
template <class T>
double dot_16_bits(const uint32_t* a, const uint32_t* b) {
  double sum = 0;
  for (int i = 0; i < 16; ++i) {
    const auto number = [&](const uint32_t* words) {
      return load_float(T{static_cast<uint16_t>(words[i / 2] >> 16 * (i % 2))});
    };
    sum += double{number(a)} * number(b);
  }
  return sum;
}

}  // namespace nncx::emulator
