// binary_conv2d on CUDA: a GEMM (gemm.h) of bits.
#include "binary_conv2d.h"
#include "cuda/gemm.h"
#include "cuda/gemm_prepack.h"

namespace nncx::cuda {

int binary_conv2d_prepack(const BinaryWeightShape& s, const uint8_t* weight, uint8_t* prepacked,
                          void* stream) {
  return prepack_gemm<BinaryFilters>(binary_gemm_weight(s), weight, prepacked, stream);
}

int binary_conv2d(const BinaryConv2dParams& p, void* stream) {
  return run_gemm<BinaryGemm>(p, stream);
}

}  // namespace nncx::cuda
