// Stand-in for csrc/cuda/ptx_sm90.h: mbarriers, TMA and wgmma after the PTX manual, written from it
// and not from the kernels, so that a misreading on either side shows.
//
// The model, and what it makes an error:
//   mbarrier   counts arrivals and bytes. More arrivals than were declared; bytes beyond those that
//              are expected; memory that holds no barrier.
//   TMA        lands at once or, as likely, when no thread can run; its bytes then arrive at the
//              barrier. A barrier that the asynchronous proxy was not told of (barrier_fence_init).
//   wgmma      reads its operands and adds them up at once, or when no thread can run; its registers
//              hold garbage until the wait. Threads of a warpgroup that do not agree; no
//              wgmma_fence before registers that were in use; kernels that return without waiting.
//   proxies    shared memory has a second copy, as the asynchronous proxy (TMA, wgmma) sees it.
//              Ordinary stores and cp.async get there by fence_async(); to meet others is an error.
//              A fence of any thread counts for all, at the latest when a wgmma runs.
// Not modelled: clusters, setmaxnreg's pool of registers, TMA stores.
#pragma once

#include <cstdint>
#include <cstring>
#include <deque>
#include <memory>
#include <unordered_map>
#include <vector>

#include "cuda/ptx_sm80.h"
#include "cuda/tensor_map.h"
#include "cuda_runtime.h"
#include "products.h"

namespace nncx::cuda::ptx {

using Barrier = uint64_t;

// ------------------------------------------------------------------------------------------------
// mbarrier

struct BarrierState {
  int arrivals = 0;  // of a phase
  int pending = 0;   // that the phase still waits for
  int64_t bytes = 0;
  uint64_t phase = 0;
  int owner = 0;  // the thread that made it
  bool fenced = false;

  void complete() {
    if (pending > 0 || bytes != 0) return;
    pending = arrivals;
    ++phase;
  }
};

constexpr int kMostBytes = (1 << 20) - 1;  // that a barrier can count

inline std::unordered_map<Barrier*, BarrierState>& barriers() {
  return emulator::block_state<std::unordered_map<Barrier*, BarrierState>>();
}

// A barrier's memory holds its mark: what else is written there, or its absence, is found.
inline Barrier barrier_mark(const Barrier* barrier) {
  return reinterpret_cast<uintptr_t>(barrier) ^ 0x6d62'6172'7269'6572;
}

inline BarrierState& barrier_state(Barrier* barrier, Place where) {
  emulator::require_shared(barrier, 8, 8, where);
  emulator::require(*barrier == barrier_mark(barrier), "this is no initialized mbarrier", where);
  return barriers().at(barrier);
}

inline void barrier_init(Barrier* barrier, int arrivals, NNCX_PLACE) {
  emulator::require_shared(barrier, 8, 8, where);
  emulator::require(1 <= arrivals && arrivals <= kMostBytes, "an mbarrier needs arrivals", where);
  *barrier = barrier_mark(barrier);
  barriers()[barrier] = {arrivals, arrivals, 0, 0, emulator::thread_index(), false};
}

// Also what fence.proxy.async does for barriers.
inline void barrier_fence_init() {
  for (auto& [barrier, state] : barriers()) {
    if (state.owner == emulator::thread_index()) state.fenced = true;
  }
}

inline void arrive(BarrierState& state, Place where) {
  emulator::require(state.pending > 0, "more threads arrive at an mbarrier than it waits for",
                    where);
  --state.pending;
  state.complete();
}

inline void expect_bytes(BarrierState& state, int bytes, Place where) {
  state.bytes += bytes;
  emulator::require(bytes >= 0 && state.bytes <= kMostBytes, "an mbarrier counts up to 2^20 - 1",
                    where);
}

inline void complete_bytes(Barrier* barrier, int bytes, Place where) {
  BarrierState& state = barrier_state(barrier, where);
  state.bytes -= bytes;
  emulator::require(state.bytes >= (state.pending > 0 ? -kMostBytes : 0),
                    "more bytes arrive at an mbarrier than it expects", where);
  state.complete();
}

inline void barrier_arrive(Barrier* barrier, NNCX_PLACE) {
  arrive(barrier_state(barrier, where), where);
}

inline void barrier_arrive_expect(Barrier* barrier, int bytes, NNCX_PLACE) {
  BarrierState& state = barrier_state(barrier, where);
  expect_bytes(state, bytes, where);
  arrive(state, where);
}

// Until the phase of that parity is complete; the phase before the first counts as complete.
inline void barrier_wait(Barrier* barrier, int parity, NNCX_PLACE) {
  const BarrierState& state = barrier_state(barrier, where);
  emulator::wait_until([&] { return (state.phase & 1) != static_cast<unsigned>(parity); },
                       "an mbarrier", where);
}

// Arrives once this thread's copies until now have landed; counts as one of the arrivals (noinc).
inline void cp_async_arrive(Barrier* barrier, NNCX_PLACE) {
  auto& queue = emulator::thread_state<CopyQueue>();
  const auto land_and_arrive = [=, &queue, until = queue.issued()] {
    queue.land_until(until);
    arrive(barrier_state(barrier, where), where);
  };
  emulator::later(land_and_arrive, "cp_async_arrive", where);
}

// ------------------------------------------------------------------------------------------------
// The asynchronous proxy's view of dynamic shared memory.

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

// ------------------------------------------------------------------------------------------------
// TMA

// The swizzle of `span` (0, 32, 64, 128) bytes: within 16-byte chunks nothing moves; a chunk's number
// in its span is xored with the number of its 128-byte line.
inline uint64_t swizzled(uint64_t address, uint32_t span) {
  const uint64_t mask = span == 0 ? 0 : span / 16 - 1;
  return address ^ (address >> 7 & mask) << 4;
}

// Where a box of rows of `width` bytes goes, row by row.
class BoxWriter {
 public:
  BoxWriter(uint8_t* shared, uint32_t width, uint32_t swizzle, Place where)
      : start_(shared_address(shared)), width_(width), swizzle_(swizzle), where_(where) {}

  // Byte `at` of row `row`, 16 at a time; null: outside the tensor, which reads as zeros.
  void write(uint32_t row, uint32_t at, const uint8_t* from, size_t available) {
    uint8_t chunk[16] = {};
    if (from != nullptr) std::memcpy(chunk, from, std::min<size_t>(available, 16));
    uint8_t* to = shared_pointer(swizzled(start_ + row * width_ + at, swizzle_));
    emulator::require(async_view().agrees(to, 16),
                      "TMA writes where ordinary stores were not fenced with fence_async", where_);
    async_view().write(to, chunk, 16);
  }

 private:
  uint64_t start_;
  uint32_t width_, swizzle_;
  Place where_;
};

inline void land(uint8_t* shared, const TiledMap& map, int64_t x, int64_t y, Place where) {
  BoxWriter writer(shared, map.box_width, map.swizzle, where);
  for (uint32_t row = 0; row < map.box_height; ++row) {
    for (uint32_t at = 0; at < map.box_width; at += 16) {
      const int64_t left = static_cast<int64_t>(map.width) - (x + at);
      const bool inside =
          y + row >= 0 && y + row < static_cast<int64_t>(map.height) && x + at >= 0 && left > 0;
      const auto* from = static_cast<const uint8_t*>(map.address) + (y + row) * map.row_stride;
      writer.write(row, at, inside ? from + x + at : nullptr, inside ? left : 0);
    }
  }
}

// A filter's position in the tensor, and its step to the next one: w fastest, then h, then n.
struct FilterBase {
  int64_t w, h, n;
  void advance(const Im2colMap& map) {
    w += map.step_w;
    if (w < static_cast<int64_t>(map.width) + map.upper_w) return;
    w = map.lower_w;
    h += map.step_h;
    if (h < static_cast<int64_t>(map.height) + map.upper_h) return;
    h = map.lower_h;
    ++n;
  }
  bool inside(const Im2colMap& map) const {
    return map.lower_w <= w && w < static_cast<int64_t>(map.width) + map.upper_w &&
           map.lower_h <= h && h < static_cast<int64_t>(map.height) + map.upper_h;
  }
};

inline void land(uint8_t* shared, const Im2colMap& map, int64_t c, FilterBase base, int offset_w,
                 int offset_h, Place where) {
  BoxWriter writer(shared, map.channels_per_pixel, map.swizzle, where);
  for (uint32_t row = 0; row < map.pixels_per_column; ++row, base.advance(map)) {
    const int64_t w = base.w + offset_w, h = base.h + offset_h;
    const bool pixel = 0 <= w && w < static_cast<int64_t>(map.width) && 0 <= h &&
                       h < static_cast<int64_t>(map.height) && 0 <= base.n &&
                       base.n < static_cast<int64_t>(map.batch);
    const auto* from = static_cast<const uint8_t*>(map.address) + w * map.stride_w +
                       h * map.stride_h + base.n * map.stride_n;
    for (uint32_t at = 0; at < map.channels_per_pixel; at += 16) {
      const int64_t left = static_cast<int64_t>(map.channels) - (c + at);
      const bool inside = pixel && c + at >= 0 && left > 0;
      writer.write(row, at, inside ? from + c + at : nullptr, inside ? left : 0);
    }
  }
}

// Checks what all loads have in common and starts `land`.
template <class Land>
void start_load(void* shared, Barrier* barrier, uint32_t width, uint32_t rows, uint32_t swizzle,
                const Land& land, Place where) {
  emulator::require(compiled_for(90), "TMA needs code compiled for 9.0a", where);
  emulator::require_shared(shared, size_t{width} * rows, 128, where);
  emulator::require_dynamic(shared, "TMA", where);
  emulator::require(swizzle == 0 || swizzle == width,
                    "the emulator knows swizzled boxes only as wide as the swizzle", where);
  emulator::require(barrier_state(barrier, where).fenced,
                    "TMA needs an mbarrier made visible with barrier_fence_init", where);
  const auto land_and_complete = [=, bytes = static_cast<int>(width * rows)] {
    land();
    complete_bytes(barrier, bytes, where);
  };
  if (emulator::early()) return land_and_complete();
  emulator::later(land_and_complete, "a TMA load", where);
}

inline EncodedMap decode(const TensorMap* map, EncodedMap::Kind kind, Place where) {
  EncodedMap encoded;
  std::memcpy(&encoded, map->bytes, sizeof encoded);
  emulator::require(encoded.kind == kind, "the TensorMap must be of the load's kind", where);
  emulator::require(reinterpret_cast<uintptr_t>(map) % 64 == 0, "a TensorMap must be aligned to 64",
                    where);
  return encoded;
}

inline void tma_load_2d(void* shared, const TensorMap* map, Barrier* barrier, int x, int y,
                        NNCX_PLACE) {
  const TiledMap tiles = decode(map, EncodedMap::tiled, where).tiles;
  const auto run = [=] { land(static_cast<uint8_t*>(shared), tiles, x, y, where); };
  start_load(shared, barrier, tiles.box_width, tiles.box_height, tiles.swizzle, run, where);
}

inline void tma_load_im2col(void* shared, const TensorMap* map, Barrier* barrier, int c, int w,
                            int h, int n, uint16_t offset_w, uint16_t offset_h, NNCX_PLACE) {
  const Im2colMap images = decode(map, EncodedMap::im2col, where).images;
  const FilterBase base = {w, h, n};
  emulator::require(base.inside(images), "the filter's base must be in the map's box", where);
  emulator::require(offset_w < 256 && offset_h < 256, "im2col offsets go up to 255", where);
  const auto run = [=] {
    land(static_cast<uint8_t*>(shared), images, c, base, offset_w, offset_h, where);
  };
  start_load(shared, barrier, images.channels_per_pixel, images.pixels_per_column, images.swizzle,
             run, where);
}

inline void tma_prefetch(const TensorMap*) {}

// ------------------------------------------------------------------------------------------------
// wgmma

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

// ------------------------------------------------------------------------------------------------

inline void named_barrier(int id, int threads, NNCX_PLACE) {
  emulator::meet_threads(id, threads, where);
}

template <int N>
void registers_increase() {
  static_assert(24 <= N && N <= 256 && N % 8 == 0);
}
template <int N>
void registers_decrease() {
  static_assert(24 <= N && N <= 256 && N % 8 == 0);
}

}  // namespace nncx::cuda::ptx

// CUDA's: the address of shared memory in its own space.
inline size_t __cvta_generic_to_shared(const void* pointer) {
  return nncx::cuda::ptx::shared_address(pointer);
}
