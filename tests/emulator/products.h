// The products of mma and wgmma: 32 bytes of a row with 32 bytes of a column.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

namespace nncx::emulator {

// 256 bits: how many are set in both.
inline int dot_b1(const uint32_t* a, const uint32_t* b) {
  int sum = 0;
  for (int i = 0; i < 8; i += 2) {
    uint64_t x, y;
    std::memcpy(&x, a + i, 8);
    std::memcpy(&y, b + i, 8);
    sum += std::popcount(x & y);
  }
  return sum;
}

// 32 int8: the sum of products.
inline int dot_s8(const uint32_t* a, const uint32_t* b) {
  const auto* x = reinterpret_cast<const int8_t*>(a);
  const auto* y = reinterpret_cast<const int8_t*>(b);
  int sum = 0;
  for (int i = 0; i < 32; ++i) sum += x[i] * y[i];
  return sum;
}

}  // namespace nncx::emulator
