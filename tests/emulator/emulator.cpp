// The machine behind emulator.h: fibers and their scheduler, and faults.
#include "emulator.h"

#include <cxxabi.h>
#include <setjmp.h>
#include <signal.h>

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "fiber.h"
#include "shared_memory.h"

namespace nncx::emulator {
namespace {

// Lanes of a warp that meet: those of one mask.
struct Meeting {
  uint32_t arrived = 0;
  void* operands[kWarp] = {};
  Place where;
};

struct Thread {
  Fiber fiber;
  uint3 index;
  int number = 0;                        // in the block
  std::map<uint32_t, Meeting> meetings;  // by mask; of the warp, kept by its first lane
  void* condition = nullptr;             // what suspend() was told
  bool (*holds)(void*) = nullptr;
  const char* what = "";
  Place where;
  bool finished = false;

  bool can_run() { return !finished && (holds == nullptr || holds(condition)); }
};

struct ThreadBarrier {
  int threads = 0, arrived = 0;
  uint64_t generation = 0;
  Place where;
};

struct Work {
  std::function<void()> run;
  const char* what;
  Place where;
};

struct Machine {
  Context scheduler;
  Stacks stacks;
  std::vector<Thread> threads;
  std::vector<Thread*> order;
  Thread* running = nullptr;
  int unfinished = 0;
  ThreadBarrier barriers[16];
  std::vector<Work> background;
  sigjmp_buf background_fault;
  std::vector<std::function<void()>> end_checks;
  uint64_t serial = 0;  // of the block, in this process
  const std::function<void()>* kernel = nullptr;
  std::string signature;
  std::string error;
  uint64_t chance = 1;
  Range shared;   // dynamic shared memory
  Range statics;  // static shared memory
};

Machine& the_machine = *new Machine;  // never destroyed: threads may outlive main

// xorshift: a number below `bound`.
uint64_t random_below(uint64_t bound) {
  uint64_t& x = the_machine.chance;
  x ^= x << 13, x ^= x >> 7, x ^= x << 17;
  return x % bound;
}

std::string triple(unsigned x, unsigned y, unsigned z) {
  return "(" + std::to_string(x) + ", " + std::to_string(y) + ", " + std::to_string(z) + ")";
}

std::string demangled(const char* name) {
  int status = 0;
  const std::unique_ptr<char, void (*)(void*)> text(
      abi::__cxa_demangle(name, nullptr, nullptr, &status), std::free);
  return status == 0 ? text.get() : name;
}

std::string text(Place where) {
  return std::string(where.file_name()) + ":" + std::to_string(where.line()) + " in " +
         where.function_name();
}

bool same_place(Place a, Place b) {
  return a.line() == b.line() && a.column() == b.column() &&
         (a.file_name() == b.file_name() || std::strcmp(a.file_name(), b.file_name()) == 0);
}

// ------------------------------------------------------------------------------------------------
// Fibers and their scheduler.

void enter_thread() {
  Machine& m = the_machine;
  try {
    (*m.kernel)();
  } catch (const std::exception& error) {
    m.error = error.what();
  }
  m.running->finished = true;
  --m.unfinished;
  switch_context(m.running->fiber.context, m.scheduler);
}

void run_thread(Thread& thread) {
  Machine& m = the_machine;
  m.running = &thread;
  thread.holds = nullptr;
  threadIdx = thread.index;
  switch_context(m.scheduler, thread.fiber.context);
  m.running = nullptr;
  if (!m.error.empty()) throw std::runtime_error(m.error);
}

std::string block_text() {
  return std::string("block ") + triple(blockIdx.x, blockIdx.y, blockIdx.z) + " of kernel " +
         the_machine.signature;
}

[[noreturn]] void fail_block(const std::string& what) {
  throw std::runtime_error("emulator: " + what + ", " + block_text());
}

// Where all threads wait, those at one place together.
[[noreturn]] void fail_deadlock() {
  std::map<std::string, std::vector<const Thread*>> places;
  for (const Thread& t : the_machine.threads) {
    if (!t.finished) places[std::string(t.what) + " at " + text(t.where)].push_back(&t);
  }
  std::string where;
  for (const auto& [place, threads] : places) {
    const uint3 first = threads.front()->index;
    where += "\n  " + std::to_string(threads.size()) + " threads, the first " +
             triple(first.x, first.y, first.z) + ", wait for " + place;
  }
  fail_block("deadlock" + where + "\n ");
}

void do_background_work(size_t at) {
  auto& background = the_machine.background;
  std::swap(background[at], background.back());
  const Work work = std::move(background.back());
  background.pop_back();
  if (sigsetjmp(the_machine.background_fault, 0) != 0) throw std::runtime_error(the_machine.error);
  work.run();
}

void run_block(dim3 block) {
  Machine& m = the_machine;
  m.unfinished = static_cast<int>(m.threads.size());
  m.background.clear();
  std::fill(std::begin(m.barriers), std::end(m.barriers), ThreadBarrier{});
  m.end_checks.clear();
  ++m.serial;
  std::memset(m.statics.begin, kPoison, m.statics.bytes);
  m.shared.begin = window().open(m.shared.bytes);

  for (size_t i = 0; i < m.threads.size(); ++i) {
    Thread& thread = m.threads[i];
    const auto x = static_cast<unsigned>(i);
    thread = Thread{};
    thread.number = static_cast<int>(i);
    thread.index = {x % block.x, x / block.x % block.y, x / block.x / block.y};
    thread.fiber.prepare(m.stacks.get(i), enter_thread);
  }
  while (m.unfinished > 0) {
    bool ran = false;
    for (size_t i = m.order.size(); i > 1; --i) std::swap(m.order[i - 1], m.order[random_below(i)]);
    for (Thread* thread : m.order) {
      if (!thread->can_run()) continue;
      run_thread(*thread);
      ran = true;
    }
    if (ran) continue;
    if (m.background.empty()) fail_deadlock();
    do_background_work(random_below(m.background.size()));
  }
  for (const Work& work : m.background) {
    if (work.what != nullptr) fail(std::string(work.what) + " was never waited for", work.where);
  }
  for (const auto& check : m.end_checks) check();
  if (!window().guards_hold(m.shared.begin, m.shared.bytes)) {
    fail_block("memory outside the " + std::to_string(m.shared.bytes) +
               " bytes of dynamic shared memory was written to");
  }
}

// ------------------------------------------------------------------------------------------------
// A fault in a kernel ends the launch, not the process.

[[maybe_unused]] void on_fault(int signal, siginfo_t* info, void*) {
  Machine& m = the_machine;
  const auto* address = static_cast<const uint8_t*>(info->si_addr);
  m.error = signal == SIGSEGV ? "emulator: memory that is not there was accessed, "
                              : "emulator: an access must be aligned as its type is, ";
  const int64_t offset = address - m.shared.begin;
  if (m.stacks.is_guard(address)) {  // first: a stack may lie beside shared memory
    m.error += "the fiber's stack is too small for the kernel, ";
  } else if (std::abs(offset) < 2 * 1024 * 1024) {
    m.error += "byte " + std::to_string(offset) + " of " + std::to_string(m.shared.bytes) +
               " in dynamic shared memory, ";
  }
  if (m.running == nullptr) {
    m.error += "in the background, " + block_text();
    siglongjmp(m.background_fault, 1);
  }
  const Thread& t = *m.running;
  m.error += "thread " + triple(t.index.x, t.index.y, t.index.z) + " after " +
             (*t.what ? text(t.where) : "its start") + ", " + block_text();
  switch_context(m.running->fiber.context, m.scheduler);
}

class FaultHandler {
 public:
  FaultHandler() {
#ifndef __SANITIZE_ADDRESS__
    const stack_t stack = {.ss_sp = stack_, .ss_flags = 0, .ss_size = sizeof stack_};
    sigaltstack(&stack, &old_stack_);
    struct sigaction action = {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigaction(SIGSEGV, &action, &old_segv_);
    sigaction(SIGILL, &action, &old_ill_);    // of the sanitizer's traps
    sigaction(SIGTRAP, &action, &old_trap_);  // the same on ARM
#endif
  }
  ~FaultHandler() {
#ifndef __SANITIZE_ADDRESS__
    sigaction(SIGSEGV, &old_segv_, nullptr);
    sigaction(SIGILL, &old_ill_, nullptr);
    sigaction(SIGTRAP, &old_trap_, nullptr);
    sigaltstack(&old_stack_, nullptr);
#endif
  }

 private:
  stack_t old_stack_ = {};
  struct sigaction old_segv_ = {}, old_ill_ = {}, old_trap_ = {};
  alignas(16) char stack_[64 * 1024];
};

}  // namespace

void fail(const std::string& what, Place where) {
  const Machine& m = the_machine;
  std::string who;
  if (m.running != nullptr) {
    const uint3 t = m.running->index;
    who = ", thread " + triple(t.x, t.y, t.z);
  }
  throw std::runtime_error("emulator: " + what + ", at " + text(where) + who + ", " + block_text());
}

int thread_index() { return the_machine.running->number; }

int block_threads() { return static_cast<int>(the_machine.threads.size()); }

void suspend(void* condition, bool (*holds)(void*), const char* what, Place where) {
  Machine& m = the_machine;
  Thread& thread = *m.running;
  thread.condition = condition;
  thread.holds = holds;
  thread.what = what;
  thread.where = where;
  switch_context(thread.fiber.context, m.scheduler);
}

void meet_lanes(uint32_t mask, void* mine, void (*combine)(void* const* lanes), const char* what,
                Place where) {
  Machine& m = the_machine;
  const int lane = thread_index() % kWarp;
  const int lanes = std::min(kWarp, block_threads() - (thread_index() - lane));
  require(mask >> lane & 1, "a lane must be in the mask that it gives", where);
  require(lanes == kWarp || mask >> lanes == 0, "the mask has lanes that are not there", where);
  Thread* warp = m.running - lane;
  Meeting& meeting = warp->meetings[mask];
  if (meeting.arrived == 0) {
    meeting.where = where;
    std::fill(std::begin(meeting.operands), std::end(meeting.operands), nullptr);
  } else if (!same_place(meeting.where, where)) {
    fail("lanes of a warp must come to one place, and others with the same mask are at " +
             text(meeting.where),
         where);
  }
  meeting.arrived |= 1u << lane;
  meeting.operands[lane] = mine;
  if (meeting.arrived == mask) {
    if (combine != nullptr) combine(meeting.operands);
    meeting.arrived = 0;
    for (int i = 0; i < lanes; ++i) {
      if (mask >> i & 1) warp[i].holds = nullptr;
    }
    return;
  }
  suspend(nullptr, [](void*) { return false; }, what, where);  // the last lane wakes the others
}

void meet_threads(int id, int threads, Place where) {
  Machine& m = the_machine;
  require(0 <= id && id < 16, "the number of a barrier must be in 0..15", where);
  require(threads % kWarp == 0 && threads <= block_threads(),
          "a barrier's threads must be whole warps of the block", where);
  ThreadBarrier& barrier = m.barriers[id];
  if (barrier.arrived == 0) {
    barrier.threads = threads;
    barrier.where = where;
  }
  require(barrier.threads == threads, "threads at one barrier must agree on how many they are",
          where);
  if (threads == 0 && !same_place(barrier.where, where)) {
    fail("__syncthreads must be one place for all threads, and one waits at " + text(barrier.where),
         where);
  }
  ++barrier.arrived;
  const uint64_t generation = barrier.generation;
  const auto complete = [&] {
    if (barrier.generation != generation) return true;
    if (barrier.arrived != (threads == 0 ? m.unfinished : threads)) return false;
    barrier.arrived = 0;
    ++barrier.generation;
    return true;
  };
  wait_until(complete, "a barrier of threads", where);
}

bool early() { return random_below(2) == 0; }

void later(std::function<void()> work, const char* what, Place where) {
  the_machine.background.push_back({std::move(work), what, where});
}

void at_block_end(std::function<void()> check) {
  the_machine.end_checks.push_back(std::move(check));
}

uint64_t block_serial() { return the_machine.serial; }

uint8_t* dynamic_shared_memory() { return the_machine.shared.begin; }
size_t dynamic_shared_bytes() { return the_machine.shared.bytes; }

void require_shared(const void* address, size_t bytes, size_t alignment, Place where) {
  const Machine& m = the_machine;
  require(m.shared.holds(address, bytes) || m.statics.holds(address, bytes),
          "the address must be in the block's shared memory", where);
  require(reinterpret_cast<uintptr_t>(address) % alignment == 0,
          "the shared memory address must be aligned", where);
}

void require_dynamic(const void* address, const char* what, Place where) {
  if (the_machine.shared.holds(address, 1)) return;
  fail(std::string(what) + " must use dynamic shared memory in the emulator", where);
}

void run_grid(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread,
              const std::type_info& kernel) {
  static std::mutex one_launch_at_a_time;
  const std::lock_guard lock(one_launch_at_a_time);
  const FaultHandler handler;
  const StaticSharedMemory statics;
  Machine& m = the_machine;
  const char* seed = std::getenv("NNCX_EMULATOR_SEED");
  m.chance = 0x9E3779B97F4A7C15 * (seed ? std::strtoull(seed, nullptr, 10) : 1) | 1;
  m.kernel = &thread;
  m.signature = demangled(kernel.name());
  m.shared = {nullptr, shared_bytes};
  m.statics = statics.range();
  m.error.clear();
  m.threads = std::vector<Thread>(size_t{block.x} * block.y * block.z);
  m.order.clear();
  for (Thread& t : m.threads) m.order.push_back(&t);
  gridDim = grid;
  blockDim = block;

  // Blocks in a shuffled order, by a stride that has no factor in common with their number.
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  uint64_t stride = random_below(blocks) + 1;
  while (std::gcd(stride, blocks) != 1) ++stride;
  uint64_t at = random_below(blocks);
  for (uint64_t i = 0; i < blocks; ++i) {
    blockIdx = {static_cast<unsigned>(at % grid.x), static_cast<unsigned>(at / grid.x % grid.y),
                static_cast<unsigned>(at / grid.x / grid.y)};
    run_block(block);
    at = (at + stride) % blocks;
  }
}

}  // namespace nncx::emulator
