// Prepacked weights of codebook_conv2d on CUDA: one layout for every GPU. Behind the header
// (conv2d.h):
//
//   64 unused bytes, so that the codes begin 128 bytes into the tensor
//   [group][block of 32 outputs][step][32 outputs][16 bytes]
//
// A step is as many codes as 16 bytes hold, in slots of 1, 2, 4 or 8 bits, least significant bit
// first, along k = tap * channels + channel: a warp whose lanes are outputs reads its next step in
// one piece. Outputs and k's that do not exist have code 0.
//
// Plain C++: sizes are asked for in builds without CUDA too.
#pragma once

#include "codebook_conv2d.h"

namespace nncx::cuda {

constexpr int64_t kCodesOffset = 64;
constexpr int kCodesBlock = 32;      // outputs, of one group
constexpr int kCodesStepBytes = 16;  // of an output

struct CodebookWeight {
  int64_t groups;
  int64_t outputs, terms;  // of a group; of an output
  int slot_log2;

  constexpr int step_terms() const { return kCodesStepBytes * 8 >> slot_log2; }
  constexpr int64_t steps() const { return (terms + step_terms() - 1) / step_terms(); }
  constexpr int64_t blocks() const { return (outputs + kCodesBlock - 1) / kCodesBlock; }
  constexpr int64_t block_bytes() const { return steps() * kCodesBlock * kCodesStepBytes; }
  constexpr int64_t bytes() const { return kCodesOffset + groups * blocks() * block_bytes(); }
};

constexpr CodebookWeight codebook_weight(const Conv2dWeightShape& s, int bits) {
  return {s.groups, s.out_channels, s.taps * s.channels, slot_log2(bits)};
}

}  // namespace nncx::cuda
