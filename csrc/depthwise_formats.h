// Numbers of any format, written into the scratch of depthwise_conv2d as floats.
#pragma once

#include <algorithm>
#include <type_traits>

#include "avx2/lanes.h"
#include "avx2/transpose.h"
#include "depthwise_conv2d.h"
#include "unroll.h"

namespace nncx {
namespace {

// And up to kLanes - 1 floats more: patches are filled in the order of their addresses.
inline void zero(float* out, int64_t floats) {
  for (int64_t i = 0; i < floats; i += kLanes) store_lanes(_mm256_setzero_ps(), out + i);
}

template <class T>
inline void to_floats(const T* from, int64_t count, float* to) {
  if (count < kLanes) {
    for (int64_t i = 0; i < count; ++i) to[i] = load_float(from[i]);
    return;
  }
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t at = std::min(i, count - kLanes);  // the last may overlap the one before
    store_lanes(load_lanes(from + at), to + at);
  }
}

// [bias, taps...][kVector] of the outputs from `first` on; those that are not there are zeros.
template <int64_t kVector, class T>
void expand_filters(const DepthwiseConv2dParams& p, int64_t first, float* out) {
  const int64_t taps = p.kernel_h * p.kernel_w;
  const int64_t count = std::clamp(depthwise_outputs(p) - first, int64_t{0}, kVector);
  const T* weight = static_cast<const T*>(p.weight) + first * taps;
  const T* bias = static_cast<const T*>(p.bias);
  if (count < kVector) zero(out, (1 + taps) * kVector);
  int64_t transposed = 0;
  if constexpr (std::is_same_v<T, float>) {
    for (; count == kVector && transposed + kLanes <= taps; transposed += kLanes) {
      for (int64_t o = 0; o < kVector; o += kLanes) {
        transpose_8x8(weight + o * taps + transposed, taps, out + (1 + transposed) * kVector + o,
                      kVector);
      }
    }
  }
  for (int64_t o = 0; o < count; ++o) {
    out[o] = bias ? load_float(bias[first + o]) : 0.0f;
    for (int64_t tap = transposed; tap < taps; ++tap) {
      out[(1 + tap) * kVector + o] = load_float(weight[o * taps + tap]);
    }
  }
}

// `count` numbers that are `step` apart.
template <class T>
void take_each(const T* from, int64_t step, int64_t count, float* to) {
  int64_t i = 0;
  if (step == 2) {  // of two vectors, the first half of each 128 bits and the second
    for (; i + kLanes < count; i += kLanes) {
      const __m256 even =
          _mm256_shuffle_ps(load_lanes(from + 2 * i), load_lanes(from + 2 * i + kLanes), 0x88);
      const __m256i order = _mm256_permute4x64_epi64(_mm256_castps_si256(even), 0xD8);
      store_lanes(_mm256_castsi256_ps(order), to + i);
    }
  }
  for (; i < count; ++i) to[i] = load_float(from[step * i]);
}

}  // namespace
}  // namespace nncx
