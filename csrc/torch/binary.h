// What binary_conv2d and binary_linear share: prepacked weights, the epilogue's tensors, the split of
// the work. A linear layer is a 1 x 1 convolution of one-pixel images, so both run on binary_conv2d's
// backends.
//
// Each op reads the active path once and passes it on: another thread may call set_isa meanwhile.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "binary_conv2d.h"
#include "common.h"
#include "pack_signs.h"
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

inline PrepackedHeader prepacked_header(Isa isa, const BinaryWeightShape& s) {
  PrepackedHeader header{};
  const std::string path = "binary/" + std::string(isa_name(isa));
  std::memcpy(header.path, path.data(), path.size());
  header.groups = s.groups;
  header.out_channels = s.out_channels;
  header.taps = s.taps;
  header.channels = s.channels;
  header.bytes = NNCX_ON_PATH(isa, binary_conv2d_prepacked_bytes(s));
  return header;
}

inline Tensor prepack(const Tensor& weight, const BinaryWeightShape& s) {
  const Isa isa = active_isa();
  const PrepackedHeader header = prepacked_header(isa, s);
  const Tensor prepacked = torch::stable::new_empty(
      weight, {static_cast<int64_t>(sizeof header) + header.bytes}, ScalarType::Byte);
  auto* bytes = static_cast<uint8_t*>(prepacked.mutable_data_ptr());
  std::memcpy(bytes, &header, sizeof header);
  if (header.bytes == 0) return prepacked;  // an empty weight has no address
  const Tensor dense = torch::stable::contiguous(weight);
  NNCX_ON_PATH(isa, binary_conv2d_prepack(s, static_cast<const uint8_t*>(dense.const_data_ptr()),
                                          bytes + sizeof header));
  return prepacked;
}

// The bytes behind the header, if `weight` was prepacked by this path for this shape.
inline const uint8_t* open_prepacked(const char* op, Isa isa, const Tensor& input,
                                     const Tensor& weight, const BinaryWeightShape& s) {
  NNCX_CHECK(weight.device() == input.device(), op, ": weight must be on the input's device");
  const PrepackedHeader expected = prepacked_header(isa, s);
  PrepackedHeader header{};
  const bool is_prepacked = weight.scalar_type() == ScalarType::Byte && weight.dim() == 1 &&
                            weight.is_contiguous() &&
                            weight.numel() >= static_cast<int64_t>(sizeof header);
  NNCX_CHECK(is_prepacked, op, ": weight must come from ", op, "_prepack, got a tensor of shape ",
             shape_text(weight));
  const auto* bytes = static_cast<const uint8_t*>(weight.const_data_ptr());
  std::memcpy(&header, bytes, sizeof header);
  header.path[sizeof header.path - 1] = 0;
  NNCX_CHECK(std::memcmp(header.path, expected.path, sizeof header.path) == 0, op,
             ": weight must be prepacked for the path of this process, ", expected.path, ", got '",
             header.path, "'; prepack it again (nncx.repack(model))");
  NNCX_CHECK(std::memcmp(&header, &expected, sizeof header) == 0 &&
                 weight.numel() == static_cast<int64_t>(sizeof header) + expected.bytes,
             op, ": weight must be prepacked for groups=", s.groups,
             ", out_channels/groups=", s.out_channels, ", taps=", s.taps,
             ", in_channels/groups=", s.channels, ", got ", header.groups, ", ",
             header.out_channels, ", ", header.taps, ", ", header.channels);
  return bytes + sizeof header;
}

// Splits the pixels over torch's threads; where there are too few, the output channels too.
inline void run(Isa isa, const BinaryConv2dParams& params, const Tensor& input) {
  constexpr double kMinBits = 1 << 22;  // per thread: about 10 us
  constexpr int64_t kPixels = 48;       // per part at least, if the pixels suffice
  const BinaryWeightShape& s = params.shape;
  const int64_t pixels = params.batch * params.out_height * params.out_width;
  const int64_t blocks = s.groups * binary_blocks(s.out_channels);
  const double bits = static_cast<double>(pixels) * static_cast<double>(blocks * kBinaryBlock) *
                      static_cast<double>(s.taps * s.channels);
  const auto threads = static_cast<int64_t>(
      std::clamp<double>(bits / kMinBits, 1, torch::stable::get_num_threads()));
  int64_t pixel_parts = 1, block_parts = 1;
  if (threads > 1) {
    pixel_parts = std::clamp<int64_t>(pixels / kPixels, 1, 4 * threads);
    block_parts = pixel_parts >= threads ? 1 : std::min(threads, blocks);
  }
  const int64_t parts = pixel_parts * block_parts;
  const int64_t scratch_bytes = NNCX_ON_PATH(isa, binary_conv2d_scratch_bytes(params));
  const Tensor scratch = torch::stable::new_empty(input, {parts * scratch_bytes}, ScalarType::Byte);
  auto* bytes = static_cast<uint8_t*>(scratch.mutable_data_ptr());
  const auto cut = [](int64_t count, int64_t part, int64_t of) { return count * part / of; };
  parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const int64_t i = part / block_parts, j = part % block_parts;
      const BinaryTile tile = {cut(pixels, i, pixel_parts), cut(pixels, i + 1, pixel_parts),
                               cut(blocks, j, block_parts), cut(blocks, j + 1, block_parts)};
      NNCX_ON_PATH(isa, binary_conv2d(params, tile, bytes + part * scratch_bytes));
    }
  });
}

// A tensor of the epilogue: checked, and dense while the kernel reads it.
class EpilogueTensor {
 public:
  EpilogueTensor(const char* op, const char* name, const Tensor& input,
                 const std::optional<Tensor>& given, const std::vector<int64_t>& shape) {
    if (!given) return;
    NNCX_CHECK(given->scalar_type() == ScalarType::Float && has_shape(*given, shape) &&
                   given->device() == input.device(),
               op, ": ", name, " must be float32 of shape ", shape_text(shape),
               " on the input's device, got ", torch::headeronly::toString(given->scalar_type()),
               " of shape ", shape_text(*given));
    dense_ = torch::stable::contiguous(*given);
  }

  const float* data() const {
    return dense_ ? static_cast<const float*>(dense_->const_data_ptr()) : nullptr;
  }

 private:
  std::optional<Tensor> dense_;
};

inline ScalarType out_dtype_or_float(const char* op, std::optional<ScalarType> dtype) {
  const ScalarType type = dtype.value_or(ScalarType::Float);
  NNCX_CHECK(type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16,
             op, ": out_dtype must be float32, float16 or bfloat16, got ",
             torch::headeronly::toString(type));
  return type;
}

struct BinaryEpilogueTensors {
  EpilogueTensor scale, bias, input_scale;
};

// Everything after the geometry of `p` is checked: opens the weight and fills `output`.
inline void execute(const char* op, BinaryConv2dParams p, const Tensor& input, const Tensor& weight,
                    const BinaryEpilogueTensors& epilogue, const Tensor& output) {
  const Isa isa = active_isa();
  p.weight = open_prepacked(op, isa, input, weight, p.shape);
  if (output.numel() == 0) return;
  const Tensor dense = torch::stable::contiguous(input);
  p.input = static_cast<const uint8_t*>(dense.const_data_ptr());
  p.epilogue = {epilogue.scale.data(), epilogue.bias.data(), epilogue.input_scale.data(),
                output.mutable_data_ptr(), to_dtype(output.scalar_type(), op, "output")};
  run(isa, p, input);
}

}  // namespace nncx
