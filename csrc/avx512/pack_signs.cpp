// Comparisons give mask registers here: 16 bits as they are to be stored, or 16 lanes to change.
#include "pack_signs.h"

#include <immintrin.h>

#include "pack_runs.h"
#include "unroll.h"

namespace nncx::avx512 {
namespace {

// 16 numbers as float32. Widening keeps signs, zeros and NaN.
NNCX_INLINE inline __m512 load(const float* x) { return _mm512_loadu_ps(x); }
NNCX_INLINE inline __m512 load(const Half* x) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
}
NNCX_INLINE inline __m512 load(const BFloat16* x) {
  const __m512i wide =
      _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

template <class T>
NNCX_INLINE inline __mmask16 positive(const T* x) {
  return _mm512_cmp_ps_mask(load(x), _mm512_setzero_ps(), _CMP_GE_OQ);
}

struct Compare16 {
  static constexpr int64_t kPixels = 16;

  template <class T>
  NNCX_INLINE static inline void pack_64(const T* x, uint8_t* out) {
    for_each<4>([&](auto i) NNCX_INLINE {
      const __mmask16 bits = positive(x + 16 * i);
      std::memcpy(out + 2 * i, &bits, 2);
    });
  }

  template <int Vectors, class T>
  static void pack_columns(const T* x, int64_t stride_c, int64_t channels, uint8_t* out,
                           int64_t pixel_bytes) {
    __m512i words[Vectors];
    for_each<Vectors>([&](auto v) NNCX_INLINE { words[v] = _mm512_setzero_si512(); });
    __m512i bit = _mm512_set1_epi32(1);
    for (int64_t c = 0; c < channels; ++c, x += stride_c, bit = _mm512_slli_epi32(bit, 1)) {
      for_each<Vectors>([&](auto v) NNCX_INLINE {
        words[v] = _mm512_mask_or_epi32(words[v], positive(x + v * kPixels), words[v], bit);
      });
    }
    alignas(64) uint32_t lanes[Vectors * kPixels];
    for_each<Vectors>([&](auto v)
                          NNCX_INLINE { _mm512_store_si512(lanes + v * kPixels, words[v]); });
    for (int64_t i = 0; i < Vectors * kPixels; ++i)
      std::memcpy(out + i * pixel_bytes, &lanes[i], 4);
  }
};

}  // namespace

void pack_signs(const PackSignsParams& p, int64_t begin, int64_t end) {
  PackRuns<Compare16>::pack(p, begin, end);
}

}  // namespace nncx::avx512
