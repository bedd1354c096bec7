// Channels innermost: squares of 8 groups x 8 channels are transposed. A square may reach beyond the
// groups or the channels: it is moved back, or, where there are fewer than 8, reads and writes what
// the next one writes over. Pixels with nothing behind them that may be touched so are left to the
// scalar path, as are elements of 8 bytes and planes, which are copied whole.
#include "channel_shuffle.h"

#include <immintrin.h>

#include <algorithm>

#include "transpose.h"

namespace nncx::avx2 {
namespace {

constexpr int64_t kSide = 8;

NNCX_INLINE inline void transpose(const uint32_t* const* rows, uint32_t* to, int64_t step,
                                  int64_t count) {
  __m256 y[kSide];
  for_each<kSide>([&](auto i) NNCX_INLINE {
    y[i] = _mm256_castsi256_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows[i])));
  });
  transpose_8x8(y);
  for_each<kSide>([&](auto i) NNCX_INLINE {
    if (i >= count) return;
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i * step), _mm256_castps_si256(y[i]));
  });
}

NNCX_INLINE inline void transpose(const uint16_t* const* rows, uint16_t* to, int64_t step,
                                  int64_t count) {
  __m128i y[kSide], t[kSide];
  for_each<kSide>([&](auto i) NNCX_INLINE {
    y[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[i]));
  });
  for (int round = 0; round < 3; ++round) {  // interleaves i with i + 4: three times transpose
    for_each<kSide / 2>([&](auto i) NNCX_INLINE {
      t[2 * i] = _mm_unpacklo_epi16(y[i], y[i + 4]);
      t[2 * i + 1] = _mm_unpackhi_epi16(y[i], y[i + 4]);
    });
    for_each<kSide>([&](auto i) NNCX_INLINE { y[i] = t[i]; });
  }
  for_each<kSide>([&](auto i) NNCX_INLINE {
    if (i < count) _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i * step), y[i]);
  });
}

NNCX_INLINE inline void transpose(const uint8_t* const* rows, uint8_t* to, int64_t step,
                                  int64_t count) {
  __m128i y[kSide / 2], t[kSide / 2];  // two rows each
  for_each<kSide / 2>([&](auto i) NNCX_INLINE {
    y[i] = _mm_unpacklo_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(rows[2 * i])),
                              _mm_loadl_epi64(reinterpret_cast<const __m128i*>(rows[2 * i + 1])));
  });
  for (int round = 0; round < 3; ++round) {  // as above
    for_each<2>([&](auto i) NNCX_INLINE {
      t[2 * i] = _mm_unpacklo_epi8(y[i], y[i + 2]);
      t[2 * i + 1] = _mm_unpackhi_epi8(y[i], y[i + 2]);
    });
    for_each<kSide / 2>([&](auto i) NNCX_INLINE { y[i] = t[i]; });
  }
  for_each<kSide>([&](auto i) NNCX_INLINE {
    if (i >= count) return;
    const __m128i row = i % 2 ? _mm_unpackhi_epi64(y[i / 2], y[i / 2]) : y[i / 2];
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to + i * step), row);
  });
}

// Where the square that starts at `at` of `size` starts: whole, if one fits.
constexpr int64_t moved_back(int64_t at, int64_t size) {
  return std::min(at, std::max<int64_t>(size - kSide, 0));
}

template <class T>
void shuffle_pixel(const T* from, int64_t groups, int64_t channels, T* to) {
  const int64_t count = std::min(channels, kSide);
  for (int64_t at = 0; at < channels; at += kSide) {
    const int64_t c = moved_back(at, channels);
    for (int64_t group = 0; group < groups; group += kSide) {
      const int64_t g = moved_back(group, groups);
      const T* rows[kSide];
      for (int64_t i = 0; i < kSide; ++i) {
        rows[i] = from + std::min(g + i, groups - 1) * channels + c;
      }
      transpose(rows, to + c * groups + g, groups, count);
    }
  }
}

// Two groups, those of ShuffleNet v2: pairs without a transposition.
void shuffle_pairs(const uint32_t* from, int64_t channels, uint32_t* to) {
  for (int64_t at = 0; at < channels; at += kSide) {
    const int64_t c = moved_back(at, channels);
    const auto load = [&](int64_t g) NNCX_INLINE {
      return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + g * channels + c));
    };
    const __m256i low = _mm256_unpacklo_epi32(load(0), load(1));
    const __m256i high = _mm256_unpackhi_epi32(load(0), load(1));
    auto* out = reinterpret_cast<__m256i*>(to + 2 * c);
    _mm256_storeu_si256(out, _mm256_permute2x128_si256(low, high, 0x20));
    _mm256_storeu_si256(out + 1, _mm256_permute2x128_si256(low, high, 0x31));
  }
}

template <class T>
void shuffle_pixels(const ChannelShuffleParams& p, int64_t begin, int64_t end) {
  const int64_t all = p.groups * p.channels;
  const int64_t last = std::max(begin, end - (kSide + all - 1) / all);
  const T* from = static_cast<const T*>(p.input) + begin * all;
  T* to = static_cast<T*>(p.output) + begin * all;
  for (int64_t pixel = begin; pixel < last; ++pixel, from += all, to += all) {
    if constexpr (sizeof(T) == 4) {
      if (p.groups == 2 && p.channels >= kSide) {
        shuffle_pairs(from, p.channels, to);
        continue;
      }
    }
    shuffle_pixel(from, p.groups, p.channels, to);
  }
  scalar::channel_shuffle(p, last, end);
}

}  // namespace

void channel_shuffle(const ChannelShuffleParams& p, int64_t begin, int64_t end) {
  if (p.channels_last && p.element_bytes == 4) return shuffle_pixels<uint32_t>(p, begin, end);
  if (p.channels_last && p.element_bytes == 2) return shuffle_pixels<uint16_t>(p, begin, end);
  if (p.channels_last && p.element_bytes == 1) return shuffle_pixels<uint8_t>(p, begin, end);
  scalar::channel_shuffle(p, begin, end);
}

}  // namespace nncx::avx2
