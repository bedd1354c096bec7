// Numbers in memory, of a format that is known at run time; and the lanes of a warp.
#pragma once

#include "cuda/convert.h"
#include "dtype.h"

namespace nncx::cuda {

constexpr unsigned kAllLanes = 0xFFFFFFFF;

// Whether four neighbours are one access, of a tensor whose numbers have `bytes`.
__host__ __device__ inline bool is_aligned(const void* tensor, int bytes) {
  return reinterpret_cast<uintptr_t>(tensor) % (4 * bytes) == 0;
}

__host__ __device__ inline int bytes_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

__device__ inline float load_number(const void* input, Dtype dtype, int64_t at) {
  if (dtype == Dtype::float32) return static_cast<const float*>(input)[at];
  if (dtype == Dtype::float16) return to_float(static_cast<const Half*>(input)[at]);
  return to_float(static_cast<const BFloat16*>(input)[at]);
}

__device__ inline void store_number(float v, Dtype dtype, void* output, int64_t at) {
  if (dtype == Dtype::float32) {
    static_cast<float*>(output)[at] = v;
  } else if (dtype == Dtype::float16) {
    from_float(v, static_cast<Half*>(output) + at);
  } else {
    from_float(v, static_cast<BFloat16*>(output) + at);
  }
}

}  // namespace nncx::cuda
