// What every csrc/torch/<op>.cpp needs: checks that raise, formats, threads and streams.
//
// These files are compiled once into each library: into _C for the CPU, and with NNCX_DEVICE_CUDA
// into _cuda. Only _C defines schemas.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "dtype.h"
#include "isa.h"

#ifdef NNCX_DEVICE_CUDA
#define NNCX_DEVICE CUDA
#else
#define NNCX_DEVICE CPU
#endif

namespace nncx {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Raises RuntimeError with the sentence "<op>: <what must hold>, got <value>" that the parts form.
template <class... Parts>
void check(bool holds, const Parts&... parts) {
  if (holds) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline std::string shape_text(const Tensor& tensor) {
  std::ostringstream text;
  text << '[';
  for (int64_t i = 0; i < tensor.dim(); ++i) text << (i ? ", " : "") << tensor.size(i);
  text << ']';
  return text.str();
}

inline Dtype to_dtype(ScalarType type, const char* op, const char* what) {
  switch (type) {
    case ScalarType::Float:
      return Dtype::float32;
    case ScalarType::Half:
      return Dtype::float16;
    case ScalarType::BFloat16:
      return Dtype::bfloat16;
    case ScalarType::Double:
      return Dtype::float64;
    default:
      check(false, op, ": ", what, " must be a floating-point type, got ",
            torch::headeronly::toString(type));
      return Dtype::float32;
  }
}

#ifdef NNCX_DEVICE_CUDA

inline void* current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  check(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream) == 0,
        "nncx: torch gave no CUDA stream for device ", tensor.get_device_index());
  return stream;
}

#else

// Calls run(begin, end) over parts of [0, count), on torch's threads; run must not throw. Parts
// have at least `grain` units and, but for the last, a multiple of `step`.
template <class Run>
void parallel(int64_t count, int64_t grain, int64_t step, const Run& run) {
  const int64_t steps = (count + step - 1) / step;
  const int64_t grain_steps = std::max<int64_t>(1, grain / step);
  torch::stable::parallel_for(0, steps, grain_steps, [&](int64_t begin, int64_t end) {
    run(begin * step, std::min(count, end * step));
  });
}

#endif

}  // namespace nncx
