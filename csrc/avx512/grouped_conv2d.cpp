#include "grouped_conv2d.h"

#include <immintrin.h>

#include "grouped_tiles.h"

namespace nncx::avx512 {
namespace {

struct V {
  using Floats = __m512;
  static constexpr int kLanes = 16;
  static constexpr int kRows = 12;  // times 2 vectors of sums, 2 of pixels, 1 of weights

  NNCX_INLINE static Floats load(const float* x) { return _mm512_loadu_ps(x); }
  NNCX_INLINE static void store(float* to, Floats x) { _mm512_storeu_ps(to, x); }
  NNCX_INLINE static Floats broadcast(const float* x) { return _mm512_set1_ps(*x); }
  NNCX_INLINE static Floats set(float x) { return _mm512_set1_ps(x); }
  NNCX_INLINE static Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
  // Of NaN, which is in x, both make NaN.
  NNCX_INLINE static Floats at_least(Floats least, Floats x) { return _mm512_max_ps(least, x); }
  NNCX_INLINE static Floats at_most(Floats most, Floats x) { return _mm512_min_ps(most, x); }

  static void shuffle(const ChannelShuffleParams& p, int64_t begin, int64_t end) {
    channel_shuffle(p, begin, end);
  }
};

}  // namespace

int64_t grouped_conv2d_scratch_bytes(const GroupedConv2dParams& p) { return Scratch<V>::bytes(p); }

void grouped_conv2d(const GroupedConv2dParams& p, const Conv2dTile& tile, uint8_t* scratch) {
  run<V>(p, tile, scratch);
}

}  // namespace nncx::avx512
