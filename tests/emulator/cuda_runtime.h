// Stand-in for CUDA's header: the language, the functions and the part of the runtime that csrc/cuda
// uses, for g++. What is missing here is not used yet: add it in the form of its neighbours.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __restrict__
#define __shared__ static thread_local  // emulator.cpp says why
#define __align__(n) __attribute__((aligned(n)))
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __builtin_assume(condition) ((void)0)

// ------------------------------------------------------------------------------------------------
// Types.

#define NNCX_VECTORS(type, name, bytes)                                         \
  struct name##1 { type x; };                                                   \
  struct alignas(2 * bytes) name##2 { type x, y; };                             \
  struct name##3 { type x, y, z; };                                             \
  struct alignas(4 * bytes > 16 ? 16 : 4 * bytes) name##4 { type x, y, z, w; }; \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; }              \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
#define uint3 uint3_of_cuda  // emulator.h has it
NNCX_VECTORS(signed char, char, 1)
NNCX_VECTORS(unsigned char, uchar, 1)
NNCX_VECTORS(short, short, 2)
NNCX_VECTORS(unsigned short, ushort, 2)
NNCX_VECTORS(int, int, 4)
NNCX_VECTORS(unsigned, uint, 4)
NNCX_VECTORS(long long, longlong, 8)
NNCX_VECTORS(unsigned long long, ulonglong, 8)
NNCX_VECTORS(float, float, 4)
NNCX_VECTORS(double, double, 8)
#undef uint3
#undef NNCX_VECTORS

// ------------------------------------------------------------------------------------------------
// Synchronization and warp-wide functions. Their last argument is nobody's: it says who calls.

#define NNCX_PLACE nncx::emulator::Place where = nncx::emulator::Place::current()

inline void __syncthreads(NNCX_PLACE) { nncx::emulator::meet_threads(0, 0, where); }
inline void __syncwarp(unsigned mask = 0xFFFFFFFF, NNCX_PLACE) {
  nncx::emulator::meet_lanes(mask, nullptr, nullptr, "__syncwarp", where);
}
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __nanosleep(unsigned) {}

namespace nncx::emulator {

struct Vote {
  bool yes;
  unsigned votes;
};

inline unsigned vote(unsigned mask, bool yes, const char* what, Place where) {
  const auto count = [](Vote* const* lanes) {
    unsigned votes = 0;
    for (int i = 0; i < kWarp; ++i) votes |= unsigned{lanes[i] && lanes[i]->yes} << i;
    for (int i = 0; i < kWarp; ++i) {
      if (lanes[i]) lanes[i]->votes = votes;
    }
  };
  return meet<Vote>(mask, {yes, 0}, count, what, where).votes;
}

template <class T>
struct Shuffled {
  T value, result;
  int source;
};

// Every lane gets the value of lane `source`.
template <class T>
T shuffle(unsigned mask, T value, int source, Place where) {
  const auto exchange = [](Shuffled<T>* const* lanes) {
    for (int i = 0; i < kWarp; ++i) {
      if (!lanes[i]) continue;
      const auto* source = lanes[lanes[i]->source];
      if (source) lanes[i]->result = source->value;
    }
  };
  require(mask >> source & 1, "a lane must not read one that is not in the mask", where);
  return meet<Shuffled<T>>(mask, {value, value, source}, exchange, "__shfl_sync", where).result;
}

// The sum of an unsigned or signed number over the lanes, and the like.
template <class T>
struct Reduced {
  T value, result;
};

template <class T, class Operation>
T reduce(unsigned mask, T value, Operation, const char* what, Place where) {
  const auto fold = [](Reduced<T>* const* lanes) {
    bool first = true;
    T result{};
    for (int i = 0; i < kWarp; ++i) {
      if (!lanes[i]) continue;
      result = first ? lanes[i]->value : Operation{}(result, lanes[i]->value);
      first = false;
    }
    for (int i = 0; i < kWarp; ++i) {
      if (lanes[i]) lanes[i]->result = result;
    }
  };
  return meet<Reduced<T>>(mask, {value, value}, fold, what, where).result;
}

inline int lane_index() { return thread_index() % kWarp; }

}  // namespace nncx::emulator

inline unsigned __ballot_sync(unsigned mask, int yes, NNCX_PLACE) {
  return nncx::emulator::vote(mask, yes != 0, "__ballot_sync", where);
}
inline int __any_sync(unsigned mask, int yes, NNCX_PLACE) {
  return nncx::emulator::vote(mask, yes != 0, "__any_sync", where) != 0;
}
inline int __all_sync(unsigned mask, int yes, NNCX_PLACE) {
  return nncx::emulator::vote(mask, yes != 0, "__all_sync", where) == mask;
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, NNCX_PLACE) {
  const int lane = nncx::emulator::lane_index();
  return nncx::emulator::shuffle(mask, value, (lane & -width) | (source & (width - 1)), where);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, NNCX_PLACE) {
  const int lane = nncx::emulator::lane_index(), source = lane ^ bits;
  const bool inside = source < (lane & -width) + width;
  return nncx::emulator::shuffle(mask, value, inside ? source : lane, where);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32, NNCX_PLACE) {
  const int lane = nncx::emulator::lane_index(), source = lane + static_cast<int>(by);
  const bool inside = source < (lane & -width) + width;
  return nncx::emulator::shuffle(mask, value, inside ? source : lane, where);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32, NNCX_PLACE) {
  const int lane = nncx::emulator::lane_index(), source = lane - static_cast<int>(by);
  const bool inside = source >= (lane & -width);
  return nncx::emulator::shuffle(mask, value, inside ? source : lane, where);
}

template <class T>
T __reduce_add_sync(unsigned mask, T value, NNCX_PLACE) {
  const auto add = [](T a, T b) { return a + b; };
  return nncx::emulator::reduce(mask, value, add, "__reduce_add_sync", where);
}
template <class T>
T __reduce_min_sync(unsigned mask, T value, NNCX_PLACE) {
  const auto smaller = [](T a, T b) { return std::min(a, b); };
  return nncx::emulator::reduce(mask, value, smaller, "__reduce_min_sync", where);
}
template <class T>
T __reduce_max_sync(unsigned mask, T value, NNCX_PLACE) {
  const auto larger = [](T a, T b) { return std::max(a, b); };
  return nncx::emulator::reduce(mask, value, larger, "__reduce_max_sync", where);
}
template <class T>
T __reduce_or_sync(unsigned mask, T value, NNCX_PLACE) {
  const auto either = [](T a, T b) { return a | b; };
  return nncx::emulator::reduce(mask, value, either, "__reduce_or_sync", where);
}

// ------------------------------------------------------------------------------------------------
// Atomics: a fiber is interrupted only where it waits, so plain code is atomic.

template <class T>
T atomicExch(T* address, std::type_identity_t<T> value) {
  return std::exchange(*address, value);
}
template <class T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  return std::exchange(*address, static_cast<T>(*address + value));
}
template <class T>
T atomicOr(T* address, std::type_identity_t<T> value) {
  return std::exchange(*address, static_cast<T>(*address | value));
}
template <class T>
T atomicAnd(T* address, std::type_identity_t<T> value) {
  return std::exchange(*address, static_cast<T>(*address & value));
}
template <class T>
T atomicXor(T* address, std::type_identity_t<T> value) {
  return std::exchange(*address, static_cast<T>(*address ^ value));
}
template <class T>
T atomicMin(T* address, std::type_identity_t<T> value) {
  return std::exchange(*address, std::min(*address, value));
}
template <class T>
T atomicMax(T* address, std::type_identity_t<T> value) {
  return std::exchange(*address, std::max(*address, value));
}
template <class T>
T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  return std::exchange(*address, *address == expected ? value : *address);
}

// ------------------------------------------------------------------------------------------------
// Integers, bits and numbers.

using std::max;
using std::min;
inline unsigned min(unsigned a, int b) { return std::min(a, static_cast<unsigned>(b)); }
inline unsigned max(unsigned a, int b) { return std::max(a, static_cast<unsigned>(b)); }

inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return x == 0 ? 0 : std::countr_zero(static_cast<unsigned>(x)) + 1; }
inline unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int i = 0; i < 32; ++i) reversed |= (x >> i & 1) << (31 - i);
  return reversed;
}

inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const uint64_t bytes = uint64_t{high} << 32 | low;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned choice = selector >> (4 * i);
    auto byte = static_cast<uint8_t>(bytes >> (8 * (choice & 7)));
    if (choice & 8) byte = byte & 0x80 ? 0xFF : 0;
    result |= unsigned{byte} << (8 * i);
  }
  return result;
}

inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned by) {
  return static_cast<unsigned>((uint64_t{high} << 32 | low) >> (by & 31));
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned by) {
  return static_cast<unsigned>((uint64_t{high} << 32 | low) << (by & 31) >> 32);
}

inline int __dp4a(int a, int b, int sum) {
  auto total = static_cast<unsigned>(sum);
  for (int i = 0; i < 32; i += 8) {
    total += static_cast<unsigned>(static_cast<int8_t>(a >> i) * static_cast<int8_t>(b >> i));
  }
  return static_cast<int>(total);
}
inline unsigned __dp4a(unsigned a, unsigned b, unsigned sum) {
  for (int i = 0; i < 32; i += 8) sum += (a >> i & 0xFF) * (b >> i & 0xFF);
  return sum;
}

inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
// Beyond an int the GPU takes the nearest one, and 0 for NaN.
inline int __float2int_rn(float x) {
  if (x != x) return 0;
  if (x >= 0x1p31f) return INT32_MAX;
  return x < -0x1p31f ? INT32_MIN : static_cast<int>(std::nearbyint(x));
}

// Reads and writes with a hint for the caches.
template <class T>
T __ldg(const T* address) {
  return *address;
}
template <class T>
T __ldcs(const T* address) {
  return *address;
}
template <class T>
T __ldcg(const T* address) {
  return *address;
}
template <class T>
void __stcs(T* address, std::type_identity_t<T> value) {
  *address = value;
}
template <class T>
void __stcg(T* address, std::type_identity_t<T> value) {
  *address = value;
}

// ------------------------------------------------------------------------------------------------
// The runtime.

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorInvalidDevice = 101,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorUnsupportedPtxVersion = 222,
  cudaErrorNotSupported = 801,
};

enum cudaDeviceAttr {
  cudaDevAttrMaxSharedMemoryPerBlock,
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
};

struct cudaFuncAttributes {
  size_t sharedSizeBytes;
  int ptxVersion, binaryVersion, maxThreadsPerBlock, maxDynamicSharedSizeBytes, numRegs;
};

using cudaStream_t = struct CUstream_st*;

cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaGetDevice(int* current);
cudaError_t cudaSetDevice(int chosen);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel);
template <class... Parameters>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*kernel)(Parameters...)) {
  return cudaFuncGetAttributes(attributes, reinterpret_cast<const void*>(kernel));
}

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "an error of the emulator";
}
inline cudaError_t cudaMemsetAsync(void* address, int value, size_t bytes, cudaStream_t = nullptr) {
  std::memset(address, value, bytes);
  return cudaSuccess;
}
