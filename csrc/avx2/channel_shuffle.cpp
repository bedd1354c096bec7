// Channels innermost: squares of 8 groups x 8 channels are transposed. A square may reach beyond the
// groups or the channels: it is moved back, or, where there are fewer than 8, reads and writes what
// the next one writes over. Pixels with nothing behind them that may be touched so are left to the
// scalar path, as are elements of 8 bytes and planes of less than a vector.
#include "channel_shuffle.h"

#include <immintrin.h>

#include <algorithm>

#include "shuffle_planes.h"
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

// Few groups of words: a vector of each gives as many of output. Lane l of output vector v is element
// (8 v + l) / Groups of group (8 v + l) % Groups.
template <int Groups>
struct Lanes {
  int32_t index[Groups][kSide];

  constexpr Lanes() : index{} {
    for (int at = 0; at < Groups * kSide; ++at) index[at / kSide][at % kSide] = at / Groups;
  }

  static constexpr int mask(int v, int group) {
    int mask = 0;
    for (int l = 0; l < kSide; ++l) mask |= ((v * kSide + l) % Groups == group) << l;
    return mask;
  }
};

template <int Groups>
NNCX_INLINE inline void interleave(const uint32_t* from, int64_t channels, uint32_t* to) {
  static constexpr Lanes<Groups> kLanes;
  __m256i x[Groups];
  for_each<Groups>([&](auto g) NNCX_INLINE {
    x[g] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + g * channels));
  });
  for_each<Groups>([&](auto v) NNCX_INLINE {
    const auto index = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kLanes.index[v]));
    __m256i y = _mm256_permutevar8x32_epi32(x[0], index);
    for_each<Groups - 1>([&](auto i) NNCX_INLINE {
      constexpr int kGroup = decltype(i)::value + 1;
      y = _mm256_blend_epi32(y, _mm256_permutevar8x32_epi32(x[kGroup], index),
                             Lanes<Groups>::mask(decltype(v)::value, kGroup));
    });
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + v * kSide), y);
  });
}

template <int Groups>
void shuffle_pixel(const uint32_t* from, int64_t channels, uint32_t* to) {
  for (int64_t at = 0; at < channels; at += kSide) {
    const int64_t c = moved_back(at, channels);
    interleave<Groups>(from + c, channels, to + Groups * c);
  }
}

// Calls pixel(from, to) for each that has something behind it that may be touched.
template <class T, class Pixel>
void shuffle_pixels(const ChannelShuffleParams& p, int64_t begin, int64_t end, const Pixel& pixel) {
  const int64_t all = p.groups * p.channels;
  const int64_t last = std::max(begin, end - (kSide + all - 1) / all);
  const T* from = static_cast<const T*>(p.input) + begin * all;
  T* to = static_cast<T*>(p.output) + begin * all;
  for (int64_t at = begin; at < last; ++at, from += all, to += all) pixel(from, to);
  scalar::channel_shuffle(p, last, end);
}

template <class T>
void shuffle_many(const ChannelShuffleParams& p, int64_t begin, int64_t end) {
  shuffle_pixels<T>(p, begin, end, [&](const T* from, T* to) NNCX_INLINE {
    shuffle_pixel(from, p.groups, p.channels, to);
  });
}

template <int Groups>
void shuffle_few(const ChannelShuffleParams& p, int64_t begin, int64_t end) {
  shuffle_pixels<uint32_t>(p, begin, end, [&](const uint32_t* from, uint32_t* to) NNCX_INLINE {
    shuffle_pixel<Groups>(from, p.channels, to);
  });
}

void shuffle_words(const ChannelShuffleParams& p, int64_t begin, int64_t end) {
  if (p.channels < kSide) return shuffle_many<uint32_t>(p, begin, end);
  switch (p.groups) {
    case 2:
      return shuffle_few<2>(p, begin, end);
    case 3:
      return shuffle_few<3>(p, begin, end);
    case 4:
      return shuffle_few<4>(p, begin, end);
    default:
      return shuffle_many<uint32_t>(p, begin, end);
  }
}

// std::memcpy takes as long to begin as a plane of 7 x 7 takes. The last vector is moved back.
NNCX_INLINE inline void copy_plane(const uint8_t* from, int64_t bytes, uint8_t* to) {
  constexpr int64_t kVector = sizeof(__m256i);
  const auto copy = [&](int64_t at) NNCX_INLINE {
    const auto* vector = reinterpret_cast<const __m256i*>(from + at);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + at), _mm256_loadu_si256(vector));
  };
  for (int64_t at = 0; at < bytes - kVector; at += kVector) copy(at);
  copy(bytes - kVector);
}

}  // namespace

void channel_shuffle(const ChannelShuffleParams& p, int64_t begin, int64_t end) {
  if (!p.channels_last && p.pixels * p.element_bytes >= int64_t{sizeof(__m256i)}) {
    return shuffle_planes(p, begin, end, copy_plane);
  }
  if (p.channels_last && p.element_bytes == 4) return shuffle_words(p, begin, end);
  if (p.channels_last && p.element_bytes == 2) return shuffle_many<uint16_t>(p, begin, end);
  if (p.channels_last && p.element_bytes == 1) return shuffle_many<uint8_t>(p, begin, end);
  scalar::channel_shuffle(p, begin, end);
}

}  // namespace nncx::avx2
