// Stand-in for CUDA's header: the language, the functions and the part of the runtime that
// csrc/cuda uses, for g++. What is missing here is not used yet: add it in the form of its
// neighbours.
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
#define __host__
#define __device__
#define __host__
#define __shared__ static thread_local  // emulator.cpp says why
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
#define __grid_constant__

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
NNCX_VECTORS(int, int, 4)
NNCX_VECTORS(unsigned, uint, 4)
NNCX_VECTORS(float, float, 4)
#undef uint3
#undef NNCX_VECTORS

// ------------------------------------------------------------------------------------------------
// Synchronization and warp-wide functions. Their last argument is nobody's: it says who calls.

#define NNCX_PLACE nncx::emulator::Place where = nncx::emulator::Place::current()

inline void __syncthreads(NNCX_PLACE) { nncx::emulator::meet_threads(0, 0, where); }
inline void __syncwarp(unsigned mask = 0xFFFFFFFF, NNCX_PLACE) {
  nncx::emulator::meet_lanes(mask, nullptr, nullptr, "__syncwarp", where);
}

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

inline int lane_index() { return thread_index() % kWarp; }

}  // namespace nncx::emulator

inline unsigned __ballot_sync(unsigned mask, int yes, NNCX_PLACE) {
  return nncx::emulator::vote(mask, yes != 0, "__ballot_sync", where);
}
inline int __any_sync(unsigned mask, int yes, NNCX_PLACE) {
  return nncx::emulator::vote(mask, yes != 0, "__any_sync", where) != 0;
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

// ------------------------------------------------------------------------------------------------
// Atomics: a fiber is interrupted only where it waits, so plain code is atomic.

template <class T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  return std::exchange(*address, static_cast<T>(*address + value));
}
template <class T>
T atomicOr(T* address, std::type_identity_t<T> value) {
  return std::exchange(*address, static_cast<T>(*address | value));
}

// ------------------------------------------------------------------------------------------------
// Integers, bits and numbers.

using std::max;
using std::min;
inline unsigned min(unsigned a, int b) { return std::min(a, static_cast<unsigned>(b)); }
inline unsigned max(unsigned a, int b) { return std::max(a, static_cast<unsigned>(b)); }

inline int __popc(unsigned x) { return std::popcount(x); }

// Byte i of the result is the one of low's and high's eight that four bits of the selector name;
// with their highest bit, the sign of it eight times.
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

inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
// Beyond an int the GPU takes the nearest one, and 0 for NaN.
inline int __float2int_rn(float x) {
  if (x != x) return 0;
  if (x >= 0x1p31f) return INT32_MAX;
  return x < -0x1p31f ? INT32_MIN : static_cast<int>(std::nearbyint(x));
}

template <class T>
T __ldg(const T* address) {
  return *address;
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
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "an error of the emulator";
}
inline cudaError_t cudaMemsetAsync(void* address, int value, size_t bytes, cudaStream_t) {
  std::memset(address, value, bytes);
  return cudaSuccess;
}
