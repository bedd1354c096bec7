// wgmma: products of matrices in shared memory, added to registers of a warpgroup.
//
// An operation reads its operands and adds them up at once or, as likely, when no thread can run; until
// the wait its registers hold garbage. Errors: threads of a warpgroup that do not agree; no wgmma_fence
// before registers that were in use; a thread that returns without a wait; reserved bits in a
// descriptor. Not modelled: operands in registers, base offsets, M- or N-major operands.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <deque>
#include <memory>
#include <vector>

#include "async_proxy.h"
#include "cuda/ptx_sm80.h"
#include "cuda_runtime.h"
#include "products.h"
#include "swizzle.h"

namespace nncx::cuda::ptx {

// Row `row` of an operand that is `K`-major: 32 bytes. A descriptor has, in units of 16 bytes, its
// start in bits 0..13, the leading byte offset in 16..29 and the stride byte offset in 32..45; its base
// offset in 49..51; and in 62..63 the swizzle. Eight rows of the swizzle's width (16 without) follow one
// another; the stride leads to the next eight, and without swizzle the leading offset to the next
// 16 bytes of a row.
class Operand {
 public:
  Operand(uint64_t descriptor, Place where)
      : start_((descriptor & 0x3FFF) << 4),
        leading_((descriptor >> 16 & 0x3FFF) << 4),
        stride_((descriptor >> 32 & 0x3FFF) << 4),
        swizzle_(kSwizzles[descriptor >> 62]),
        where_(where) {
    emulator::require((descriptor >> 49 & 7) == 0, "the emulator knows the base offset 0 only",
                      where);
    emulator::require((descriptor & 0x3FF1'C000'C000'C000) == 0,
                      "reserved bits of a matrix descriptor must be 0", where);
  }

  void read(int row, uint32_t (&words)[8]) const {
    for (int chunk = 0; chunk < 2; ++chunk) {
      const uint64_t width = swizzle_ == 0 ? 16 : swizzle_;
      const uint64_t next = swizzle_ == 0 ? leading_ : 16;
      const uint64_t address = start_ + row % 8 * width + row / 8 * stride_ + chunk * next;
      const uint8_t* from = shared_pointer(swizzled(address, swizzle_));
      emulator::require_shared(from, 16, 16, where_);
      emulator::require(async_view().agrees(from, 16),
                        "wgmma reads what ordinary stores or cp.async wrote without fence_async",
                        where_);
      std::memcpy(words + chunk * 4, from, 16);
    }
  }

 private:
  static constexpr uint32_t kSwizzles[] = {0, 128, 64, 32};
  uint64_t start_, leading_, stride_;
  uint32_t swizzle_;
  Place where_;
};

// The registers of a warpgroup that operations in flight add to.
struct Accumulator {
  std::vector<int32_t> values[emulator::kWarpgroup];
};

struct Operation {
  uint64_t a, b;
  int columns;
  int (*dot)(const uint32_t*, const uint32_t*);
  bool accumulate;
  Place where;
  std::shared_ptr<Accumulator> sums;
  int arrived = 0;

  bool agrees(const Operation& other) const {
    return a == other.a && b == other.b && columns == other.columns && dot == other.dot &&
           accumulate == other.accumulate;
  }

  // Register i of thread t of warp w: row 16 * w + t / 4 + 8 * (i / 2 % 2), column
  // 8 * (i / 4) + 2 * (t % 4) + i % 2.
  void run() const {
    uint32_t rows[64][8], others[256][8];
    for (int i = 0; i < 64; ++i) Operand(a, where).read(i, rows[i]);
    for (int i = 0; i < columns; ++i) Operand(b, where).read(i, others[i]);
    for (int thread = 0; thread < emulator::kWarpgroup; ++thread) {
      const int first_row = thread / 32 * 16 + thread % 32 / 4, first_column = thread % 4 * 2;
      int32_t* d = sums->values[thread].data();
      for (int i = 0; i < columns / 2; ++i) {
        const int sum =
            dot(rows[first_row + i / 2 % 2 * 8], others[i / 4 * 8 + first_column + i % 2]);
        d[i] = (accumulate ? d[i] : 0) + sum;
      }
    }
  }
};

// A warpgroup's operations, in order.
struct Warpgroup {
  std::deque<Operation> operations;
  uint64_t done = 0;

  void run_until(uint64_t count) {
    for (; done < count; ++done) {
      operations.front().run();
      operations.pop_front();
    }
  }
};

// Registers of a thread that operations in flight write to.
struct InFlight {
  int32_t* registers;
  std::shared_ptr<Accumulator> sums;
  uint64_t until;  // the number of operations after which they are done
  Place where;
};

struct WgmmaThread {
  uint64_t issued = 0;
  std::deque<uint64_t> groups;
  std::vector<InFlight> in_flight;
  bool fenced = false;

  void at_block_end() const {
    if (!in_flight.empty()) emulator::fail("wgmma was never waited for", in_flight[0].where);
  }
};

inline Warpgroup& warpgroup() {
  const int count = emulator::block_threads() / emulator::kWarpgroup;
  return emulator::state_of<Warpgroup>(emulator::thread_index() / emulator::kWarpgroup, count);
}

inline void wgmma_fence() { emulator::thread_state<WgmmaThread>().fenced = true; }

inline void wgmma_commit() {
  auto& thread = emulator::thread_state<WgmmaThread>();
  thread.groups.push_back(thread.issued);
}

// This thread's part of an operation. The last of 128 threads to come starts it.
inline void issue(int32_t* d, Operation operation) {
  const Place where = operation.where;
  emulator::require(compiled_for(90), "wgmma needs code compiled for 9.0a", where);
  emulator::require(emulator::thread_index() / emulator::kWarpgroup <
                        emulator::block_threads() / emulator::kWarpgroup,
                    "wgmma needs a whole warpgroup", where);
  auto& thread = emulator::thread_state<WgmmaThread>();
  Warpgroup& group = warpgroup();
  InFlight* known = nullptr;
  for (InFlight& other : thread.in_flight) {
    if (other.registers == d) known = &other;
  }
  emulator::require(known || thread.fenced, "wgmma_fence must come before wgmma uses registers",
                    where);
  if (thread.issued == group.done + group.operations.size()) {
    operation.sums = known ? known->sums : std::make_shared<Accumulator>();
    group.operations.push_back(operation);
  }
  Operation& shared = group.operations[thread.issued - group.done];
  emulator::require(shared.agrees(operation) && (!known || known->sums == shared.sums),
                    "the threads of a warpgroup must agree on a wgmma", where);
  ++thread.issued;
  if (known) {
    known->until = thread.issued;
  } else {
    const int lane = emulator::thread_index() % emulator::kWarpgroup;
    shared.sums->values[lane].assign(d, d + operation.columns / 2);
    std::fill(d, d + operation.columns / 2, 0x5EED'BAD0);
    thread.in_flight.push_back({d, shared.sums, thread.issued, where});
  }
  if (++shared.arrived < emulator::kWarpgroup) return;
  const auto run = [&group, until = thread.issued] { group.run_until(until); };
  if (emulator::early()) return run();
  emulator::later(run, nullptr, where);
}

template <int Pending>
void wgmma_wait(NNCX_PLACE) {
  auto& thread = emulator::thread_state<WgmmaThread>();
  Warpgroup& group = warpgroup();
  uint64_t until = 0;
  while (thread.groups.size() > Pending) {
    until = thread.groups.front();
    thread.groups.pop_front();
  }
  emulator::wait_until([&] { return group.done >= until; }, "wgmma", where);
  const int lane = emulator::thread_index() % emulator::kWarpgroup;
  std::erase_if(thread.in_flight, [&](const InFlight& f) {
    if (f.until > until) return false;
    std::copy(f.sums->values[lane].begin(), f.sums->values[lane].end(), f.registers);
    return true;
  });
  thread.fenced = false;
}

template <int N>
void wgmma_b1_and(int32_t (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate, NNCX_PLACE) {
  static_assert(N == 8 || N == 24 || (N % 16 == 0 && N <= 256));
  issue(d, {a, b, N, emulator::dot_b1, accumulate, where, nullptr});
}

template <int N>
void wgmma_s8(int32_t (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate, NNCX_PLACE) {
  static_assert(N == 8 || N == 24 || (N % 16 == 0 && N <= 256));
  issue(d, {a, b, N, emulator::dot_s8, accumulate, where, nullptr});
}

}  // namespace nncx::cuda::ptx
