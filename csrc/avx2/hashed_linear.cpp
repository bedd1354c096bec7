#include "hashed_linear.h"

#include <immintrin.h>

#include "hashed_tiles.h"

namespace nncx::avx2 {
namespace {

struct V {
  using Floats = __m256;
  using Words = __m256i;
  static constexpr int kLanes = 8;
  static constexpr int kRows = 6;  // times 2 vectors of sums, 2 of weights, 1 of activations

  NNCX_INLINE static Floats load(const float* x) { return _mm256_loadu_ps(x); }
  NNCX_INLINE static void store(float* to, Floats x) { _mm256_storeu_ps(to, x); }
  NNCX_INLINE static Floats broadcast(const float* x) { return _mm256_broadcast_ss(x); }
  NNCX_INLINE static Floats zero() { return _mm256_setzero_ps(); }
  NNCX_INLINE static Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }

  NNCX_INLINE static Words words(uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); }
  NNCX_INLINE static Words load_words(const uint32_t* x) {
    return _mm256_load_si256(reinterpret_cast<const __m256i*>(x));
  }
  NNCX_INLINE static void store_words(uint32_t* to, Words x) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(to), x);
  }
  NNCX_INLINE static Words add(Words a, Words b) { return _mm256_add_epi32(a, b); }
  NNCX_INLINE static Words multiply(Words a, Words b) { return _mm256_mullo_epi32(a, b); }
  NNCX_INLINE static Words xor_shifted(Words x, int by) {
    return _mm256_xor_si256(x, _mm256_srli_epi32(x, by));
  }
  // The upper halves of the products; `_mm256_mul_epu32` multiplies every other lane.
  NNCX_INLINE static Words multiply_high(Words a, Words b) {
    const __m256i even = _mm256_srli_epi64(_mm256_mul_epu32(a, b), 32);
    return _mm256_blend_epi32(even, _mm256_mul_epu32(_mm256_srli_epi64(a, 32), b), 0xAA);
  }
  NNCX_INLINE static Floats look_up(const float* buckets, Words places) {
    const Floats value = _mm256_i32gather_ps(buckets, _mm256_srli_epi32(places, 1), sizeof(float));
    return _mm256_xor_ps(value, _mm256_castsi256_ps(_mm256_slli_epi32(places, 31)));
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

}  // namespace nncx::avx2
