// Division by a number that the host knows: on a GPU a 64-bit division takes about 100 instructions,
// this about 10. Plain C++.
#pragma once

#include <bit>
#include <cstdint>

namespace nncx::cuda {

// For n < 2^63, 2^(s-1) < d <= 2^s and m = ceil(2^(63+s) / d), n * m / 2^(63+s) exceeds n / d by less
// than 1 / d, so that its floor is the quotient; and m < 2^64.
class Divider {
 public:
  constexpr explicit Divider(int64_t divisor)  // at least 1
      : divisor_(divisor),
        shift_(std::bit_width(static_cast<uint64_t>(divisor) - 1)),
        multiplier_(static_cast<uint64_t>(((Wide{1} << (63 + shift_)) + divisor - 1) / divisor)) {}

  constexpr int64_t divisor() const { return divisor_; }

  constexpr int64_t quotient(int64_t n) const {  // n at least 0
    const auto doubled = static_cast<uint64_t>(n) * 2;
    return static_cast<int64_t>(static_cast<uint64_t>(Wide{doubled} * multiplier_ >> 64) >> shift_);
  }

 private:
  using Wide = unsigned __int128;

  int64_t divisor_;
  int shift_;
  uint64_t multiplier_;
};

static_assert(Divider(1).quotient(INT64_MAX) == INT64_MAX);
static_assert(Divider(7).quotient(INT64_MAX) == INT64_MAX / 7);
static_assert(Divider(7).quotient(INT64_MAX / 7 * 7 - 1) == INT64_MAX / 7 - 1);
static_assert(Divider((int64_t{1} << 62) + 1).quotient(INT64_MAX) == 1);

}  // namespace nncx::cuda
