#include "cuda/gemm_weight.h"

#include "binary_conv2d.h"
#include "int8_conv2d.h"

namespace nncx::cuda {

int64_t binary_conv2d_prepacked_bytes(const BinaryWeightShape& s) {
  return binary_gemm_weight(s).bytes();
}

int64_t int8_conv2d_prepacked_bytes(const Conv2dWeightShape& s) {
  return int8_gemm_weight(s).bytes();
}

}  // namespace nncx::cuda
