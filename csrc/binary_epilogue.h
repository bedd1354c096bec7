// What happens to the integer dot products of a binary op before they leave. Either they become
// numbers:
//
//   y = (dot * scale[o]) * input_scale + bias[o]
//
// Each operation is rounded to float32 on its own, in this order (the build forbids contraction),
// and the result is rounded once more to the output's format: every path gives the same bits. Or,
// with a threshold, they become the packed signs (pack_signs.h) that the next binary op reads:
//
//   bit = (dot >= threshold[o]) xor flip[o]
//
// which is the sign of anything that grows or, with flip, falls with the dot product: alpha, bias
// and BatchNorm folded into one comparison of integers.
#pragma once

#include "dtype.h"
#include "pack_signs.h"

namespace nncx {

struct BinaryEpilogue {
  const float* scale;        // [channels], or null for 1
  const float* bias;         // [channels], or null for 0
  const float* input_scale;  // [batch, groups, image], or null for 1
  const int32_t* threshold;  // [channels]; null: numbers leave, not signs
  const bool* flip;          // [channels], with threshold

  void* output;        // signs: [batch, image, out_groups, packed_bytes], zeroed before
  Dtype dtype;         // of numbers
  bool channels_last;  // numbers as [batch, image, channels], else as [batch, channels, image]
  int64_t channels;    // output channels of all groups
  int64_t image;       // output pixels of one image
  int64_t out_groups;  // of the signs
};

// Where a number lies in the output; `pixel` counts through the batch.
static constexpr int64_t output_index(const BinaryEpilogue& e, int64_t pixel, int64_t o) {
  if (e.channels_last) return pixel * e.channels + o;
  return (pixel / e.image * e.channels + o) * e.image + pixel % e.image;
}

// Which channel of its group of signs output channel `o` is; its bit is the rest by 8.
static constexpr int64_t sign_channel(const BinaryEpilogue& e, int64_t o) {
  return o % (e.channels / e.out_groups);
}

// The byte that holds it.
static inline uint8_t* sign_byte(const BinaryEpilogue& e, int64_t pixel, int64_t o) {
  const int64_t per_group = e.channels / e.out_groups;
  const int64_t group = pixel * e.out_groups + o / per_group;
  return static_cast<uint8_t*>(e.output) + group * packed_bytes(per_group) + sign_channel(e, o) / 8;
}

// Whether no byte of signs is written by two blocks of outputs, which threads may share out.
static inline bool blocks_own_their_bytes(const BinaryEpilogue& e, int64_t groups) {
  if (!e.threshold || (groups == 1 && e.out_groups == 1)) return true;
  return e.channels / groups % 8 == 0 && e.channels / e.out_groups % 8 == 0;
}

// One dot product, of a pixel and the output channel `o`.
static inline void store_dot(const BinaryEpilogue& e, int32_t dot, float input_scale, int64_t pixel,
                             int64_t o) {
  if (e.threshold) {
    const bool positive = (dot >= e.threshold[o]) != e.flip[o];
    *sign_byte(e, pixel, o) |= static_cast<uint8_t>(positive << sign_channel(e, o) % 8);
    return;
  }
  float y = static_cast<float>(dot);
  if (e.scale) y *= e.scale[o];
  if (e.input_scale) y *= input_scale;
  if (e.bias) y += e.bias[o];
  store_float(y, e.dtype, e.output, output_index(e, pixel, o));
}

}  // namespace nncx
