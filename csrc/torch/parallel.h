// Splits a loop over torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>

#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
#define NNCX_TSAN(call) __tsan_##call
#else
#define NNCX_TSAN(call) ((void)0)
#endif

namespace nncx {

// Calls task(from, to) for parts of [begin, end), of at least `grain` each, on several threads.
//
// torch's OpenMP is not instrumented, so ThreadSanitizer is told what it cannot see: each task
// starts after what came before the loop, and ends before what follows it. Two tasks stay
// unordered. What the lambda itself reads, it reads before it may say so.
template <class Task>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const Task& task) {
  [[maybe_unused]] char fork, join;
  NNCX_TSAN(release(&fork));
  torch::stable::parallel_for(begin, end, grain,
                              [&](int64_t from, int64_t to) __attribute__((no_sanitize("thread"))) {
                                NNCX_TSAN(acquire(&fork));
                                task(from, to);
                                NNCX_TSAN(release(&join));
                              });
  NNCX_TSAN(acquire(&join));
}

}  // namespace nncx
