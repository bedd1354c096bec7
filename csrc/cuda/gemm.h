// A GEMM op on the current GPU: the kernel that the shape rule names.
#pragma once

#include <cuda_runtime.h>

#include "cuda/device.h"
#include "cuda/gemm_plan.h"
#include "cuda/gemm_skinny.h"
#include "cuda/gemm_sm80.h"

namespace nncx::cuda {

template <class Op>
GemmProblem gemm_problem(const typename Op::Params& p) {
  return {p, p.shape, Op::weight(p.shape).channel_bytes, reinterpret_cast<uintptr_t>(p.input)};
}

// In <op>_sm90.cu, from gemm_sm90.h: no other code of the op takes as long to compile.
template <class Op>
int run_sm90(const typename Op::Params& p, const GemmProblem& problem, const GemmPlan& plan,
             const Device& device, cudaStream_t stream);

// Enqueues it and returns the launch's cudaError_t.
template <class Op>
int run_gemm(const typename Op::Params& p, void* stream) {
  Device device;
  if (const int error = current_device(device)) return error;
  const GemmProblem problem = gemm_problem<Op>(p);
  const GemmPlan plan = gemm_plan(problem, device);
  switch (plan.kernel) {
    case GemmKernel::skinny:
      return run_skinny<Op>(p, problem, plan, static_cast<cudaStream_t>(stream));
    case GemmKernel::sm90:
      return run_sm90<Op>(p, problem, plan, device, static_cast<cudaStream_t>(stream));
    case GemmKernel::sm80:
    case GemmKernel::cuda_cores:
      return run_sm80<Op>(p, problem, plan, static_cast<cudaStream_t>(stream));
  }
  return cudaErrorNotSupported;
}

}  // namespace nncx::cuda
