#include "pack_signs.h"

#include <immintrin.h>

#include "lanes.h"
#include "pack_runs.h"
#include "unroll.h"

namespace nncx::avx2 {
namespace {

// -1 where x >= 0, else 0.
template <class T>
NNCX_INLINE inline __m256i positive(const T* x) {
  return _mm256_castps_si256(_mm256_cmp_ps(load_lanes(x), _mm256_setzero_ps(), _CMP_GE_OQ));
}

struct Compare8 {
  static constexpr int64_t kPixels = 8;

  // Masks of 32 numbers, narrowed to bytes. Narrowing works within 128-bit halves, so it leaves the
  // fours of numbers in the order 0 2 4 6 1 3 5 7.
  template <class T>
  NNCX_INLINE static inline uint32_t bits_of_32(const T* x) {
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    const __m256i low = _mm256_packs_epi32(positive(x), positive(x + 8));
    const __m256i high = _mm256_packs_epi32(positive(x + 16), positive(x + 24));
    const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order);
    return static_cast<uint32_t>(_mm256_movemask_epi8(bytes));
  }

  template <class T>
  NNCX_INLINE static inline void pack_64(const T* x, uint8_t* out) {
    const uint64_t word = bits_of_32(x) | uint64_t{bits_of_32(x + 32)} << 32;
    std::memcpy(out, &word, 8);
  }

  // The last channel first: doubling the words and subtracting a mask of -1 appends a bit.
  template <int Vectors, class T>
  static void pack_columns(const T* x, int64_t stride_c, int64_t channels, uint8_t* out,
                           int64_t pixel_bytes) {
    __m256i words[Vectors];
    for_each<Vectors>([&](auto v) NNCX_INLINE { words[v] = _mm256_setzero_si256(); });
    for (const T* at = x + (channels - 1) * stride_c; channels > 0; --channels, at -= stride_c) {
      for_each<Vectors>([&](auto v) NNCX_INLINE {
        const __m256i doubled = _mm256_add_epi32(words[v], words[v]);
        words[v] = _mm256_sub_epi32(doubled, positive(at + v * kPixels));
      });
    }
    alignas(32) uint32_t lanes[Vectors * kPixels];
    for_each<Vectors>([&](auto v) NNCX_INLINE {
      _mm256_store_si256(reinterpret_cast<__m256i*>(lanes + v * kPixels), words[v]);
    });
    for (int64_t i = 0; i < Vectors * kPixels; ++i)
      std::memcpy(out + i * pixel_bytes, &lanes[i], 4);
  }
};

}  // namespace

void pack_signs(const PackSignsParams& p, int64_t begin, int64_t end) {
  PackRuns<Compare8>::pack(p, begin, end);
}

}  // namespace nncx::avx2
