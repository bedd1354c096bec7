// Addresses in shared memory as TMA and wgmma understand them.
#pragma once

#include <cstdint>

#include "emulator.h"

namespace nncx::cuda::ptx {

// The swizzle of `span` (0, 32, 64, 128) bytes: within 16-byte chunks nothing moves; a chunk's number
// in its span is xored with the number of its 128-byte line.
inline uint64_t swizzled(uint64_t address, uint32_t span) {
  const uint64_t mask = span == 0 ? 0 : span / 16 - 1;
  return address ^ (address >> 7 & mask) << 4;
}

// Shared memory's own addresses. Kernels and the manual count in these; the first KB is CUDA's.
inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const uint8_t*>(pointer) -
                               emulator::dynamic_shared_memory()) +
         1024;
}
inline uint8_t* shared_pointer(uint64_t address) {
  return emulator::dynamic_shared_memory() + (address - 1024);
}

}  // namespace nncx::cuda::ptx
