// Stand-in for csrc/cuda/ptx_sm90.h: mbarriers, TMA and wgmma after the PTX manual, written from it
// and not from the kernels, so that a misreading on either side shows.
#pragma once

#include "cuda_runtime.h"
#include "mbarrier.h"
#include "tma.h"
#include "wgmma.h"

namespace nncx::cuda::ptx {

inline void named_barrier(int id, int threads, NNCX_PLACE) {
  emulator::meet_threads(id, threads, where);
}

// Registers are not counted.
template <int N>
void registers_increase() {
  static_assert(24 <= N && N <= 256 && N % 8 == 0);
}
template <int N>
void registers_decrease() {
  static_assert(24 <= N && N <= 256 && N % 8 == 0);
}

}  // namespace nncx::cuda::ptx

// CUDA's: the address of shared memory in its own space.
inline size_t __cvta_generic_to_shared(const void* pointer) {
  return nncx::cuda::ptx::shared_address(pointer);
}
