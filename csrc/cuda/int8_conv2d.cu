// int8_conv2d on CUDA: a GEMM (gemm.h) of bytes.
#include "cuda/gemm.h"
#include "cuda/gemm_prepack.h"
#include "int8_conv2d.h"

namespace nncx::cuda {

int int8_conv2d_prepack(const Conv2dWeightShape& s, const int8_t* weight, uint8_t* prepacked,
                        void* stream) {
  return prepack_gemm<Int8Filters>(int8_gemm_weight(s), reinterpret_cast<const uint8_t*>(weight),
                                   prepacked, stream);
}

int int8_conv2d(const Int8Conv2dParams& p, void* stream) { return run_gemm<Int8Gemm>(p, stream); }

}  // namespace nncx::cuda
