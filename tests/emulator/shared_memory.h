// The shared memory of a block. Both kinds start poisoned.
//
// Static variables are `thread_local` (__shared__ in cuda_runtime.h), because that is the one kind of
// static whose memory can be found: this library's TLS block. Host code may have variables in there
// too, so it gets them back when a launch ends. Out of bounds is found for dynamic memory only.
#pragma once

#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "emulator.h"

namespace nncx::emulator {

constexpr size_t kAlignment = 1024;  // of dynamic shared memory
constexpr size_t kPage = 4096;
constexpr uint8_t kGuard = 0xE7;

struct Range {
  uint8_t* begin = nullptr;
  size_t bytes = 0;
  bool holds(const void* address, size_t size) const {
    const auto offset = static_cast<size_t>(static_cast<const uint8_t*>(address) - begin);
    return offset <= bytes && size <= bytes - offset;
  }
};

inline thread_local char anchor;  // a variable of the block that is looked for

inline Range static_shared_memory() {
  Range range = {reinterpret_cast<uint8_t*>(&anchor), 1};
  const auto visit = [](dl_phdr_info* info, size_t, void* found) {
    auto& range = *static_cast<Range*>(found);
    for (int i = 0; i < info->dlpi_phnum; ++i) {
      const auto& header = info->dlpi_phdr[i];
      if (header.p_type != PT_TLS || info->dlpi_tls_data == nullptr) continue;
      const Range block = {static_cast<uint8_t*>(info->dlpi_tls_data), header.p_memsz};
      if (block.holds(range.begin, 1)) range = block;
    }
    return 0;
  };
  dl_iterate_phdr(visit, &range);
  return range;
}

class StaticSharedMemory {
 public:
  StaticSharedMemory() : range_(static_shared_memory()) {
    hosts_.assign(range_.begin, range_.begin + range_.bytes);
  }
  ~StaticSharedMemory() { std::copy(hosts_.begin(), hosts_.end(), range_.begin); }
  Range range() const { return range_; }

 private:
  Range range_;
  std::vector<uint8_t> hosts_;
};

// Dynamic memory lies at the end of a window between pages that cannot be touched. What is written
// between it and those pages is found when the block ends.
class SharedWindow {
 public:
  SharedWindow() {
    const size_t all = kBytes + 2 * kUntouchable;
    auto* pages = static_cast<uint8_t*>(
        mmap(nullptr, all, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    begin_ = pages + kUntouchable;
    if (pages == MAP_FAILED || mprotect(begin_, kBytes, PROT_READ | PROT_WRITE) != 0) std::abort();
  }

  uint8_t* open(size_t bytes) const {
    const size_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    uint8_t* base = begin_ + kBytes - rounded;
    std::memset(base - kPage, kGuard, kPage);
    std::memset(base, kPoison, bytes);
    std::memset(base + bytes, kGuard, rounded - bytes);
    return base;
  }

  bool guards_hold(const uint8_t* base, size_t bytes) const {
    const auto intact = [](uint8_t byte) { return byte == kGuard; };
    return std::all_of(base - kPage, base, intact) &&
           std::all_of(base + bytes, static_cast<const uint8_t*>(begin_ + kBytes), intact);
  }

 private:
  static constexpr size_t kBytes = 256 * 1024, kUntouchable = 1024 * 1024;
  uint8_t* begin_;
};

inline const SharedWindow& window() {
  static const SharedWindow window;
  return window;
}

}  // namespace nncx::emulator
