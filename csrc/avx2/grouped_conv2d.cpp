#include "grouped_conv2d.h"

#include <immintrin.h>

#include "grouped_tiles.h"

namespace nncx::avx2 {
namespace {

struct V {
  using Floats = __m256;
  static constexpr int kLanes = 8;
  static constexpr int kRows = 6;  // times 2 vectors of sums, 2 of pixels, 1 of weights

  NNCX_INLINE static Floats load(const float* x) { return _mm256_loadu_ps(x); }
  NNCX_INLINE static void store(float* to, Floats x) { _mm256_storeu_ps(to, x); }
  NNCX_INLINE static Floats broadcast(const float* x) { return _mm256_set1_ps(*x); }
  NNCX_INLINE static Floats set(float x) { return _mm256_set1_ps(x); }
  NNCX_INLINE static Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
  // Of NaN, which is in x, both make NaN.
  NNCX_INLINE static Floats at_least(Floats least, Floats x) { return _mm256_max_ps(least, x); }
  NNCX_INLINE static Floats at_most(Floats most, Floats x) { return _mm256_min_ps(most, x); }

  static void shuffle(const ChannelShuffleParams& p, int64_t begin, int64_t end) {
    channel_shuffle(p, begin, end);
  }
};

}  // namespace

int64_t grouped_conv2d_scratch_bytes(const GroupedConv2dParams& p) { return Scratch<V>::bytes(p); }

void grouped_conv2d(const GroupedConv2dParams& p, const Conv2dTile& tile, uint8_t* scratch) {
  run<V>(p, tile, scratch);
}

}  // namespace nncx::avx2
