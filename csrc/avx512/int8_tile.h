// The epilogue of a tile of int32 sums with channels innermost, 16 outputs at a time; what lies beyond
// the last output is masked.
#pragma once

#include <immintrin.h>

#include "avx2/int8_tile.h"

namespace nncx {
namespace {

NNCX_INLINE inline __m512 activate_lanes(Activation activation, __m512 y) {
  if (activation == Activation::none) return y;
  y = _mm512_max_ps(_mm512_setzero_ps(), y);  // NaN stays, as on AVX2
  return activation == Activation::relu6 ? _mm512_min_ps(_mm512_set1_ps(6), y) : y;
}

NNCX_INLINE inline __m512 residual_lanes(const Int8Epilogue& e, int64_t index, __mmask16 there) {
  if (e.residual_is_int8) {
    const auto* from = static_cast<const int8_t*>(e.residual) + index;
    const __m512i q = _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(there, from));
    const __m512i centred = _mm512_sub_epi32(q, _mm512_set1_epi32(e.scalars.residual_zero_point));
    return _mm512_mul_ps(_mm512_cvtepi32_ps(centred), _mm512_set1_ps(e.scalars.residual_scale));
  }
  if (e.residual_dtype == Dtype::float32) {
    return _mm512_maskz_loadu_ps(there, static_cast<const float*>(e.residual) + index);
  }
  const auto* from = static_cast<const uint16_t*>(e.residual) + index;
  const __m256i bits = _mm256_maskz_loadu_epi16(there, from);
  if (e.residual_dtype == Dtype::float16) return _mm512_cvtph_ps(bits);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

NNCX_INLINE inline void store_lanes(__m512 y, float* out, __mmask16 there) {
  _mm512_mask_storeu_ps(out, there, y);
}

NNCX_INLINE inline void store_lanes(__m512 y, Half* out, __mmask16 there) {
  _mm256_mask_storeu_epi16(out, there, _mm512_cvtps_ph(y, _MM_FROUND_TO_NEAREST_INT));
}

// As store_float() rounds.
NNCX_INLINE inline void store_lanes(__m512 y, BFloat16* out, __mmask16 there) {
  const __m512i bits = _mm512_castps_si512(y);
  const __m512i high = _mm512_srli_epi32(bits, 16);
  const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
  const __m512i half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, half), 16);
  const __m512i nan = _mm512_or_si512(high, _mm512_set1_epi32(0x40));
  const __mmask16 is_nan = _mm512_cmp_ps_mask(y, y, _CMP_UNORD_Q);
  const __m512i words = _mm512_mask_mov_epi32(rounded, is_nan, nan);
  _mm256_mask_storeu_epi16(out, there, _mm512_cvtepi32_epi16(words));
}

NNCX_INLINE inline __m512i quantize_lanes(Int8Quantizer q, __m512 x) {
  __m512 y = _mm512_mul_ps(x, _mm512_set1_ps(q.inverse_scale));
  y = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(y, y, _CMP_ORD_Q), y);
  y = _mm512_roundscale_ps(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  y = _mm512_max_ps(y, _mm512_set1_ps(lowest(q)));
  y = _mm512_min_ps(y, _mm512_set1_ps(highest(q)));
  return _mm512_add_epi32(_mm512_cvtps_epi32(y), _mm512_set1_epi32(q.zero_point));
}

// What follows the sum of sum, bias and residual.
template <class T>
NNCX_INLINE inline void finish_lanes(const Int8Epilogue& e, __m512 y, T* out, __mmask16 there) {
  y = activate_lanes(e.activation, y);
  if constexpr (std::is_same_v<T, int8_t>) {
    _mm_mask_storeu_epi8(out, there, _mm512_cvtepi32_epi8(quantize_lanes(e.scalars.quantizer, y)));
  } else {
    store_lanes(y, out, there);
  }
}

// The epilogue by value: a store of bytes might change what a reference refers to.
template <class T>
void store_rows_of_16(const Int8Epilogue e, const Int8Rows& rows, int64_t o, int64_t outputs,
                      const int32_t* sums, int64_t width) {
  constexpr int64_t kSixteen = 16;
  const int64_t first = output_index(e, rows.first, o);
  for (int64_t i = 0; i < outputs; i += kSixteen) {
    const auto there = static_cast<__mmask16>((1u << std::min(kSixteen, outputs - i)) - 1);
    const __m512 scale =
        e.scale ? _mm512_maskz_loadu_ps(there, e.scale + o + i) : _mm512_set1_ps(1);
    const __m512 bias = e.bias ? _mm512_maskz_loadu_ps(there, e.bias + o + i) : _mm512_setzero_ps();
    for (int64_t r = 0; r < rows.count; ++r) {
      const int64_t index = first + r * e.channels + i;
      __m512 y = _mm512_cvtepi32_ps(_mm512_load_si512(sums + r * width + i));
      y = _mm512_mul_ps(y, scale);
      if (e.input_scale) y = _mm512_mul_ps(y, _mm512_set1_ps(rows.input_scale[r]));
      if (e.bias) y = _mm512_add_ps(y, bias);
      if (e.residual) y = _mm512_add_ps(y, residual_lanes(e, index, there));
      finish_lanes(e, y, static_cast<T*>(e.output) + index, there);
    }
  }
}

inline void store_int8_tile_of_16(const Int8Epilogue& e, const Int8Rows& rows, int64_t o,
                                  int64_t outputs, const int32_t* sums, int64_t width) {
  if (!e.channels_last) return store_int8_tile(e, rows, o, outputs, sums, width);
  const auto store = e.output_is_int8            ? store_rows_of_16<int8_t>
                     : e.dtype == Dtype::float32 ? store_rows_of_16<float>
                     : e.dtype == Dtype::float16 ? store_rows_of_16<Half>
                                                 : store_rows_of_16<BFloat16>;
  store(e, rows, o, outputs, sums, width);
}

}  // namespace
}  // namespace nncx
