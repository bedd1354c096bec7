// What the vector paths of binary_conv2d do with their counts.
#pragma once

#include <algorithm>

#include "binary_conv2d.h"

namespace nncx {

// Neighbouring output pixels, and of how many products of signs their dot products are the sum.
template <int Most>
struct BinaryRows {
  int64_t first, count;
  int64_t bits[Most];
};

// Stores rows x width outputs of one group, from its output channel `first` on. counts[row][width]
// are popcounts of xor, of which the dot product is bits - 2 * count; they are overwritten.
template <int Most>
static inline void store_rows(const BinaryConv2dParams& p, const BinaryRows<Most>& rows,
                              int64_t group, int64_t first, int64_t width, int32_t* counts) {
  const BinaryWeightShape& s = p.shape;
  const int64_t image = p.out_height * p.out_width;
  const int64_t outputs = std::min(width, s.out_channels - first);
  const int64_t o = group * s.out_channels + first;
  for (int64_t r = 0; r < rows.count; ++r, counts += width) {
    for (int64_t i = 0; i < outputs; ++i) {
      counts[i] = static_cast<int32_t>(rows.bits[r]) - 2 * counts[i];
    }
    const int64_t pixel = rows.first + r;
    const float* input_scale = p.epilogue.input_scale;
    if (input_scale) input_scale += (pixel / image * s.groups + group) * image + pixel % image;
    store_row(p.epilogue, counts, outputs, o, input_scale, pixel * s.groups * s.out_channels + o);
  }
}

}  // namespace nncx
