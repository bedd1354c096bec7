// A GPU as a Backend. Everything is enqueued; nothing waits for the GPU or reads its memory.
#pragma once

#include "common.h"
#include "cuda/error.h"
#include "cuda/memory.h"
#include "prepacked.h"

namespace nncx {

// Makes the tensor's GPU the current one while it lives. To be had once the devices of all operands
// were compared: the tensor may be of another device else.
class Backend {
 public:
#ifdef NNCX_EMULATED  // tensors of the CPU stand for a GPU's
  explicit Backend(const Tensor&) {}
#else
  explicit Backend(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    NNCX_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream_) == 0,
               "nncx: torch must have a current stream for every GPU, got none for device ",
               tensor.get_device_index());
  }
#endif

  void* stream() const { return stream_; }

  // Raises what a launch for `op` returned, unless that is success.
  void check(const char* op, int error) const {
    NNCX_CHECK(error == 0, op, ": the GPU must take its kernel, got ", cuda::error_text(error));
  }

  void zero(const char* op, const Tensor& bytes) const {
    check(op, cuda::zero(bytes.mutable_data_ptr(), bytes.numel(), stream_));
  }

  PrepackedHeader header(const std::string& format, const Conv2dWeightShape& s,
                         int64_t bytes) const {
    return sized_header(format, s, bytes);
  }

  // With zeros behind it, so that the same weights prepack to the same bytes.
  void write(const char* op, const PrepackedHeader& header, const Tensor& prepacked) const {
    zero(op, prepacked);
    auto* bytes = static_cast<uint8_t*>(prepacked.mutable_data_ptr());
    check(op, cuda::write_header(header, bytes, stream_));
  }

  // A part of another tensor can begin anywhere, where kernels read 16 bytes at a time.
  Tensor aligned(const Tensor& weight) const {
    const auto address = reinterpret_cast<uintptr_t>(weight.const_data_ptr());
    return address % 16 == 0 ? weight : torch::stable::clone(weight);
  }

  // Refuses a weight that was not prepacked as `expected` says, as far as its size tells.
  void check_weight(const char* op, const PrepackedHeader& expected, const Tensor& weight) const {
    const int64_t bytes = static_cast<int64_t>(sizeof expected) + expected.bytes;
    NNCX_CHECK(weight.numel() == bytes, op, ": weight must be prepacked for ",
               geometry_text(expected), ", got ", weight.numel(), " bytes instead of ", bytes,
               " on this GPU; prepack it again (nncx.repack(model))");
  }

 private:
#ifndef NNCX_EMULATED
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  void* stream_ = nullptr;
};

}  // namespace nncx
