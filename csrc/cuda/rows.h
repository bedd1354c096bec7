// How the elementwise ops walk a tensor of any strides: in rows of neighbours, and those in pieces of
// up to 16 bytes.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "cuda/divider.h"
#include "cuda/pieces.h"

namespace nncx::cuda {

// What one access reads or writes.
template <int Bytes>
using Piece = std::conditional_t<
    Bytes == 16, uint4,
    std::conditional_t<Bytes == 8, uint2,
                       std::conditional_t<Bytes == 4, uint32_t,
                                          std::conditional_t<Bytes == 2, uint16_t, uint8_t>>>>;

// Where a row begins, in elements. A row is one group of channels of one pixel; rows are counted
// through [batch, height, width, groups].
class RowOffsets {
 public:
  template <class Params>
  RowOffsets(const Params& p, int64_t groups, int64_t group_stride)
      : groups_(groups), width_(p.width), height_(p.height) {
    const int64_t sizes[] = {groups, p.width, p.height, p.batch};
    const int64_t strides[] = {group_stride, p.stride_w, p.stride_h, p.stride_n};
    int64_t rows = 1;
    for (int i = 0; i < 4; ++i) {
      strides_[i] = sizes[i] > 1 ? strides[i] : 0;
      if (rows == 1) stride_ = strides_[i];  // of the innermost dimension that has two
      is_uniform_ = is_uniform_ && (sizes[i] == 1 || strides[i] == rows * stride_);
      rows *= sizes[i];
    }
  }

  // Whether the rows are `stride` apart, all of them.
  bool is_uniform(int64_t stride) const { return is_uniform_ && stride_ == stride; }

  int widest_piece_between(int64_t element_bytes) const {
    return widest_piece(strides_[0] * element_bytes, strides_[1] * element_bytes,
                        strides_[2] * element_bytes, strides_[3] * element_bytes);
  }

  constexpr int64_t operator()(int64_t row) const {
    if (is_uniform_) return row * stride_;
    const int64_t pixel = groups_.quotient(row);
    const int64_t line = width_.quotient(pixel);
    const int64_t n = height_.quotient(line);
    return (row - pixel * groups_.divisor()) * strides_[0] +
           (pixel - line * width_.divisor()) * strides_[1] +
           (line - n * height_.divisor()) * strides_[2] + n * strides_[3];
  }

 private:
  Divider groups_, width_, height_;
  int64_t strides_[4];
  int64_t stride_ = 0;
  bool is_uniform_ = true;
};

}  // namespace nncx::cuda
