// channel_shuffle: interleaves the groups of channels, so that the next grouped convolution sees all.
//
//   output[n, c * groups + g, pixel] = input[n, g * channels + c, pixel],   0 <= c < channels
//
// Elements are moved as bytes and never looked at.
//
// Input   [batch, groups * channels, pixels], dense, or [batch, pixels, groups * channels] if
//         channels are innermost
// Output  as the input; it shares no memory with it
#pragma once

#include <cstdint>

namespace nncx {

struct ChannelShuffleParams {
  const void* input;
  void* output;
  int64_t element_bytes;            // 1, 2, 4 or 8
  int64_t batch, groups, channels;  // channels of one group
  int64_t pixels;                   // of an image
  bool channels_last;
};

// Where channel `c`, counted over all groups, of `channels` each, goes.
static constexpr int64_t shuffled(int64_t c, int64_t groups, int64_t channels) {
  return c % channels * groups + c / channels;
}

// What is moved at a time: planes of the output, or pixels if channels are innermost.
static constexpr int64_t shuffle_units(const ChannelShuffleParams& p) {
  return p.batch * (p.channels_last ? p.pixels : p.groups * p.channels);
}

// Units [begin, end) of the shuffle_units.
namespace scalar {
void channel_shuffle(const ChannelShuffleParams& params, int64_t begin, int64_t end);
}
namespace avx2 {
void channel_shuffle(const ChannelShuffleParams& params, int64_t begin, int64_t end);
}
namespace avx512 {
void channel_shuffle(const ChannelShuffleParams& params, int64_t begin, int64_t end);
}
// Enqueues the whole tensor on `stream` (a cudaStream_t); returns the launch's cudaError_t.
namespace cuda {
int channel_shuffle(const ChannelShuffleParams& params, void* stream);
}

}  // namespace nncx
