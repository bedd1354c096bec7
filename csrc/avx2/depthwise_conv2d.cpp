#include "depthwise_conv2d.h"

#include <immintrin.h>

#include "depthwise_tiles.h"
#include "tile.h"

namespace nncx::avx2 {
namespace {

struct V {
  using Floats = __m256;
  static constexpr int kLanes = 8;
  static constexpr int kRows = 2;  // times 3 sums, 9 weights and an input: 16 registers
  static constexpr int kColumns = 3;
  static constexpr int kLines = 4;

  NNCX_INLINE static Floats load(const float* x) { return _mm256_loadu_ps(x); }
  NNCX_INLINE static Floats broadcast(const float* x) { return _mm256_broadcast_ss(x); }
  NNCX_INLINE static Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
  NNCX_INLINE static Floats fill(float x) { return _mm256_set1_ps(x); }
  NNCX_INLINE static Floats clamp(Floats y, Floats low, Floats high) {
    return _mm256_min_ps(high, _mm256_max_ps(low, y));
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

int64_t depthwise_conv2d_scratch_bytes(const DepthwiseConv2dParams& p) {
  return scratch_bytes<V>(p);
}

void depthwise_conv2d(const DepthwiseConv2dParams& p, const Conv2dTile& tile, uint8_t* scratch) {
  run_depthwise<V>(p, tile, scratch);
}

}  // namespace nncx::avx2
