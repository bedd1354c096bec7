#include "cuda/gemm_plan.h"

#include <algorithm>

namespace nncx::cuda {
namespace {

int piece_of(const GemmProblem& p) {
  for (const int piece : {16, 8, 4}) {
    if (p.channel_bytes % piece == 0 && p.input % piece == 0) return piece;
  }
  return 1;
}

}  // namespace

GemmPlan gemm_plan(const GemmProblem& p, const Device& device) {
  GemmPlan plan{};
  plan.kernel = device.path == Path::cuda_cores ? GemmKernel::cuda_cores : GemmKernel::sm80;
  plan.piece = piece_of(p);
  return plan;
}

}  // namespace nncx::cuda
