// Prepacked weights of the GEMMs on CUDA: one layout for binary and int8 and for every GPU. Behind
// the header (conv2d.h):
//
//   64 unused bytes, so that the rows begin 128 bytes into the tensor
//   [groups * out_channels][row_bytes]    a row is k = tap * channel_bytes + byte, dense, then zeros
//   [taps + 1][groups * out_channels]     int32 tap sums: of one tap of one row the bits that are 1,
//                                         or the sum of its weights; the last line is of all taps
//
// Plain C++: sizes are asked for in builds without CUDA too.
#pragma once

#include "conv2d.h"
#include "pack_signs.h"

namespace nncx::cuda {

constexpr int64_t kGemmRowsOffset = 64;
constexpr int64_t kGemmRowAlignment = 128;  // a tile's rows are read this many bytes at a time

struct GemmWeight {
  int64_t rows, taps;
  int64_t channel_bytes;  // of one tap of one row

  constexpr int64_t k_bytes() const { return taps * channel_bytes; }
  constexpr int64_t row_bytes() const {
    return (k_bytes() + kGemmRowAlignment - 1) / kGemmRowAlignment * kGemmRowAlignment;
  }
  constexpr int64_t sums_offset() const { return kGemmRowsOffset + rows * row_bytes(); }
  constexpr int64_t bytes() const {
    return sums_offset() + (taps + 1) * rows * static_cast<int64_t>(sizeof(int32_t));
  }
};

constexpr GemmWeight binary_gemm_weight(const Conv2dWeightShape& s) {
  return {s.groups * s.out_channels, s.taps, packed_bytes(s.channels)};
}

constexpr GemmWeight int8_gemm_weight(const Conv2dWeightShape& s) {
  return {s.groups * s.out_channels, s.taps, s.channels};
}

}  // namespace nncx::cuda
