// The instructions of the sm_90a kernels, one function each. They exist in code compiled for 9.0a
// alone: whatever calls them is compiled only where __CUDA_ARCH_FEAT_SM90_ALL is defined.
#pragma once

#include <cstdint>

#include "cuda/ptx_sm80.h"
#include "cuda/tensor_map.h"

namespace nncx::cuda::ptx {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// ------------------------------------------------------------------------------------------------
// mbarrier: a phase is complete when all arrivals have come and all bytes that they announced.

using Barrier = uint64_t;  // in shared memory

__device__ inline void barrier_init(Barrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}

// Shows new barriers to TMA. A __syncthreads shows them to the other threads.
__device__ inline void barrier_fence_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ inline void barrier_arrive(Barrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

__device__ inline void barrier_arrive_expect(Barrier* barrier, int bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}

// Arrives when this thread's cp_async until now have landed.
__device__ inline void cp_async_arrive(Barrier* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

// Until the phase of that parity is complete; that before the first one is.
__device__ inline void barrier_wait(Barrier* barrier, int parity) {
  uint32_t complete;
  do {
    asm volatile(
        "{\n\t"
        ".reg .pred complete;\n\t"
        "mbarrier.try_wait.parity.shared::cta.b64 complete, [%1], %2;\n\t"
        "selp.u32 %0, 1, 0, complete;\n\t"
        "}"
        : "=r"(complete)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  } while (!complete);
}

// Until so many threads are there. Barrier 0 is that of __syncthreads.
__device__ inline void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Between what ordinary instructions and cp_async did in shared memory, seen by this thread, and
// what TMA and wgmma do there later.
__device__ inline void fence_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ------------------------------------------------------------------------------------------------
// TMA: one thread starts a copy of a box to shared memory, whose bytes arrive at the barrier. What is
// outside the tensor reads as zeros, and counts as bytes.

__device__ inline void tma_prefetch(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

__device__ inline void tma_load_2d(void* shared, const TensorMap* map, Barrier* barrier, int x,
                                   int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3}], [%4];" ::"r"(shared_address(shared)),
      "l"(map), "r"(x), "r"(y), "r"(shared_address(barrier))
      : "memory");
}

// Pixels from (w, h) of image n on, through the map's box; each is read `offset` further.
__device__ inline void tma_load_im2col(void* shared, const TensorMap* map, Barrier* barrier, int c,
                                       int w, int h, int n, uint16_t offset_w, uint16_t offset_h) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %4, %5}], [%6], {%7, %8};" ::"r"(shared_address(shared)),
      "l"(map), "r"(c), "r"(w), "r"(h), "r"(n), "r"(shared_address(barrier)), "h"(offset_w),
      "h"(offset_h)
      : "memory");
}

// ------------------------------------------------------------------------------------------------
// wgmma: the 128 threads of a warpgroup start d[64][N] (+)= a[64][32 bytes] . b[N][32 bytes], with
// a and b in shared memory. With g = lane / 4 and t = lane % 4, register i of a warp's thread is
// row 16 * warp + g + 8 * (i / 2 % 2), column 8 * (i / 4) + 2 * t + i % 2. Until wgmma_wait neither
// the registers nor a and b may be touched.

__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ inline void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int Pending>
__device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}

// The registers of an instruction, as text and as operands; what follows them is numbered after.
#define NNCX_NAMES_32                                                                \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, " \
  "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NNCX_NAMES_64                                                                  \
  NNCX_NAMES_32                                                                        \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define NNCX_NAMES_128                                                                   \
  NNCX_NAMES_64                                                                          \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "   \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "     \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, "     \
  "%110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, " \
  "%124, %125, %126, %127"
#define NNCX_REGISTERS_8(i)                                                                   \
  "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3]), "+r"(d[i + 4]), "+r"(d[i + 5]), \
      "+r"(d[i + 6]), "+r"(d[i + 7])
#define NNCX_REGISTERS_32(i) \
  NNCX_REGISTERS_8(i), NNCX_REGISTERS_8(i + 8), NNCX_REGISTERS_8(i + 16), NNCX_REGISTERS_8(i + 24)
#define NNCX_REGISTERS_64(i) NNCX_REGISTERS_32(i), NNCX_REGISTERS_32(i + 32)
#define NNCX_REGISTERS_128(i) NNCX_REGISTERS_64(i), NNCX_REGISTERS_64(i + 64)

#define NNCX_WGMMA(instruction, registers, operand_a, operand_b, operand_accumulate)              \
  asm volatile(                                                                                   \
      "{\n\t"                                                                                     \
      ".reg .pred accumulate;\n\t"                                                                \
      "setp.ne.b32 accumulate, " operand_accumulate                                               \
      ", 0;\n\t"                                                                                  \
      "wgmma.mma_async.sync.aligned." instruction " {" NNCX_NAMES_##registers "}, " operand_a     \
                                                                              ", " operand_b      \
                                                                              ", accumulate;\n\t" \
                                                                              "}"                 \
      : NNCX_REGISTERS_##registers(0)                                                             \
      : "l"(a), "l"(b), "r"(int{accumulate}))

template <int N>
__device__ inline void wgmma_b1_and(int32_t (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(N == 64 || N == 128 || N == 256);
  if constexpr (N == 64) {
    NNCX_WGMMA("m64n64k256.s32.b1.b1.and.popc", 32, "%32", "%33", "%34");
  } else if constexpr (N == 128) {
    NNCX_WGMMA("m64n128k256.s32.b1.b1.and.popc", 64, "%64", "%65", "%66");
  } else {
    NNCX_WGMMA("m64n256k256.s32.b1.b1.and.popc", 128, "%128", "%129", "%130");
  }
}

template <int N>
__device__ inline void wgmma_s8(int32_t (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(N == 64 || N == 128 || N == 256);
  if constexpr (N == 64) {
    NNCX_WGMMA("m64n64k32.s32.s8.s8", 32, "%32", "%33", "%34");
  } else if constexpr (N == 128) {
    NNCX_WGMMA("m64n128k32.s32.s8.s8", 64, "%64", "%65", "%66");
  } else {
    NNCX_WGMMA("m64n256k32.s32.s8.s8", 128, "%128", "%129", "%130");
  }
}

#undef NNCX_WGMMA
#undef NNCX_REGISTERS_128
#undef NNCX_REGISTERS_64
#undef NNCX_REGISTERS_32
#undef NNCX_REGISTERS_8
#undef NNCX_NAMES_128
#undef NNCX_NAMES_64
#undef NNCX_NAMES_32

// ------------------------------------------------------------------------------------------------
// Registers move between warpgroups; all warps of one call it.

template <int N>
__device__ inline void registers_increase() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

template <int N>
__device__ inline void registers_decrease() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

#endif

}  // namespace nncx::cuda::ptx
