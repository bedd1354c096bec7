// Tensor maps: what TMA knows of a tensor, in 128 bytes that kernels take as __grid_constant__
// arguments and never look into. Made by the driver, which is asked through the runtime, so that
// nothing is linked against libcuda.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/tensor_boxes.h"

namespace nncx::cuda {

struct alignas(64) TensorMap {
  uint8_t bytes[128];
};

namespace detail {

// The driver's function of that name, as CUDA 12.0 defined it.
inline cudaError_t find_driver_function(const char* name, void** function) {
  cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion(name, function, 12000, cudaEnableDefault, &found);
#else
  const cudaError_t error = cudaGetDriverEntryPoint(name, function, cudaEnableDefault, &found);
#endif
  if (error != cudaSuccess) return error;
  return found == cudaDriverEntryPointSuccess ? cudaSuccess : cudaErrorCallRequiresNewerDriver;
}

// Found once in the process.
template <class Function>
struct DriverFunction {
  Function* function = nullptr;
  cudaError_t error;

  explicit DriverFunction(const char* name)
      : error(find_driver_function(name, reinterpret_cast<void**>(&function))) {}

  template <class... Arguments>
  int operator()(Arguments... arguments) const {
    if (error != cudaSuccess) return error;
    return function(arguments...) == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
  }
};

inline CUtensorMap* handle(TensorMap& map) { return reinterpret_cast<CUtensorMap*>(map.bytes); }

inline CUtensorMapSwizzle swizzle_of(uint32_t bytes) {
  switch (bytes) {
    case 32:
      return CU_TENSOR_MAP_SWIZZLE_32B;
    case 64:
      return CU_TENSOR_MAP_SWIZZLE_64B;
    case 128:
      return CU_TENSOR_MAP_SWIZZLE_128B;
  }
  return CU_TENSOR_MAP_SWIZZLE_NONE;
}

}  // namespace detail

// Both return a cudaError_t: cudaErrorInvalidValue where the driver refuses the map.
inline int encode_tiled(TensorMap& map, const TiledMap& m) {
  static const detail::DriverFunction<decltype(cuTensorMapEncodeTiled)> encode(
      "cuTensorMapEncodeTiled");
  const cuuint64_t sizes[] = {m.width, m.height};
  const cuuint64_t strides[] = {m.row_stride};
  const cuuint32_t box[] = {m.box_width, m.box_height};
  const cuuint32_t steps[] = {1, 1};
  return encode(detail::handle(map), CU_TENSOR_MAP_DATA_TYPE_UINT8, 2u,
                const_cast<void*>(m.address), sizes, strides, box, steps,
                CU_TENSOR_MAP_INTERLEAVE_NONE, detail::swizzle_of(m.swizzle),
                CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}

inline int encode_im2col(TensorMap& map, const Im2colMap& m) {
  static const detail::DriverFunction<decltype(cuTensorMapEncodeIm2col)> encode(
      "cuTensorMapEncodeIm2col");
  const cuuint64_t sizes[] = {m.channels, m.width, m.height, m.batch};
  const cuuint64_t strides[] = {m.stride_w, m.stride_h, m.stride_n};
  const int lower[] = {m.lower_w, m.lower_h};  // in the order of the sizes, whatever cuda.h says
  const int upper[] = {m.upper_w, m.upper_h};
  const cuuint32_t steps[] = {1, m.step_w, m.step_h, 1};
  return encode(detail::handle(map), CU_TENSOR_MAP_DATA_TYPE_UINT8, 4u,
                const_cast<void*>(m.address), sizes, strides, lower, upper, m.channels_per_pixel,
                m.pixels_per_column, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                detail::swizzle_of(m.swizzle), CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}

}  // namespace nncx::cuda
