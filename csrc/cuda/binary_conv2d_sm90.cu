// The sm_90a kernels of binary_conv2d, on their own since they compile longest.
#include "cuda/gemm_sm90.h"

namespace nncx::cuda {

template int run_sm90<BinaryGemm>(const BinaryConv2dParams&, const GemmProblem&, const GemmPlan&,
                                  const Device&, cudaStream_t);

}  // namespace nncx::cuda
