// The asynchronous proxy, through which TMA and wgmma access shared memory.
//
// It has a copy of dynamic shared memory, as it sees it. What cp.async and ordinary stores write gets
// there by fence_async(); to meet a byte that did not is an error. A fence of any thread counts for
// all. It takes along what cp.async has written until then; of ordinary stores, which cannot be
// observed, all that were made until TMA or wgmma look next, which is too much.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "mbarrier.h"

namespace nncx::cuda::ptx {

class AsyncView {
 public:
  AsyncView() : bytes_(emulator::dynamic_shared_bytes(), emulator::kPoison) {}

  void fence() {
    for (const Landed& copy : landed()) {
      if (holds(copy)) std::memcpy(at(copy.at), copy.at, copy.bytes);
    }
    landed().clear();
    fenced_ = true;
  }

  // Whether both proxies see the same.
  bool agrees(const uint8_t* address, size_t size) {
    if (fenced_) update();
    return std::memcmp(at(address), address, size) == 0;
  }

  void write(uint8_t* address, const uint8_t* from, size_t size) {
    std::memcpy(address, from, size);
    std::memcpy(at(address), from, size);
  }

 private:
  uint8_t* at(const uint8_t* address) {
    return bytes_.data() + (address - emulator::dynamic_shared_memory());
  }
  bool holds(const Landed& copy) const {
    const auto offset = copy.at - emulator::dynamic_shared_memory();
    return 0 <= offset && offset < static_cast<int64_t>(bytes_.size());
  }

  // All but what cp.async has written since the last fence.
  void update() {
    const std::vector<uint8_t> before = bytes_;
    if (!bytes_.empty()) {
      std::memcpy(bytes_.data(), emulator::dynamic_shared_memory(), bytes_.size());
    }
    for (const Landed& copy : landed()) {
      const auto offset = copy.at - emulator::dynamic_shared_memory();
      if (holds(copy)) std::memcpy(at(copy.at), before.data() + offset, copy.bytes);
    }
    fenced_ = false;
  }

  std::vector<uint8_t> bytes_;
  bool fenced_ = false;
};

inline AsyncView& async_view() { return emulator::block_state<AsyncView>(); }

inline void fence_async() {
  async_view().fence();
  barrier_fence_init();
}

}  // namespace nncx::cuda::ptx
