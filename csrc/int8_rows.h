// What the tiles of an int8 convolution (conv2d_lines.h) know of their rows.
#pragma once

#include <cstring>

#include "conv2d_lines.h"
#include "int8_conv2d.h"

namespace nncx {
namespace {

constexpr int64_t kInt8TileRows = 48;

// Neighbouring output pixels: the zero point and the scale of the input there.
struct Int8Rows {
  int64_t first, count;
  int32_t zero_point[kInt8TileRows];
  float input_scale[kInt8TileRows];
};

// Of the products four channels are added up in one lane, in one step of the GEMM.
constexpr int64_t kStepChannels = 4;
constexpr int64_t kStepBytes = kInt8Block * kStepChannels;

constexpr int64_t steps_of_tap(const Conv2dWeightShape& s) {
  return (s.channels + kStepChannels - 1) / kStepChannels;
}

constexpr int64_t steps_of_filter(const Conv2dWeightShape& s) { return s.taps * steps_of_tap(s); }

// What the vector paths tell the walk alike.
struct Int8Path {
  using Params = Int8Conv2dParams;
  using Rows = Int8Rows;
  static constexpr int64_t kTileRows = kInt8TileRows;
  static constexpr int64_t kBlock = kInt8Block;

  static int64_t group_bytes(const Params& p) { return p.shape.channels; }

  static bool contiguous(const Params&) { return true; }

  static bool by_image(const Params& p) { return !p.epilogue.channels_last; }

  static void describe(const Params& p, const Position& at, int64_t, int64_t r, Rows& rows) {
    rows.zero_point[r] = zero_point_of(p, at.n);
    rows.input_scale[r] = p.epilogue.input_scale ? p.epilogue.input_scale[at.n] : 1;
  }
};

// The GEMMs take the groups that share a block for one, whose weights are 0 between different
// ones. That adds no products: the lanes and the channels of a step would be idle. At 4 channels a group
// it is two to three times as fast.
constexpr Conv2dWeightShape join_groups(const Conv2dWeightShape& s) {
  const int64_t together = groups_together(s);
  return {s.groups / together, together * s.out_channels, s.taps, together * s.channels};
}

inline Int8Conv2dParams join_groups(Int8Conv2dParams p) {
  p.shape = join_groups(p.shape);
  return p;
}

// Calls put(block, step, lane of 4 bytes, w) for the four weights of each step of each output; they
// are 0 beyond the channels of the output's group.
template <class Put>
void for_each_step(const Conv2dWeightShape& s, const int8_t* weight, const Put& put) {
  const Conv2dWeightShape joint = join_groups(s);
  for (int64_t o = 0; o < s.groups * s.out_channels; ++o, weight += s.channels * s.taps) {
    const int64_t in_group = o % joint.out_channels;
    const int64_t block =
        o / joint.out_channels * int8_blocks(joint.out_channels) + in_group / kInt8Block;
    const int64_t first_channel = in_group / s.out_channels * s.channels;
    for (int64_t tap = 0; tap < s.taps; ++tap) {
      for (int64_t step = 0; step < steps_of_tap(joint); ++step) {
        int8_t w[kStepChannels] = {};
        for (int64_t i = 0; i < kStepChannels; ++i) {
          const int64_t c = step * kStepChannels + i - first_channel;
          if (c >= 0 && c < s.channels) w[i] = weight[c * s.taps + tap];
        }
        put(block, tap * steps_of_tap(joint) + step, in_group % kInt8Block, w);
      }
    }
  }
}

}  // namespace
}  // namespace nncx
