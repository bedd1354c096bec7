// What the header of a prepacked weight says, and how on a GPU the weight's size says it.
#pragma once

#include <algorithm>
#include <cstring>
#include <string>

#include "conv2d.h"

namespace nncx {

// Of a weight that a path, such as "binary/avx2", prepacked into `bytes` behind the header.
static inline PrepackedHeader prepacked_header(const std::string& path, const Conv2dWeightShape& s,
                                               int64_t bytes) {
  PrepackedHeader header{};
  std::memcpy(header.path, path.data(), std::min(path.size(), sizeof header.path - 1));
  header.groups = s.groups;
  header.out_channels = s.out_channels;
  header.taps = s.taps;
  header.channels = s.channels;
  header.bytes = bytes;
  return header;
}

// The same of a weight on a GPU. Its header cannot be read without waiting for the GPU, but its size
// is known: behind the path's bytes come so many unused ones that another path or another shape has
// another size, with near certainty. (A kernel that is given too few bytes would be worse than one
// that is given other weights: that never happens.)
static inline PrepackedHeader sized_header(const std::string& format, const Conv2dWeightShape& s,
                                           int64_t bytes) {
  PrepackedHeader header = prepacked_header(format + "/cuda", s, bytes);
  uint8_t text[sizeof header];
  std::memcpy(text, &header, sizeof header);
  uint64_t hash = 0xCBF29CE484222325;  // FNV-1a
  for (const uint8_t byte : text) hash = (hash ^ byte) * 0x100000001B3;
  header.bytes += 16 * static_cast<int64_t>(hash % 251);
  return header;
}

static inline std::string geometry_text(const PrepackedHeader& header) {
  return "groups=" + std::to_string(header.groups) +
         ", out_channels/groups=" + std::to_string(header.out_channels) +
         ", taps=" + std::to_string(header.taps) +
         ", in_channels/groups=" + std::to_string(header.channels);
}

}  // namespace nncx
