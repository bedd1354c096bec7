// The pieces in which memory is read and written: up to 16 bytes, a power of two. Plain C++.
#pragma once

#include <cstdint>

namespace nncx::cuda {

constexpr int kWidestPiece = 16;

// The widest piece that divides all of these addresses and distances.
template <class... Distances>
constexpr int widest_piece(Distances... distances) {
  const auto all = (uint64_t{kWidestPiece} | ... | static_cast<uint64_t>(distances));
  return static_cast<int>(all & (~all + 1));
}

inline uint64_t address_of(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); }

}  // namespace nncx::cuda
