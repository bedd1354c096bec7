// The asynchronous proxy, through which TMA and wgmma access shared memory.
//
// It has a copy of dynamic shared memory, as it sees it. What ordinary stores and cp.async write gets
// there by fence_async(); to meet a byte that did not is an error. A fence of any thread counts for
// all, and copies when TMA or wgmma look next: a store between the two is not missed.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "mbarrier.h"

namespace nncx::cuda::ptx {

class AsyncView {
 public:
  AsyncView() : bytes_(emulator::dynamic_shared_bytes(), emulator::kPoison) {}

  void fence() { fenced_ = true; }

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
  void update() {
    if (!bytes_.empty()) {
      std::memcpy(bytes_.data(), emulator::dynamic_shared_memory(), bytes_.size());
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
