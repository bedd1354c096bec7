// A block of outputs is one vector. The loops are those of depthwise_tiles.h.
#include "depthwise_conv2d.h"

#include <immintrin.h>

#include "avx2/float_vector.h"
#include "depthwise_tiles.h"

namespace nncx::avx512 {
namespace {

struct V {
  using Floats = __m512;
  static constexpr int kLanes = 16;
  static constexpr int kRows = 2;  // times 4 sums, 9 weights and inputs: 32 registers
  static constexpr int kColumns = 4;
  static constexpr int kLines = 8;

  NNCX_INLINE static Floats load(const float* x) { return _mm512_loadu_ps(x); }
  NNCX_INLINE static Floats broadcast(const float* x) { return _mm512_set1_ps(*x); }
  NNCX_INLINE static Floats fill(float x) { return _mm512_set1_ps(x); }
  NNCX_INLINE static Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
  NNCX_INLINE static Floats clamp(Floats y, Floats low, Floats high) {
    return _mm512_min_ps(high, _mm512_max_ps(low, y));
  }

  using Narrow = FloatVector;
  using Mask = __mmask16;
  NNCX_INLINE static Mask inside(int64_t first, int64_t end) {
    const auto before = [](int64_t lane) NNCX_INLINE {
      return (1u << std::clamp<int64_t>(lane, 0, kLanes)) - 1;
    };
    return static_cast<Mask>(before(end - first) & ~before(-first));
  }
  NNCX_INLINE static Floats load(const float* x, Mask mask) {
    return _mm512_maskz_loadu_ps(mask, x);
  }
  NNCX_INLINE static Floats evens(Floats a, Floats b) { return _mm512_shuffle_ps(a, b, 0x88); }
  NNCX_INLINE static Floats odds(Floats a, Floats b) { return _mm512_shuffle_ps(a, b, 0xDD); }
  NNCX_INLINE static Floats in_order(Floats y) {
    return _mm512_castpd_ps(
        _mm512_permutexvar_pd(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), _mm512_castps_pd(y)));
  }
  NNCX_INLINE static void store(Floats y, float* out) { _mm512_storeu_ps(out, y); }
  NNCX_INLINE static void store(Floats y, float* out, int64_t count) {
    _mm512_mask_storeu_ps(out, first(count), y);
  }
  NNCX_INLINE static void store(Floats y, Half* out) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), halves(y));
  }
  NNCX_INLINE static void store(Floats y, Half* out, int64_t count) {
    _mm256_mask_storeu_epi16(out, first(count), halves(y));
  }
  NNCX_INLINE static void store(Floats y, BFloat16* out) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), bfloats(y));
  }
  NNCX_INLINE static void store(Floats y, BFloat16* out, int64_t count) {
    _mm256_mask_storeu_epi16(out, first(count), bfloats(y));
  }

 private:
  NNCX_INLINE static __mmask16 first(int64_t count) {
    return static_cast<__mmask16>((1u << count) - 1);
  }
  NNCX_INLINE static __m256i halves(Floats y) {
    return _mm512_cvtps_ph(y, _MM_FROUND_TO_NEAREST_INT);
  }
  // store_float's rounding.
  NNCX_INLINE static __m256i bfloats(Floats y) {
    const __m512i bits = _mm512_castps_si512(y), high = _mm512_srli_epi32(bits, 16);
    const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
    const __m512i half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, half), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(y, y, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_or_epi32(rounded, nan, high, _mm512_set1_epi32(0x40)));
  }
};

}  // namespace

int64_t depthwise_conv2d_scratch_bytes(const DepthwiseConv2dParams& p) {
  return scratch_bytes<V>(p);
}

void depthwise_conv2d(const DepthwiseConv2dParams& p, const Conv2dTile& tile, uint8_t* scratch) {
  run_depthwise<V>(p, tile, scratch);
}

}  // namespace nncx::avx512
