// The instructions of the sm_80 kernels, one function each. Code that is compiled for less than 8.0
// copies at once instead of asynchronously, and has no mma: kernels ask compiled_for.
#pragma once

#include <cstdint>

namespace nncx::cuda::ptx {

// Whether the code at hand is compiled for that or more: 75, 80, 90. Known to the compiler, so that
// nothing is left of a branch not taken.
__device__ constexpr bool compiled_for(int architecture) {
#ifdef __CUDA_ARCH__
  return __CUDA_ARCH__ >= architecture * 10;
#else
  return architecture == 0;  // on the host nothing of a kernel runs
#endif
}

__device__ inline uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// The other way. A kernel that computes addresses by bits has no base to add to them then.
__device__ inline uint8_t* shared_pointer(uint32_t address) {
  return static_cast<uint8_t*>(__cvta_shared_to_generic(address));
}

// Asks for a line of global memory, to be in the L2 cache when a later load wants it.
__device__ inline void prefetch(const void* global) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(global));
}

// Global to shared memory, 4, 8 or 16 bytes, aligned so; zeros where not `valid`, and then `global`
// is not read. A thread's copies since its last commit are a group; wait<Pending> returns when all
// but the last `Pending` groups have landed. What other threads copied is there after a barrier.
template <int Bytes>
__device__ inline void cp_async(void* shared, const void* global, bool valid) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  const int read = valid ? Bytes : 0;
  if constexpr (Bytes == 16) {  // past L1, which other blocks' tiles would flush
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
                 "l"(global), "r"(read)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)),
                 "l"(global), "n"(Bytes), "r"(read)
                 : "memory");
  }
#else
  if constexpr (Bytes == 16) {
    *static_cast<uint4*>(shared) = valid ? *static_cast<const uint4*>(global) : uint4{};
  } else if constexpr (Bytes == 8) {
    *static_cast<uint2*>(shared) = valid ? *static_cast<const uint2*>(global) : uint2{};
  } else {
    *static_cast<uint32_t*>(shared) = valid ? *static_cast<const uint32_t*>(global) : 0;
  }
#endif
}

__device__ inline void cp_async_commit() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

template <int Pending>
__device__ inline void cp_async_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
#endif
}

// Four 8 x 8 matrices of 16-bit words: lane i names row i % 8 of matrix i / 8, 16 bytes in shared
// memory; register m of lane i gets the 4-byte word i % 4 of row i / 4 of matrix m.
__device__ inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// d[16][8] += a[16][32 bytes] . b[8][32 bytes]. With g = lane / 4 and t = lane % 4, in 4-byte words:
//   a  register i: row g + 8 * (i % 2), word t + 4 * (i / 2)
//   b  register i: column g, word t + 4 * i
//   d  register i: row g + 8 * (i / 2), column 2 * t + i % 2
// A product is popcount(a & b) of 256 bits, or that of 32 int8.
__device__ inline void mma_b1_and(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

__device__ inline void mma_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// The same shape in 16-bit words: d[16][8] += a[16][16] . b[8][16], in float32.
__device__ inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

__device__ inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

}  // namespace nncx::cuda::ptx
