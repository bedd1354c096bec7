// Conversions between float and the 16-bit formats in hardware: the values of dtype.h, while a NaN
// becomes a NaN of the GPU's choice.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace nncx::cuda {

__device__ inline float to_float(float x) { return x; }

__device__ inline float to_float(BFloat16 x) { return __uint_as_float(uint32_t{x.bits} << 16); }

__device__ inline float to_float(Half x) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
  return value;
}

__device__ inline void from_float(float x, float* out) { *out = x; }

__device__ inline void from_float(float x, Half* out) {
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out->bits) : "f"(x));
}

__device__ inline void from_float(float x, BFloat16* out) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out->bits) : "f"(x));
#else
  const uint32_t bits = __float_as_uint(x);
  const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  out->bits = static_cast<uint16_t>(x != x ? 0x7FFF : rounded);
#endif
}

// Two neighbours in one word, as they lie in memory.
__device__ inline uint32_t half_pair(float first, float second) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
#else
  Half low, high;
  from_float(first, &low);
  from_float(second, &high);
  return uint32_t{high.bits} << 16 | low.bits;
#endif
}

__device__ inline uint32_t bfloat16_pair(float first, float second) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
#else
  BFloat16 low, high;
  from_float(first, &low);
  from_float(second, &high);
  return uint32_t{high.bits} << 16 | low.bits;
#endif
}

}  // namespace nncx::cuda
