// Channels innermost, of 2 or 4 bytes, in up to 4 groups: a vector of each group gives as many
// vectors of output, each by a permutation of the first two groups and one, under a mask, of every
// other. All else is left to the AVX2 path, which the memory bounds as well.
#include "channel_shuffle.h"

#include <immintrin.h>

#include <algorithm>

#include "unroll.h"

namespace nncx::avx512 {
namespace {

struct Words {
  using Element = uint32_t;
  using Mask = __mmask16;
  static constexpr int kLanes = 16;

  NNCX_INLINE static __m512i permute(__m512i x, __m512i index, __m512i y) {
    return _mm512_permutex2var_epi32(x, index, y);
  }
  NNCX_INLINE static __m512i permute(__m512i kept, Mask mask, __m512i index, __m512i x) {
    return _mm512_mask_permutexvar_epi32(kept, mask, index, x);
  }
};

struct HalfWords {
  using Element = uint16_t;
  using Mask = __mmask32;
  static constexpr int kLanes = 32;

  NNCX_INLINE static __m512i permute(__m512i x, __m512i index, __m512i y) {
    return _mm512_permutex2var_epi16(x, index, y);
  }
  NNCX_INLINE static __m512i permute(__m512i kept, Mask mask, __m512i index, __m512i x) {
    return _mm512_mask_permutexvar_epi16(kept, mask, index, x);
  }
};

// Lane l of output vector v is element (v * kLanes + l) / Groups of group (v * kLanes + l) % Groups.
template <class V, int Groups>
struct Lanes {
  __m512i index[Groups];
  typename V::Mask masks[Groups][Groups];  // [v][group], of group 2 on

  Lanes() {
    for (int v = 0; v < Groups; ++v) {
      typename V::Element lanes[V::kLanes];
      for (int g = 0; g < Groups; ++g) masks[v][g] = 0;
      for (int l = 0; l < V::kLanes; ++l) {
        const int at = v * V::kLanes + l, group = at % Groups;
        lanes[l] = static_cast<typename V::Element>(at / Groups + (group == 1 ? V::kLanes : 0));
        masks[v][group] |= static_cast<typename V::Mask>(typename V::Mask{1} << l);
      }
      index[v] = _mm512_loadu_si512(lanes);
    }
  }
};

template <class V, int Groups>
NNCX_INLINE inline void interleave(const typename V::Element* from, int64_t channels,
                                   const Lanes<V, Groups>& lanes, typename V::Element* to) {
  __m512i x[Groups];
  for_each<Groups>([&](auto g) NNCX_INLINE { x[g] = _mm512_loadu_si512(from + g * channels); });
  for_each<Groups>([&](auto v) NNCX_INLINE {
    __m512i y = V::permute(x[0], lanes.index[v], x[1]);
    for_each<Groups - 2>([&](auto g) NNCX_INLINE {
      y = V::permute(y, lanes.masks[v][g + 2], lanes.index[v], x[g + 2]);
    });
    _mm512_storeu_si512(to + v * V::kLanes, y);
  });
}

// Of at least a vector of channels; the last one is moved back, over what is there already.
template <class V, int Groups>
void shuffle_pixels(const ChannelShuffleParams& p, int64_t begin, int64_t end) {
  using Element = typename V::Element;
  const int64_t channels = p.channels, all = Groups * channels, last = channels - V::kLanes;
  const Lanes<V, Groups> lanes;
  const Element* from = static_cast<const Element*>(p.input) + begin * all;
  Element* to = static_cast<Element*>(p.output) + begin * all;
  for (int64_t pixel = begin; pixel < end; ++pixel, from += all, to += all) {
    for (int64_t c = 0; c < last; c += V::kLanes) {
      interleave(from + c, channels, lanes, to + Groups * c);
    }
    interleave(from + last, channels, lanes, to + Groups * last);
  }
}

template <class V>
bool shuffle_few(const ChannelShuffleParams& p, int64_t begin, int64_t end) {
  if (p.channels < V::kLanes) return false;
  switch (p.groups) {
    case 2:
      shuffle_pixels<V, 2>(p, begin, end);
      return true;
    case 3:
      shuffle_pixels<V, 3>(p, begin, end);
      return true;
    case 4:
      shuffle_pixels<V, 4>(p, begin, end);
      return true;
    default:
      return false;
  }
}

}  // namespace

void channel_shuffle(const ChannelShuffleParams& p, int64_t begin, int64_t end) {
  if (p.channels_last && p.element_bytes == 4 && shuffle_few<Words>(p, begin, end)) return;
  if (p.channels_last && p.element_bytes == 2 && shuffle_few<HalfWords>(p, begin, end)) return;
  avx2::channel_shuffle(p, begin, end);
}

}  // namespace nncx::avx512
