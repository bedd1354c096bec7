// Stand-in for csrc/cuda/convert.h: the functions of dtype.h do it.
#pragma once

#include "cuda_runtime.h"
#include "dtype.h"

namespace nncx::cuda {

template <class T>
float to_float(T x) {
  return load_float(x);
}

template <class T>
void from_float(float x, T* out) {
  store_float(x, out);
}

template <class T>
uint32_t pair_from_floats(float first, float second) {
  T low, high;
  store_float(first, &low);
  store_float(second, &high);
  return uint32_t{high.bits} << 16 | low.bits;
}

inline uint32_t half_pair(float first, float second) {
  return pair_from_floats<Half>(first, second);
}
inline uint32_t bfloat16_pair(float first, float second) {
  return pair_from_floats<BFloat16>(first, second);
}

}  // namespace nncx::cuda
