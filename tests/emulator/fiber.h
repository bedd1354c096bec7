// Fibers: a stack each, and a switch between them that costs a few nanoseconds.
#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <vector>

#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace nncx::emulator {

#ifdef __x86_64__

using Context = void*;  // the stack pointer; the registers that a call preserves are on the stack

extern "C" void nncx_emulator_switch(void** from, void* to);
asm(R"(
  .pushsection .text
  .weak nncx_emulator_switch
  .hidden nncx_emulator_switch
  .type nncx_emulator_switch, @function
nncx_emulator_switch:
  pushq %rbx
  pushq %rbp
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbp
  popq %rbx
  ret
  .size nncx_emulator_switch, . - nncx_emulator_switch
  .popsection
)");

inline void switch_context(Context& from, Context& to) { nncx_emulator_switch(&from, to); }

inline void make_context(Context& context, uint8_t* stack, size_t bytes, void (*entry)()) {
  auto** top = reinterpret_cast<void**>(stack + bytes) - 1;  // as if entry had been called
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  context = top;
}

#else

using Context = ucontext_t;

inline void switch_context(Context& from, Context& to) { swapcontext(&from, &to); }

inline void make_context(Context& context, uint8_t* stack, size_t bytes, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = bytes;
  makecontext(&context, entry, 0);
}

#endif

constexpr size_t kStackBytes = 256 * 1024;
constexpr size_t kStackGuard = 16 * 1024;  // at the low end, where a stack overflows

// One stack for each thread of a block, kept from block to block.
class Stacks {
 public:
  uint8_t* get(size_t at) {
    while (stacks_.size() <= at) {
      auto* stack = static_cast<uint8_t*>(mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                                               MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
      if (stack == MAP_FAILED || mprotect(stack, kStackGuard, PROT_NONE) != 0) std::abort();
      stacks_.push_back(stack);
    }
    return stacks_[at];
  }

  bool is_guard(const uint8_t* address) const {
    for (const uint8_t* stack : stacks_) {
      if (address >= stack && address < stack + kStackGuard) return true;
    }
    return false;
  }

 private:
  std::vector<uint8_t*> stacks_;
};

struct Fiber {
  Context context;
  void prepare(uint8_t* stack, void (*entry)()) {
    make_context(context, stack, kStackBytes, entry);
  }
};

}  // namespace nncx::emulator
