// Between channels innermost and pixels innermost.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "unroll.h"

namespace nncx::avx2 {
namespace {

// to[j][i] = from[i][j], 8 x 8; strides in elements.
NNCX_INLINE inline void transpose_8x8(const float* from, int64_t from_stride, float* to,
                                      int64_t to_stride) {
  __m256 quarter[8], half[8];
  // Row i of the left four columns beside row i + 4, then of the right four.
  for_each<4>([&](auto i) NNCX_INLINE {
    for_each<2>([&](auto side) NNCX_INLINE {
      const float* x = from + i * from_stride + 4 * side;
      quarter[2 * i + side] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(x)),
                                                   _mm_loadu_ps(x + 4 * from_stride), 1);
    });
  });
  for_each<2>([&](auto side) NNCX_INLINE {
    half[side] = _mm256_unpacklo_ps(quarter[side], quarter[2 + side]);
    half[2 + side] = _mm256_unpackhi_ps(quarter[side], quarter[2 + side]);
    half[4 + side] = _mm256_unpacklo_ps(quarter[4 + side], quarter[6 + side]);
    half[6 + side] = _mm256_unpackhi_ps(quarter[4 + side], quarter[6 + side]);
    float* row = to + 4 * side * to_stride;
    _mm256_storeu_ps(row, _mm256_shuffle_ps(half[side], half[4 + side], 0x44));
    _mm256_storeu_ps(row + to_stride, _mm256_shuffle_ps(half[side], half[4 + side], 0xEE));
    _mm256_storeu_ps(row + 2 * to_stride, _mm256_shuffle_ps(half[2 + side], half[6 + side], 0x44));
    _mm256_storeu_ps(row + 3 * to_stride, _mm256_shuffle_ps(half[2 + side], half[6 + side], 0xEE));
  });
}

}  // namespace
}  // namespace nncx::avx2
