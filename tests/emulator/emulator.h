// An emulator of a CUDA GPU: runs the project's own .cu files on the CPU, compiled by g++ alone.
//
// How a kernel is tried, from the root of the checkout, with a main() that calls its entry point:
//
//   FLAGS='-std=c++20 -O2 -g -DNNCX_EMULATED -msse4.2 -Wno-psabi -I tests/emulator -I csrc'
//   g++ $FLAGS -x c++ csrc/cuda/pack_signs.cu main.cpp tests/emulator/*.cpp -o try && ./try
//
//   #include "cuda_runtime.h"   // main.cpp; pointers of device memory are ordinary ones
//   int main() { cudaSetDevice(2); return nncx::cuda::pack_signs(params, nullptr); }
//
// The machine has three GPUs, which differ in what their code was compiled for: device 0 for 7.5
// (CUDA cores), 1 for 8.0, 2 for 9.0a. A launch runs the kernel to its end before it returns, and
// throws std::runtime_error when the kernel does what a GPU would not forgive.
//
// The model. Blocks run one after another. Every thread of a block is a fiber: it runs until it has
// to wait for others, and the order of those that can run is shuffled. What the GPU does in the
// background (asynchronous copies, wgmma) happens by chance at the first or the last moment that
// the rules allow, so that a missing wait and a buffer that is reused too early both lead to a
// wrong result. Shared memory starts poisoned. Chance is fixed by NNCX_EMULATOR_SEED (default 1).
//
// Errors, each with its place: deadlock; warp-wide operations that not all lanes reach; shared
// memory accessed out of bounds (one page beyond at once, less at the end of the block); accesses that
// are not aligned as their type is (-fsanitize=alignment -fsanitize-undefined-trap-on-error); the rules
// of the single instructions, see ptx_sm80.h and ptx_sm90.h.
//
// Not modelled: blocks that run at the same time, the memory model between threads (a missing
// __syncwarp or fence shows only if the shuffled order makes it matter), bank conflicts, speed,
// streams and graphs. Out-of-bounds in global memory: compile with -fsanitize=address.
//
// This header is what the stand-ins for CUDA's and the project's headers are written with.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <source_location>
#include <string>
#include <typeinfo>
#include <vector>

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace nncx::emulator {

// Where a kernel calls a stand-in: the default argument of all that may wait or fail.
using Place = std::source_location;

constexpr int kWarp = 32;
constexpr int kWarpgroup = 128;
constexpr uint8_t kPoison = 0xD1;  // of every byte of shared memory when a block starts

// What differs between the three GPUs.
struct Gpu {
  int architecture;  // 75, 80, 90: what the code was compiled for
  int shared_bytes;  // most that a block may ask for

  constexpr bool has_code() const { return architecture >= 75; }
};
const Gpu& current_gpu();

// Ends the launch with an error that names the kernel's block, the running thread and `where`.
[[noreturn]] void fail(const std::string& what, Place where);
inline void require(bool holds, const char* what, Place where) {
  if (!holds) fail(what, where);
}

// The running thread's number in its block, and the block's number of threads.
int thread_index();
int block_threads();

// Lets the others run until `ready()` holds. `what` is for the message about a deadlock.
void suspend(void* condition, bool (*holds)(void*), const char* what, Place where);

template <class Ready>
void wait_until(Ready ready, const char* what, Place where) {
  if (!ready()) suspend(&ready, [](void* r) { return (*static_cast<Ready*>(r))(); }, what, where);
}

// All lanes of `mask` meet; the last one calls `combine` with what they brought (null: a lane that is
// not in the mask), and may write into it. Lanes that come to different places are an error.
void meet_lanes(uint32_t mask, void* mine, void (*combine)(void* const* lanes), const char* what,
                Place where);

template <class T>
T meet(uint32_t mask, T mine, void (*combine)(T* const* lanes), const char* what, Place where) {
  struct Both {
    T value;
    void (*combine)(T* const* lanes);
  } both = {mine, combine};
  const auto unpack = [](void* const* lanes) {
    T* values[kWarp];
    void (*function)(T* const*) = nullptr;
    for (int lane = 0; lane < kWarp; ++lane) {
      auto* given = static_cast<Both*>(lanes[lane]);
      values[lane] = given ? &given->value : nullptr;
      if (given) function = given->combine;
    }
    function(values);
  };
  meet_lanes(mask, &both, unpack, what, where);
  return both.value;
}

// Barrier `id` of the block's 16: `threads` of them meet, or with 0 all that have not returned.
void meet_threads(int id, int threads, Place where);

// A coin of the machine's chance: true for what happens as early as possible.
bool early();

// Work in the background, done when no thread can run any more, in any order. A block that ends
// before it is done is an error, `what` was not waited for; unless `what` is null.
void later(std::function<void()> work, const char* what, Place where);

// Done when the block's threads have returned: complains of what they left behind.
void at_block_end(std::function<void()> check);

// What a stand-in remembers of each thread (or warpgroup, or block: `count` of them) until the block
// ends. A State with a member `at_block_end()` has it called then.
uint64_t block_serial();

template <class State>
State& state_of(int index, int count) {
  static std::vector<State> states;
  static uint64_t serial = 0;
  if (serial != block_serial()) {
    serial = block_serial();
    states.clear();
    states.resize(static_cast<size_t>(count));
    if constexpr (requires(State& state) { state.at_block_end(); }) {
      at_block_end([] {
        for (State& state : states) state.at_block_end();
      });
    }
  }
  return states[static_cast<size_t>(index)];
}

template <class State>
State& thread_state() {
  return state_of<State>(thread_index(), block_threads());
}
template <class State>
State& block_state() {
  return state_of<State>(0, 1);
}

// The block's dynamic shared memory.
uint8_t* dynamic_shared_memory();
size_t dynamic_shared_bytes();

// `bytes` at `address` must be shared memory of the block, aligned to `alignment`.
void require_shared(const void* address, size_t bytes, size_t alignment, Place where);

// The emulator knows the shared memory address of dynamic shared memory only.
void require_dynamic(const void* address, const char* what, Place where);

// Runs the kernel of that type, which `thread` calls with its arguments. Throws what fail() was told.
void run_grid(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread,
              const std::type_info& kernel);

}  // namespace nncx::emulator
