// How grouped_conv2d is cut into blocks on CUDA. Plain C++, so that tests on any machine ask for it
// (nncx._C.grouped_plan).
//
// The output channels are runs of neighbours, each of one group:
//
//   plain         the runs are the groups, which lie behind one another in the output
//   interleaved   channels innermost, a shuffle that the groups divide: the runs are those that the
//                 shuffle interleaves
//
// A block has 64 output pixels and, of each of `runs` runs, `run_outputs`: so many, and such, that
// what it writes of a pixel are neighbours, if the shuffle allows it. They wait in shared memory
// until they are all there. At a time it sums `pass_outputs` of one run.
#pragma once

#include "cuda/device.h"
#include "grouped_conv2d.h"

namespace nncx::cuda {

constexpr int kGroupedPixels = 64, kGroupedThreads = 128;
constexpr int kGroupedChunkBytes =
    160;  // of K at a time, at most: 80 channels in 16 bits are usual
constexpr int kGroupedPassOutputs = 96;  // at most: sums live in registers
constexpr int kGroupedPixelBytes = 512;  // of the outputs that wait, at most

struct GroupedPlan {
  int64_t pixel_tiles;
  bool interleaved;
  int64_t all_runs, run_length;
  int runs, run_outputs;
  int pass_outputs;
  int chunks, chunk_bytes;  // of K
  int piece;                // in which chunks are copied, or 0: 16 bytes are put together
  int weight_piece;         // then: 16 if those of weights are copied nevertheless
  int pixel_pitch;          // bytes between pixels that wait
  int stages;               // chunks that shared memory holds
  int shared_bytes;

  constexpr int64_t slices() const { return (run_length + run_outputs - 1) / run_outputs; }
  constexpr int64_t channel_tiles() const { return (all_runs + runs - 1) / runs * slices(); }
  constexpr int passes() const { return (run_outputs + pass_outputs - 1) / pass_outputs; }

  constexpr int pitch() const {
    return chunk_bytes + 16;
  }  // which keeps 8 rows off each other's banks
  constexpr int pass_rows() const { return (pass_outputs + 15) / 16 * 16; }
  constexpr int stage_bytes() const { return (kGroupedPixels + pass_rows()) * pitch(); }
};

// `weight` is its address.
GroupedPlan grouped_plan(const GroupedConv2dParams& p, uint64_t weight, const Device& device);

}  // namespace nncx::cuda
