#include "channel_shuffle.h"

#include <cstring>

#include "shuffle_planes.h"

namespace nncx::scalar {
namespace {

template <class T>
void shuffle_pixels(const ChannelShuffleParams& p, int64_t begin, int64_t end) {
  const int64_t all = p.groups * p.channels;
  const T* from = static_cast<const T*>(p.input) + begin * all;
  T* to = static_cast<T*>(p.output) + begin * all;
  for (int64_t pixel = begin; pixel < end; ++pixel, from += all) {
    for (int64_t c = 0; c < p.channels; ++c) {
      for (int64_t g = 0; g < p.groups; ++g) *to++ = from[g * p.channels + c];
    }
  }
}

}  // namespace

void channel_shuffle(const ChannelShuffleParams& p, int64_t begin, int64_t end) {
  if (!p.channels_last) {
    return shuffle_planes(p, begin, end, [](const uint8_t* from, int64_t bytes, uint8_t* to) {
      std::memcpy(to, from, bytes);
    });
  }
  switch (p.element_bytes) {
    case 1:
      return shuffle_pixels<uint8_t>(p, begin, end);
    case 2:
      return shuffle_pixels<uint16_t>(p, begin, end);
    case 4:
      return shuffle_pixels<uint32_t>(p, begin, end);
    default:
      return shuffle_pixels<uint64_t>(p, begin, end);
  }
}

}  // namespace nncx::scalar
