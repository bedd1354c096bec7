// Eight floats as the loops that several paths share know them (depthwise_tiles.h says how).
#pragma once

#include <immintrin.h>

#include <algorithm>

#include "lanes.h"
#include "tile.h"

namespace nncx {
namespace {

struct FloatVector {
  using Floats = __m256;
  using Mask = __m256i;
  static constexpr int kLanes = 8;

  NNCX_INLINE static Floats load(const float* x) { return _mm256_loadu_ps(x); }
  NNCX_INLINE static Floats load(const float* x, Mask mask) { return _mm256_maskload_ps(x, mask); }
  NNCX_INLINE static Floats broadcast(const float* x) { return _mm256_broadcast_ss(x); }
  NNCX_INLINE static Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
  NNCX_INLINE static Floats fill(float x) { return _mm256_set1_ps(x); }
  NNCX_INLINE static Floats clamp(Floats y, Floats low, Floats high) {
    return _mm256_min_ps(high, _mm256_max_ps(low, y));
  }

  NNCX_INLINE static Mask inside(int64_t first, int64_t end) {
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const auto before = [&](int64_t lane) NNCX_INLINE {
      const int64_t bound = std::clamp<int64_t>(lane, 0, kLanes);
      return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(bound)), lanes);
    };
    return _mm256_andnot_si256(before(-first), before(end - first));
  }

  NNCX_INLINE static Floats evens(Floats a, Floats b) { return _mm256_shuffle_ps(a, b, 0x88); }
  NNCX_INLINE static Floats odds(Floats a, Floats b) { return _mm256_shuffle_ps(a, b, 0xDD); }
  NNCX_INLINE static Floats in_order(Floats y) {
    return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(y), 0xD8));
  }

  template <class T>
  NNCX_INLINE static void store(Floats y, T* out) {
    store_lanes(y, out);
  }
  template <class T>
  NNCX_INLINE static void store(Floats y, T* out, int64_t count) {
    store_lanes(y, out, count);
  }
};

}  // namespace
}  // namespace nncx
