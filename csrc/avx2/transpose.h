// Between channels innermost and pixels innermost.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "unroll.h"

namespace nncx {
namespace {

NNCX_INLINE inline void transpose_8x8(__m256 (&y)[8]) {
  __m256 t[8];
  for_each<4>([&](auto i) NNCX_INLINE {
    t[2 * i] = _mm256_unpacklo_ps(y[2 * i], y[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps(y[2 * i], y[2 * i + 1]);
  });
  __m256 u[8];
  for_each<2>([&](auto i) NNCX_INLINE {
    u[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    u[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xEE);
    u[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    u[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xEE);
  });
  for_each<4>([&](auto i) NNCX_INLINE {
    y[i] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
    y[i + 4] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
  });
}

// to[j][i] = from[i][j]; strides in elements.
NNCX_INLINE inline void transpose_8x8(const float* from, int64_t from_stride, float* to,
                                      int64_t to_stride) {
  __m256 y[8];
  for_each<8>([&](auto i) NNCX_INLINE { y[i] = _mm256_loadu_ps(from + i * from_stride); });
  transpose_8x8(y);
  for_each<8>([&](auto i) NNCX_INLINE { _mm256_storeu_ps(to + i * to_stride, y[i]); });
}

}  // namespace
}  // namespace nncx
