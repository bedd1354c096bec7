// The epilogue of a tile of int32 sums, 8 outputs at a time; the AVX-512 path uses it too.
#pragma once

#include <immintrin.h>

#include "int8_epilogue.h"
#include "int8_rows.h"
#include "tile.h"

namespace nncx {
namespace {

NNCX_INLINE inline __m256 activate_lanes(Activation activation, __m256 y) {
  if (activation == Activation::none) return y;
  // Where y is NaN, max and min give their second operand.
  y = _mm256_max_ps(_mm256_setzero_ps(), y);
  return activation == Activation::relu6 ? _mm256_min_ps(_mm256_set1_ps(6), y) : y;
}

NNCX_INLINE inline __m256 residual_lanes(const Int8Epilogue& e, int64_t index) {
  if (e.residual_is_int8) {
    const auto* from = static_cast<const int8_t*>(e.residual) + index;
    const __m256i q = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
    const __m256i centred = _mm256_sub_epi32(q, _mm256_set1_epi32(e.scalars.residual_zero_point));
    return _mm256_mul_ps(_mm256_cvtepi32_ps(centred), _mm256_set1_ps(e.scalars.residual_scale));
  }
  switch (e.residual_dtype) {
    case Dtype::float16:
      return load_lanes(static_cast<const Half*>(e.residual) + index);
    case Dtype::bfloat16:
      return load_lanes(static_cast<const BFloat16*>(e.residual) + index);
    default:
      return load_lanes(static_cast<const float*>(e.residual) + index);
  }
}

// The first `count` of them; no more are read.
NNCX_INLINE inline __m256 residual_lanes(const Int8Epilogue& e, int64_t index, int64_t count) {
  if (count == kLanes) return residual_lanes(e, index);
  alignas(32) float lanes[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = residual_at(e, index + i);
  return _mm256_load_ps(lanes);
}

// The epilogue by value: a store of bytes might change what a reference refers to.
template <class T>
struct Int8Tile {
  const Int8Epilogue e;
  const Int8Rows& rows;
  int64_t o;
  const int32_t* sums;
  int64_t width;

  NNCX_INLINE __m256 numbers(int64_t r, int64_t i) const {
    const auto* from = reinterpret_cast<const __m256i*>(sums + r * width + i);
    __m256 y = _mm256_cvtepi32_ps(_mm256_load_si256(from));
    if (e.scale) y = _mm256_mul_ps(y, _mm256_loadu_ps(e.scale + o + i));
    y = _mm256_mul_ps(y, _mm256_set1_ps(rows.input_scale[r]));
    return e.bias ? _mm256_add_ps(y, _mm256_loadu_ps(e.bias + o + i)) : y;
  }

  NNCX_INLINE void store(__m256 y, int64_t index, int64_t count) const {
    if (e.residual) y = _mm256_add_ps(y, residual_lanes(e, index, count));
    y = activate_lanes(e.activation, y);
    if constexpr (std::is_same_v<T, int8_t>) {
      const __m256i q = QuantizerLanes(e.scalars.quantizer)(y);
      int8_t* out = static_cast<int8_t*>(e.output) + index;
      if (count == kLanes) return store_bytes(q, out);
      int8_t all[kLanes];
      store_bytes(q, all);
      std::memcpy(out, all, count);
    } else {
      store_lanes(y, static_cast<T*>(e.output) + index, count);
    }
  }
};

// `outputs` is a multiple of 8.
template <class T>
void store_sums(const Int8Epilogue& e, const Int8Rows& rows, int64_t o, int64_t outputs,
                const int32_t* sums, int64_t width) {
  const Int8Tile<T> tile{e, rows, o, sums, width};
  const int64_t index = output_index(e, rows.first, o);
  if (e.channels_last) return store_rows(tile, rows.count, outputs, index, e.channels);
  store_columns(tile, rows.count, outputs, index, e.image);
}

// Rows x `outputs` sums from channel `o` on, of sums[row][width].
inline void store_int8_tile(const Int8Epilogue& e, const Int8Rows& rows, int64_t o, int64_t outputs,
                            const int32_t* sums, int64_t width) {
  int64_t i = outputs / kLanes * kLanes;
  const auto store = e.output_is_int8            ? store_sums<int8_t>
                     : e.dtype == Dtype::float32 ? store_sums<float>
                     : e.dtype == Dtype::float16 ? store_sums<Half>
                                                 : store_sums<BFloat16>;
  store(e, rows, o, i, sums, width);
  for (; i < outputs; ++i) {
    for (int64_t r = 0; r < rows.count; ++r) {
      store_sum(e, sums[r * width + i], rows.first + r, o + i);
    }
  }
}

// Whether what leaves are bytes with channels innermost, from nothing but sum, scale and bias, and
// the activation is but a bound of the quantizer.
inline bool is_plain_int8(const Int8Epilogue& e) {
  return e.output_is_int8 && e.channels_last && !e.input_scale && !e.residual &&
         e.scalars.quantizer.inverse_scale > 0;
}

// Of such an epilogue, rows of 16 outputs from channel `o` on. Rounding changes no order, so that
// clamping comes first, to the activation's bounds too.
inline void store_16_bytes(const Int8Epilogue& e, const Int8Rows& rows, int64_t o,
                           const int32_t* sums, int64_t width) {
  const Int8Quantizer q = e.scalars.quantizer;
  const float low = e.activation == Activation::none ? lowest(q) : 0;
  const float high =
      e.activation == Activation::relu6 ? std::min(6 * q.inverse_scale, highest(q)) : highest(q);
  const __m256 lows = _mm256_set1_ps(low), highs = _mm256_set1_ps(high);
  const __m256 inverse_scale = _mm256_set1_ps(q.inverse_scale);
  const __m256i zero_point = _mm256_set1_epi16(static_cast<int16_t>(q.zero_point));
  __m256 scale[2], bias[2];
  for_each<2>([&](auto i) NNCX_INLINE {
    scale[i] = e.scale ? _mm256_loadu_ps(e.scale + o + i * kLanes) : _mm256_set1_ps(1);
    bias[i] = e.bias ? _mm256_loadu_ps(e.bias + o + i * kLanes) : _mm256_setzero_ps();
  });
  int8_t* out = static_cast<int8_t*>(e.output) + output_index(e, rows.first, o);
  const int64_t step = e.channels;
  for (const int32_t* end = sums + rows.count * width; sums < end; sums += width, out += step) {
    __m256i y[2];
    for_each<2>([&](auto i) NNCX_INLINE {
      const auto* from = reinterpret_cast<const __m256i*>(sums + i * kLanes);
      __m256 x = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_load_si256(from)), scale[i]);
      x = _mm256_mul_ps(_mm256_add_ps(x, bias[i]), inverse_scale);
      x = _mm256_and_ps(x, _mm256_cmp_ps(x, x, _CMP_ORD_Q));
      y[i] = _mm256_cvtps_epi32(_mm256_min_ps(_mm256_max_ps(x, lows), highs));
    });
    const __m256i words = _mm256_add_epi16(_mm256_packs_epi32(y[0], y[1]), zero_point);
    const __m128i bytes =
        _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_shuffle_epi32(bytes, 0xD8));
  }
}

}  // namespace
}  // namespace nncx
