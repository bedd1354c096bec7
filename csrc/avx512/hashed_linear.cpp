#include "hashed_linear.h"

#include <immintrin.h>

#include "hashed_tiles.h"

namespace nncx::avx512 {
namespace {

struct V {
  using Floats = __m512;
  using Words = __m512i;
  static constexpr int kLanes = 16;
  static constexpr int kRows = 12;  // sums enough to hide the latency of FMA

  NNCX_INLINE static Floats load(const float* x) { return _mm512_loadu_ps(x); }
  NNCX_INLINE static void store(float* to, Floats x) { _mm512_storeu_ps(to, x); }
  NNCX_INLINE static Floats broadcast(const float* x) { return _mm512_set1_ps(*x); }
  NNCX_INLINE static Floats zero() { return _mm512_setzero_ps(); }
  NNCX_INLINE static Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }

  NNCX_INLINE static Words words(uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
  NNCX_INLINE static Words load_words(const uint32_t* x) { return _mm512_load_si512(x); }
  NNCX_INLINE static void store_words(uint32_t* to, Words x) { _mm512_store_si512(to, x); }
  NNCX_INLINE static Words add(Words a, Words b) { return _mm512_add_epi32(a, b); }
  NNCX_INLINE static Words multiply(Words a, Words b) { return _mm512_mullo_epi32(a, b); }
  NNCX_INLINE static Words xor_shifted(Words x, int by) {
    return _mm512_xor_si512(x, _mm512_srli_epi32(x, by));
  }
  // The upper halves of the products; `_mm512_mul_epu32` multiplies every other lane.
  NNCX_INLINE static Words multiply_high(Words a, Words b) {
    const __m512i even = _mm512_srli_epi64(_mm512_mul_epu32(a, b), 32);
    return _mm512_mask_blend_epi32(0xAAAA, even, _mm512_mul_epu32(_mm512_srli_epi64(a, 32), b));
  }
  NNCX_INLINE static Floats look_up(const float* buckets, Words places) {
    const Floats value = _mm512_i32gather_ps(_mm512_srli_epi32(places, 1), buckets, sizeof(float));
    return _mm512_xor_ps(value, _mm512_castsi512_ps(_mm512_slli_epi32(places, 31)));
  }
};

}  // namespace

int64_t hashed_linear_scratch_bytes(const HashedLinearParams&) { return kHashedScratchBytes; }

void hashed_linear(const HashedLinearParams& p, const Conv2dTile& tile, uint8_t* scratch) {
  run_linear<V>(p, tile, scratch);
}

void hashed_weight(const HashedWeight& w, int64_t begin, int64_t end, float* values) {
  write_weight<V>(w, begin, end, values);
}

void hashed_bucket_sums(const HashedWeight& w, const float* values, float* sums) {
  sum_buckets<V>(w, values, sums);
}

}  // namespace nncx::avx512
