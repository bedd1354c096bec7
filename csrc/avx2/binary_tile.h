// The epilogue of a tile of counts, 8 outputs at a time down its rows; the AVX-512 path uses it too.
#pragma once

#include <immintrin.h>

#include <algorithm>

#include "binary_epilogue.h"
#include "binary_lines.h"
#include "unroll.h"

namespace nncx {
namespace {

constexpr int64_t kLanes = 8;

NNCX_INLINE inline void store_lanes(__m256 y, float* out) { _mm256_storeu_ps(out, y); }

NNCX_INLINE inline void store_lanes(__m256 y, Half* out) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_cvtps_ph(y, _MM_FROUND_TO_NEAREST_INT));
}

NNCX_INLINE inline void store_lanes(__m256 y, BFloat16* out) {
  alignas(32) float lanes[kLanes];
  _mm256_store_ps(lanes, y);
  for (int64_t i = 0; i < kLanes; ++i) store_float(lanes[i], out + i);
}

NNCX_INLINE inline void transpose(__m256 (&y)[kLanes]) {
  __m256 t[kLanes];
  for_each<4>([&](auto i) NNCX_INLINE {
    t[2 * i] = _mm256_unpacklo_ps(y[2 * i], y[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps(y[2 * i], y[2 * i + 1]);
  });
  __m256 u[kLanes];
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

// Popcounts of xor, of 8 outputs of row r -> dot products.
NNCX_INLINE inline __m256i dots(const BinaryRows& rows, int64_t r, const int32_t* counts) {
  const __m256i count = _mm256_load_si256(reinterpret_cast<const __m256i*>(counts));
  return _mm256_sub_epi32(_mm256_set1_epi32(rows.bits[r]), _mm256_slli_epi32(count, 1));
}

// 8 outputs, from `o` on, of all rows.
template <class T>
void store_numbers(const BinaryEpilogue& e, const BinaryRows& rows, int64_t o,
                   const int32_t* counts, int64_t width) {
  const __m256 scale = e.scale ? _mm256_loadu_ps(e.scale + o) : _mm256_set1_ps(1);
  const __m256 bias = e.bias ? _mm256_loadu_ps(e.bias + o) : _mm256_set1_ps(-0.0f);  // -0 + -0 = -0
  const auto number = [&](int64_t r) NNCX_INLINE {
    const __m256 scaled =
        _mm256_mul_ps(_mm256_cvtepi32_ps(dots(rows, r, counts + r * width)), scale);
    return _mm256_add_ps(_mm256_mul_ps(scaled, _mm256_set1_ps(rows.input_scale[r])), bias);
  };
  T* out = static_cast<T*>(e.output) + output_index(e, rows.first, o);
  if (e.channels_last) {
    for (int64_t r = 0; r < rows.count; ++r) store_lanes(number(r), out + r * e.channels);
    return;
  }
  for (int64_t r = 0; r < rows.count; r += kLanes, out += kLanes) {
    const int64_t count = std::min(kLanes, rows.count - r);
    __m256 y[kLanes];
    for_each<kLanes>([&](auto i)
                         NNCX_INLINE { y[i] = number(r + std::min<int64_t>(i, count - 1)); });
    transpose(y);
    if (count == kLanes) {
      for_each<kLanes>([&](auto i) NNCX_INLINE { store_lanes(y[i], out + i * e.image); });
    } else {
      for_each<kLanes>([&](auto i) NNCX_INLINE {
        T pixels[kLanes];
        store_lanes(y[i], pixels);
        std::memcpy(out + i * e.image, pixels, count * sizeof(T));
      });
    }
  }
}

// The same as signs, where they fill a byte.
inline void store_signs(const BinaryEpilogue& e, const BinaryRows& rows, int64_t o,
                        const int32_t* counts, int64_t width) {
  const __m256i threshold = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(e.threshold + o));
  int flip = 0;
  for (int64_t i = 0; i < kLanes; ++i) flip |= e.flip[o + i] << i;
  for (int64_t r = 0; r < rows.count; ++r) {
    const __m256i below = _mm256_cmpgt_epi32(threshold, dots(rows, r, counts + r * width));
    const int signs = ~_mm256_movemask_ps(_mm256_castsi256_ps(below)) ^ flip;
    *sign_byte(e, rows.first + r, o) = static_cast<uint8_t>(signs);
  }
}

inline bool fills_a_byte(const BinaryEpilogue& e, int64_t o) {
  const int64_t channel = sign_channel(e, o);
  return channel % 8 == 0 && channel + kLanes <= e.channels / e.out_groups;
}

// Rows x `outputs` dot products from channel `o` on, of counts[row][width].
inline void store_tile(const BinaryEpilogue& e, const BinaryRows& rows, int64_t o, int64_t outputs,
                       const int32_t* counts, int64_t width) {
  int64_t i = 0;
  for (; i + kLanes <= outputs; i += kLanes) {
    if (e.threshold && !fills_a_byte(e, o + i)) break;
    if (e.threshold) {
      store_signs(e, rows, o + i, counts + i, width);
    } else if (e.dtype == Dtype::float32) {
      store_numbers<float>(e, rows, o + i, counts + i, width);
    } else if (e.dtype == Dtype::float16) {
      store_numbers<Half>(e, rows, o + i, counts + i, width);
    } else {
      store_numbers<BFloat16>(e, rows, o + i, counts + i, width);
    }
  }
  for (; i < outputs; ++i) {
    for (int64_t r = 0; r < rows.count; ++r) {
      const int32_t dot = rows.bits[r] - 2 * counts[r * width + i];
      store_dot(e, dot, rows.input_scale[r], rows.first + r, o + i);
    }
  }
}

}  // namespace
}  // namespace nncx
