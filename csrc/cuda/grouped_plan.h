// How grouped_conv2d is cut into blocks on CUDA. Plain C++, so that tests on any machine ask for it
// (nncx._C.grouped_plan).
//
// A block has 64 output pixels and `outputs` of each of `groups` groups, which wait in shared memory
// until they are all there. They are as many as have room, and such that what it writes of a pixel
// are neighbours:
//
//   plain         whole groups that lie behind one another, or a slice of one
//   interleaved   channels innermost, shuffled by the groups: the same slice of all groups
//
// (Any other shuffle scatters what a plain block writes.) It sums `pass_outputs` of a group at a time.
#pragma once

#include "cuda/device.h"
#include "grouped_conv2d.h"

namespace nncx::cuda {

constexpr int kGroupedPixels = 64, kGroupedThreads = 128;
constexpr int kGroupedChunkBytes = 160;  // of K at a time, at most
constexpr int kGroupedPassOutputs = 96;  // at most: sums live in registers
constexpr int kGroupedPixelBytes = 512;  // of the outputs that wait, at most
constexpr int kGroupedMostOutputs = kGroupedPixelBytes / 2;

struct GroupedPlan {
  int64_t pixel_tiles, channel_tiles;
  bool interleaved;
  int groups, outputs, slices;  // slices of a group
  int pass_outputs;
  int chunks, chunk_bytes;  // of K
  int piece;                // in which chunks are copied, or 0: 16 bytes are put together
  int weight_piece;         // then: 16 if those of weights are copied nevertheless
  int pixel_pitch;          // bytes between pixels that wait
  int stages;               // chunks that shared memory holds
  int shared_bytes;

  // Keeps 8 rows off each other's banks.
  constexpr int pitch() const { return chunk_bytes + 16; }
  constexpr int pass_rows() const { return (pass_outputs + 15) / 16 * 16; }
  constexpr int stage_bytes() const { return (kGroupedPixels + pass_rows()) * pitch(); }
};

// `weight` is its address.
GroupedPlan grouped_plan(const GroupedConv2dParams& p, uint64_t weight, const Device& device);

}  // namespace nncx::cuda
