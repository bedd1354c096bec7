// The epilogue of a tile of counts, 8 outputs at a time; the AVX-512 path uses it too.
#pragma once

#include <immintrin.h>

#include <algorithm>

#include "binary_epilogue.h"
#include "binary_rows.h"
#include "tile.h"
#include "unroll.h"

namespace nncx {
namespace {

// Popcounts of xor, of 8 outputs of row r -> dot products.
NNCX_INLINE inline __m256i dots(const BinaryRows& rows, int64_t r, const int32_t* counts) {
  const __m256i count = _mm256_load_si256(reinterpret_cast<const __m256i*>(counts));
  return _mm256_sub_epi32(_mm256_set1_epi32(rows.bits[r]), _mm256_slli_epi32(count, 1));
}

// 8 outputs, from `o` on, of row r.
NNCX_INLINE inline __m256 numbers(const BinaryEpilogue& e, const BinaryRows& rows, int64_t r,
                                  int64_t o, const int32_t* counts) {
  __m256 y = _mm256_cvtepi32_ps(dots(rows, r, counts));
  if (e.scale) y = _mm256_mul_ps(y, _mm256_loadu_ps(e.scale + o));
  y = _mm256_mul_ps(y, _mm256_set1_ps(rows.input_scale[r]));
  return e.bias ? _mm256_add_ps(y, _mm256_loadu_ps(e.bias + o)) : y;
}

template <class T>
struct BinaryTileOfNumbers {
  const BinaryEpilogue& e;
  const BinaryRows& rows;
  int64_t o;
  const int32_t* counts;
  int64_t width;

  NNCX_INLINE __m256 numbers(int64_t r, int64_t i) const {
    return nncx::numbers(e, rows, r, o + i, counts + r * width + i);
  }

  NNCX_INLINE void store(__m256 y, int64_t index, int64_t count) const {
    store_lanes(y, static_cast<T*>(e.output) + index, count);
  }
};

// `outputs` is a multiple of 8.
template <class T>
void store_numbers(const BinaryEpilogue& e, const BinaryRows& rows, int64_t o, int64_t outputs,
                   const int32_t* counts, int64_t width) {
  const BinaryTileOfNumbers<T> tile{e, rows, o, counts, width};
  const int64_t index = output_index(e, rows.first, o);
  if (e.channels_last) return store_rows(tile, rows.count, outputs, index, e.channels);
  store_columns(tile, rows.count, outputs, index, e.image);
}

// 8 outputs as signs, which fill a byte, of all rows.
inline void store_signs(const BinaryEpilogue& e, const BinaryRows& rows, int64_t o,
                        const int32_t* counts, int64_t width) {
  const __m256i threshold = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(e.threshold + o));
  int flip = 0;
  for (int64_t i = 0; i < kLanes; ++i) flip |= e.flip[o + i] << i;
  const int64_t pixel_bytes = e.out_groups * packed_bytes(e.channels / e.out_groups);
  uint8_t* out = sign_byte(e, rows.first, o);
  for (int64_t r = 0; r < rows.count; ++r, out += pixel_bytes) {
    const __m256i below = _mm256_cmpgt_epi32(threshold, dots(rows, r, counts + r * width));
    const int signs = ~_mm256_movemask_ps(_mm256_castsi256_ps(below)) ^ flip;
    *out = static_cast<uint8_t>(signs);
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
  if (e.threshold) {
    for (; i + kLanes <= outputs && fills_a_byte(e, o + i); i += kLanes) {
      store_signs(e, rows, o + i, counts + i, width);
    }
  } else {
    i = outputs / kLanes * kLanes;
    const auto store = e.dtype == Dtype::float32   ? store_numbers<float>
                       : e.dtype == Dtype::float16 ? store_numbers<Half>
                                                   : store_numbers<BFloat16>;
    store(e, rows, o, i, counts, width);
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
