// channel_shuffle with pixels innermost, of which the paths differ in how they copy a plane.
#pragma once

#include "channel_shuffle.h"

namespace nncx {
namespace {

// copy(from, bytes, to) each of planes [begin, end) of the output.
template <class Copy>
void shuffle_planes(const ChannelShuffleParams& p, int64_t begin, int64_t end, const Copy& copy) {
  const int64_t bytes = p.pixels * p.element_bytes, all = p.groups * p.channels;
  const auto* input = static_cast<const uint8_t*>(p.input);
  auto* output = static_cast<uint8_t*>(p.output);
  const int64_t first = begin % all;
  int64_t c = first / p.groups, g = first % p.groups;  // counted up without divisions
  input += (begin - first) * bytes;
  output += begin * bytes;
  for (int64_t plane = begin; plane < end; ++plane, output += bytes) {
    copy(input + (g * p.channels + c) * bytes, bytes, output);
    if (++g < p.groups) continue;
    g = 0;
    if (++c < p.channels) continue;
    c = 0;
    input += all * bytes;
  }
}

}  // namespace
}  // namespace nncx
