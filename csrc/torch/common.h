// What every csrc/torch/<op>.cpp needs: checks that raise, formats, new tensors.
//
// These files are compiled once into each library: into _C for the CPU, and with NNCX_DEVICE_CUDA
// into _cuda, which leaves the schemas to _C. With NNCX_EMULATED too they are compiled for tests, as
// ops of their own that run CUDA kernels on the CPU (tests/emulator).
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "dtype.h"

#ifndef NNCX_NAMESPACE  // of the ops in torch's dispatcher
#define NNCX_NAMESPACE nncx
#endif

#if defined(NNCX_DEVICE_CUDA) && !defined(NNCX_EMULATED)
#define NNCX_DEVICE CUDA
#define NNCX_SCHEMAS(library) \
  [[maybe_unused]] static void unused_schemas(torch::stable::detail::StableLibrary& library)
#else
#define NNCX_DEVICE CPU
#define NNCX_SCHEMAS(library) STABLE_TORCH_LIBRARY_FRAGMENT(NNCX_NAMESPACE, library)
#endif
#define NNCX_KERNELS(library) STABLE_TORCH_LIBRARY_IMPL(NNCX_NAMESPACE, NNCX_DEVICE, library)

namespace nncx {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string text_of(std::string_view text) { return std::string(text); }
template <class Integer>
  requires std::is_integral_v<Integer>
std::string text_of(Integer value) {
  return std::to_string(value);
}

// Raises RuntimeError with the sentence that the parts form. Without streams, whose locales break
// where a toolchain links its C++ library into this one and torch brings another.
template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  throw std::runtime_error((text_of(parts) + ...));
}

// NNCX_CHECK(holds, "<op>: <what must hold>, got ", value). The parts are evaluated only on failure.
// (STD_TORCH_CHECK would put the C++ function and line before the sentence.)
#define NNCX_CHECK(holds, ...)               \
  do {                                       \
    if (!(holds)) ::nncx::fail(__VA_ARGS__); \
  } while (0)

template <class Sizes>
std::string sizes_text(const Sizes& sizes) {
  std::string text;
  for (const int64_t size : sizes) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return '[' + text + ']';
}

inline std::string shape_text(const std::vector<int64_t>& sizes) { return sizes_text(sizes); }
inline std::string shape_text(const Tensor& tensor) { return sizes_text(tensor.sizes()); }

inline std::string device_text(const Tensor& tensor) {
  const auto device = tensor.device();
  switch (device.type()) {
    case torch::headeronly::DeviceType::CPU:
      return "cpu";
    case torch::headeronly::DeviceType::CUDA:
      return "cuda:" + std::to_string(device.index());
    default:
      return "another device";
  }
}

inline std::string tensor_text(const Tensor& tensor) {
  return std::string(torch::headeronly::toString(tensor.scalar_type())) + " of shape " +
         shape_text(tensor) + " on " + device_text(tensor);
}

inline bool has_shape(const Tensor& tensor, const std::vector<int64_t>& shape) {
  const auto sizes = tensor.sizes();
  return std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end());
}

// A new tensor on the device of `like`, dense, channels innermost if so wished. torch::stable::empty
// asks the dispatcher for an op by its name, which takes a microsecond; this does not. Strides are
// torch's, which a fake tensor has: of an empty tensor they count a size of 0 as 1, or as 0 where
// channels are innermost.
inline Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType type,
                         bool channels_last = false) {
  const auto dim = static_cast<int64_t>(sizes.size());
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  const auto fits = [&](bool holds) {
    NNCX_CHECK(holds, "nncx: torch must have memory for a tensor of shape ", shape_text(sizes),
               ", got an error; free some");
  };
  const auto place = [&](int64_t i) {
    strides[i] = stride;
    const int64_t size = channels_last ? sizes[i] : std::max<int64_t>(sizes[i], 1);
    fits(!__builtin_mul_overflow(stride, size, &stride));
  };
  if (channels_last) place(1);
  for (int64_t i = dim - 1; i >= 0; --i) {
    if (!channels_last || i != 1) place(i);
  }
  int32_t device_type;
  NNCX_CHECK(aoti_torch_get_device_type(like.get(), &device_type) == 0,
             "nncx: torch gave no device of a tensor");
  const auto dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle handle;
  fits(aoti_torch_empty_strided(dim, sizes.data(), strides.data(), dtype, device_type,
                                like.get_device_index(), &handle) == 0);
  return Tensor(handle);
}

inline Tensor dense(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
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
      fail(op, ": ", what, " must be a floating-point type, got ",
           torch::headeronly::toString(type));
  }
}

}  // namespace nncx
