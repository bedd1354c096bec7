// mbarriers of sm_90, which count arrivals and bytes.
//
// Errors: more arrivals than were declared; bytes beyond those that are expected; memory that holds no
// barrier. A thread that waits for ever is found as a deadlock.
#pragma once

#include <cstdint>
#include <unordered_map>

#include "cuda/ptx_sm80.h"
#include "cuda_runtime.h"

namespace nncx::cuda::ptx {

using Barrier = uint64_t;

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

}  // namespace nncx::cuda::ptx
