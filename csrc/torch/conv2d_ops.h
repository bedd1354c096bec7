// What the ops that run on a 2-D convolution share: checks of the geometry, prepacked weights, the
// epilogue's tensors, the split of the work.
#pragma once

#include <algorithm>
#include <limits>
#include <new>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "backend.h"
#include "conv2d.h"
#include "parallel.h"

namespace nncx {

constexpr int64_t kMostTerms = (int64_t{1} << 30) - 1;  // of a dot product: twice that fits int32

// Checked before any product of sizes is formed: no size that follows from these overflows int64.
inline void check_weight_shape(const char* op, int64_t groups, int64_t out_channels, int64_t taps,
                               int64_t channels) {
  NNCX_CHECK(channels <= kMostTerms && taps <= kMostTerms / std::max<int64_t>(channels, 1), op,
             ": a dot product must have less than 2^30 terms, got ", taps, " x ", channels);
  // rounded up as any path may: 32 outputs, 64 channels, 8 bytes
  const double bytes = 8.0 * static_cast<double>(groups) *
                       (static_cast<double>(out_channels) + 31) * static_cast<double>(taps) *
                       (static_cast<double>(channels) + 63);
  NNCX_CHECK(bytes < 0x1p60, op, ": the weight must fit in memory, got groups=", groups,
             ", out_channels/groups=", out_channels, ", taps=", taps,
             ", in_channels/groups=", channels);
}

inline bool is_empty(const Conv2dWeightShape& s) {
  return s.groups == 0 || s.out_channels == 0 || s.taps == 0 || s.channels == 0;
}

// A tensor of the header and what fill(dense weight, bytes behind the header) writes.
template <class Fill>
Tensor prepack(const char* op, const Backend& backend, const Tensor& weight,
               const PrepackedHeader& header, const Fill& fill) {
  const Tensor prepacked =
      new_tensor(weight, {static_cast<int64_t>(sizeof header) + header.bytes}, ScalarType::Byte);
  backend.write(op, header, prepacked);
  if (header.bytes == 0) return prepacked;  // an empty weight has no address
  const Tensor contiguous = dense(weight);
  fill(static_cast<const uint8_t*>(contiguous.const_data_ptr()),
       static_cast<uint8_t*>(prepacked.mutable_data_ptr()) + sizeof header);
  return prepacked;
}

// Of the op that makes the weights of `op`, whether numbers or signs leave it.
inline std::string prepack_name(std::string_view op) {
  constexpr std::string_view kSign = "_sign";
  if (op.ends_with(kSign)) op.remove_suffix(kSign.size());
  return std::string(op) + "_prepack";
}

// Before a Backend of the input's device is made.
inline void check_device(const char* op, const Tensor& input, const Tensor& weight) {
  NNCX_CHECK(weight.device() == input.device(), op, ": weight must be on the input's device, got ",
             device_text(weight), " and ", device_text(input));
}

// The weight, if it was prepacked as `expected` says: where the backend's kernels can read it.
inline Tensor open_prepacked(const char* op, const Backend& backend, const Tensor& weight,
                             const PrepackedHeader& expected) {
  const bool is_prepacked = weight.scalar_type() == ScalarType::Byte && weight.dim() == 1 &&
                            weight.is_contiguous() &&
                            weight.numel() >= static_cast<int64_t>(sizeof expected);
  NNCX_CHECK(is_prepacked, op, ": weight must come from ", prepack_name(op),
             ", got a tensor of shape ", shape_text(weight));
  backend.check_weight(op, expected, weight);
  return backend.aligned(weight);
}

inline const uint8_t* behind_header(const Tensor& prepacked) {
  return static_cast<const uint8_t*>(prepacked.const_data_ptr()) + sizeof(PrepackedHeader);
}

inline const char* type_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Char:
      return "int8";
    default:
      return "bool";
  }
}

// Refuses a tensor, if it is given, that is none of `shape` and `type` on the input's device.
inline void check_operand(const char* op, const char* name, const Tensor& input,
                          const std::optional<Tensor>& given, const std::vector<int64_t>& shape,
                          ScalarType type) {
  NNCX_CHECK(!given || (given->scalar_type() == type && has_shape(*given, shape) &&
                        given->device() == input.device()),
             op, ": ", name, " must be ", type_name(type), " of shape ", shape_text(shape),
             " on the input's device, got ", tensor_text(*given));
}

// A tensor of the epilogue: checked, and dense while the kernel reads it.
class EpilogueTensor {
 public:
  EpilogueTensor(const char* op, const char* name, const Tensor& input,
                 const std::optional<Tensor>& given, const std::vector<int64_t>& shape,
                 ScalarType type = ScalarType::Float) {
    check_operand(op, name, input, given, shape, type);
    if (given) dense_ = dense(*given);
  }

  template <class T = float>
  const T* data() const {
    return dense_ ? static_cast<const T*>(dense_->const_data_ptr()) : nullptr;
  }

 private:
  std::optional<Tensor> dense_;
};

inline void check_input_dtype(const char* op, const Tensor& input) {
  const ScalarType type = input.scalar_type();
  NNCX_CHECK(type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16,
             op, ": input must be float32, float16 or bfloat16, got ",
             torch::headeronly::toString(type));
}

inline ScalarType check_out_dtype(const char* op, ScalarType type) {
  NNCX_CHECK(type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16,
             op, ": out_dtype must be float32, float16 or bfloat16, got ",
             torch::headeronly::toString(type));
  return type;
}

// ---------------------------------------------------------------------------------------------
// Geometry

using Pair = const std::vector<int64_t>&;

constexpr int64_t kMostPixels = int64_t{1} << 31;  // of a padded image

inline void check_groups(const char* op, int64_t in_channels, int64_t out_channels,
                         int64_t groups) {
  NNCX_CHECK(groups >= 1 && in_channels >= 0 && out_channels >= 0 && in_channels % groups == 0 &&
                 out_channels % groups == 0,
             op, ": groups must divide in_channels and out_channels, got groups=", groups,
             ", in_channels=", in_channels, ", out_channels=", out_channels);
}

inline void check_pair(const char* op, const char* name, Pair pair, int64_t least) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  NNCX_CHECK(pair.size() == 2 && std::min(pair[0], pair[1]) >= least &&
                 std::max(pair[0], pair[1]) <= kMost,
             op, ": ", name, " must be two numbers from ", least, " to ", kMost, ", got ",
             shape_text(pair));
}

inline int64_t out_size(int64_t size, int64_t kernel, int64_t stride, int64_t padding,
                        int64_t dilation) {
  const int64_t span = size + 2 * padding - dilation * (kernel - 1) - 1;
  return span < 0 ? 0 : span / stride + 1;
}

// The weight's shape, checked, and with it the arguments of a convolution.
inline Conv2dWeightShape read_weight_shape(const char* op, int64_t in_channels,
                                           int64_t out_channels, Pair kernel_size, int64_t groups) {
  check_groups(op, in_channels, out_channels, groups);
  check_pair(op, "kernel_size", kernel_size, 1);
  const Conv2dWeightShape shape = {groups, out_channels / groups, kernel_size[0] * kernel_size[1],
                                   in_channels / groups};
  check_weight_shape(op, groups, shape.out_channels, shape.taps, shape.channels);
  return shape;
}

// Of a linear layer: a 1 x 1 kernel.
inline Conv2dWeightShape read_weight_shape(const char* op, int64_t in_features,
                                           int64_t out_features) {
  NNCX_CHECK(in_features >= 0 && out_features >= 0, op,
             ": in_features and out_features must be at least 0, got ", in_features, " and ",
             out_features);
  check_weight_shape(op, 1, out_features, 1, in_features);
  return {.groups = 1, .out_channels = out_features, .taps = 1, .channels = in_features};
}

inline void check_window(const char* op, Pair stride, Pair padding, Pair dilation) {
  check_pair(op, "stride", stride, 1);
  check_pair(op, "padding", padding, 0);
  check_pair(op, "dilation", dilation, 1);
}

inline Conv2dGeometry read_geometry(const char* op, int64_t batch, int64_t height, int64_t width,
                                    Pair kernel_size, Pair stride, Pair padding, Pair dilation) {
  Conv2dGeometry p{};
  p.batch = batch;
  p.height = height;
  p.width = width;
  p.kernel_h = kernel_size[0], p.kernel_w = kernel_size[1];
  p.stride_h = stride[0], p.stride_w = stride[1];
  p.padding_h = padding[0], p.padding_w = padding[1];
  p.dilation_h = dilation[0], p.dilation_w = dilation[1];
  p.out_height = out_size(p.height, p.kernel_h, p.stride_h, p.padding_h, p.dilation_h);
  p.out_width = out_size(p.width, p.kernel_w, p.stride_w, p.padding_w, p.dilation_w);
  NNCX_CHECK(p.out_height >= 1 && p.out_width >= 1, op,
             ": the padded input must be at least as large as the dilated kernel, got input ",
             p.height, " x ", p.width, ", kernel_size ", p.kernel_h, " x ", p.kernel_w,
             ", padding ", p.padding_h, " x ", p.padding_w);
  const int64_t padded_height = p.height + 2 * p.padding_h;
  const int64_t padded_width = p.width + 2 * p.padding_w;
  NNCX_CHECK(padded_width <= kMostPixels / padded_height, op,
             ": the padded input must have at most 2^31 pixels an image, got ", padded_height,
             " x ", padded_width);
  return p;
}

// Whether the output is to be channels_last: the format of the input, unless that has both.
inline bool keeps_channels_last(const Tensor& input) {
  if (input.is_contiguous()) return false;
  int64_t expected = 1;
  for (const int64_t d : {1, 3, 2, 0}) {
    if (input.size(d) == 1) continue;
    if (input.stride(d) != expected) return false;
    expected *= input.size(d);
  }
  return true;
}

// `batch` rows as images of one pixel.
inline Conv2dGeometry row_geometry(int64_t batch) {
  return {batch, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1, 1, 1};
}

// ---------------------------------------------------------------------------------------------
// Work

// Of torch's threads, how many get at least a unit of work each.
inline int64_t threads_for(double units) {
  return static_cast<int64_t>(std::clamp<double>(units, 1, torch::stable::get_num_threads()));
}

// Scratch that a thread keeps from one call to the next. Taken anew it would lie behind the output,
// and glibc before 2.38 then grows the heap by an output with every call, page faults included.
// What is too large to be kept is taken from torch, which says so where there is no memory.
class Scratch {
 public:
  Scratch(const Tensor& input, int64_t parts, int64_t part_bytes) {
    if (part_bytes <= kMostKept / std::max<int64_t>(parts, 1)) {
      static thread_local Kept kept;
      bytes_ = kept.at_least(parts * part_bytes);
    } else {
      // Two sizes, since the product may be beyond int64: a line of an image can have 2^59 bytes.
      large_ = new_tensor(input, {parts, part_bytes}, ScalarType::Byte);
      bytes_ = static_cast<uint8_t*>(large_->mutable_data_ptr());
    }
  }

  uint8_t* bytes() const { return bytes_; }

 private:
  static constexpr int64_t kMostKept = 4 << 20;
  static constexpr std::align_val_t kAlignment{64};

  class Kept {
   public:
    ~Kept() { ::operator delete(bytes_, kAlignment); }

    uint8_t* at_least(int64_t size) {
      if (size > size_) {
        ::operator delete(bytes_, kAlignment);
        bytes_ = nullptr;
        size_ = 0;
        bytes_ = static_cast<uint8_t*>(::operator new(static_cast<size_t>(size), kAlignment));
        size_ = size;
      }
      return bytes_;
    }

   private:
    uint8_t* bytes_ = nullptr;
    int64_t size_ = 0;
  };

  uint8_t* bytes_;
  std::optional<Tensor> large_;
};

// Calls run(tile, scratch) on pixel_parts x block_parts tiles of `all`, in torch's threads.
template <class Run>
void run_tiles(const Tensor& input, const Conv2dTile& all, int64_t pixel_parts, int64_t block_parts,
               int64_t scratch_bytes, const Run& run) {
  const int64_t parts = pixel_parts * block_parts;
  const Scratch scratch(input, parts, scratch_bytes);
  uint8_t* bytes = scratch.bytes();
  const auto cut = [](int64_t count, int64_t part, int64_t of) { return count * part / of; };
  parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const int64_t i = part / block_parts, j = part % block_parts;
      const Conv2dTile tile = {
          cut(all.pixel_end, i, pixel_parts), cut(all.pixel_end, i + 1, pixel_parts),
          cut(all.block_end, j, block_parts), cut(all.block_end, j + 1, block_parts)};
      run(tile, bytes + part * scratch_bytes);
    }
  });
}

}  // namespace nncx
