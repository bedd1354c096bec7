// What binary_conv2d and binary_linear share: prepacked weights, and the split of the work. A
// linear layer is a 1 x 1 convolution of one-pixel images, so both run on binary_conv2d's backends.
#pragma once

#include <algorithm>
#include <cstring>

#include "binary_conv2d.h"
#include "common.h"
#include "pack_signs.h"

namespace nncx {

inline PrepackedHeader prepacked_header(const BinaryWeightShape& s) {
  PrepackedHeader header{};
  const std::string path = "binary/" + std::string(isa_name(active_isa()));
  std::memcpy(header.path, path.data(), path.size());
  header.groups = s.groups;
  header.out_channels = s.out_channels;
  header.taps = s.taps;
  header.channels = s.channels;
  header.bytes = NNCX_ON_PATH(binary_conv2d_prepacked_bytes(s));
  return header;
}

inline Tensor prepack(const Tensor& weight, const BinaryWeightShape& s) {
  const PrepackedHeader header = prepacked_header(s);
  const Tensor prepacked = torch::stable::new_empty(
      weight, {static_cast<int64_t>(sizeof header) + header.bytes}, ScalarType::Byte);
  const Tensor dense = torch::stable::contiguous(weight);
  auto* bytes = static_cast<uint8_t*>(prepacked.mutable_data_ptr());
  std::memcpy(bytes, &header, sizeof header);
  NNCX_ON_PATH(binary_conv2d_prepack(s, static_cast<const uint8_t*>(dense.const_data_ptr()),
                                     bytes + sizeof header));
  return prepacked;
}

// The bytes behind the header, if `weight` was prepacked by this path for this shape.
inline const uint8_t* open_prepacked(const char* op, const Tensor& weight,
                                     const BinaryWeightShape& s) {
  const PrepackedHeader expected = prepacked_header(s);
  PrepackedHeader header{};
  const bool is_prepacked = weight.scalar_type() == ScalarType::Byte && weight.dim() == 1 &&
                            weight.is_contiguous() &&
                            weight.numel() >= static_cast<int64_t>(sizeof header);
  check(is_prepacked, op, ": weight must come from ", op, "_prepack, got a tensor of shape ",
        shape_text(weight));
  const auto* bytes = static_cast<const uint8_t*>(weight.const_data_ptr());
  std::memcpy(&header, bytes, sizeof header);
  header.path[sizeof header.path - 1] = 0;
  check(std::memcmp(header.path, expected.path, sizeof header.path) == 0, op,
        ": weight must be prepacked for the path of this process, ", expected.path, ", got '",
        header.path, "'; prepack it again (nncx.repack(model))");
  check(std::memcmp(&header, &expected, sizeof header) == 0 &&
            weight.numel() == static_cast<int64_t>(sizeof header) + expected.bytes,
        op, ": weight must be prepacked for groups=", s.groups,
        ", out_channels/groups=", s.out_channels, ", taps=", s.taps,
        ", in_channels/groups=", s.channels, ", got ", header.groups, ", ", header.out_channels,
        ", ", header.taps, ", ", header.channels);
  return bytes + sizeof header;
}

// The epilogue's tensors, kept dense while the kernel reads them.
class EpilogueTensors {
 public:
  // `input_scale_numel` values, one per pixel and group.
  EpilogueTensors(const char* op, const Tensor& input, const std::optional<Tensor>& scale,
                  const std::optional<Tensor>& bias, const std::optional<Tensor>& input_scale,
                  int64_t out_channels, int64_t input_scale_numel) {
    epilogue_.scale = keep(op, "scale", input, scale, scale_, out_channels);
    epilogue_.bias = keep(op, "bias", input, bias, bias_, out_channels);
    epilogue_.input_scale =
        keep(op, "input_scale", input, input_scale, input_scale_, input_scale_numel);
  }

  BinaryEpilogue writing_to(const Tensor& output) const {
    BinaryEpilogue epilogue = epilogue_;
    epilogue.output = output.mutable_data_ptr();
    epilogue.dtype = to_dtype(output.scalar_type(), "binary", "output");
    return epilogue;
  }

 private:
  static const float* keep(const char* op, const char* name, const Tensor& input,
                           const std::optional<Tensor>& given, std::optional<Tensor>& kept,
                           int64_t numel) {
    if (!given) return nullptr;
    check(given->scalar_type() == ScalarType::Float && given->numel() == numel &&
              given->device() == input.device(),
          op, ": ", name, " must be float32 with ", numel, " elements on the input's device, got ",
          torch::headeronly::toString(given->scalar_type()), " of shape ", shape_text(*given));
    kept = torch::stable::contiguous(*given);
    return static_cast<const float*>(kept->const_data_ptr());
  }

  BinaryEpilogue epilogue_{};
  std::optional<Tensor> scale_, bias_, input_scale_;
};

inline ScalarType out_dtype_or_float(const char* op, std::optional<ScalarType> dtype) {
  const ScalarType type = dtype.value_or(ScalarType::Float);
  check(type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16, op,
        ": out_dtype must be float32, float16 or bfloat16, got ",
        torch::headeronly::toString(type));
  return type;
}

// Splits the pixels over torch's threads; where there are too few, the output channels too.
inline void run(const BinaryConv2dParams& params, const Tensor& input) {
  constexpr int64_t kMinBits = 1 << 22;  // per thread: about 20 us
  constexpr int64_t kPixels = 48;        // per task at least, if the pixels suffice
  const BinaryWeightShape& s = params.shape;
  const int64_t pixels = params.batch * params.out_height * params.out_width;
  const int64_t blocks = s.groups * binary_blocks(s.out_channels);
  const int64_t bits = pixels * blocks * kBinaryBlock * s.taps * std::max<int64_t>(s.channels, 1);
  const int64_t threads = std::clamp<int64_t>(bits / kMinBits, 1, torch::stable::get_num_threads());
  int64_t pixel_parts = 1, block_parts = 1;
  if (threads > 1) {
    pixel_parts = std::clamp<int64_t>(pixels / kPixels, 1, 4 * threads);
    block_parts = pixel_parts >= threads ? 1 : std::min(threads, blocks);
  }
  const int64_t parts = pixel_parts * block_parts;
  const int64_t scratch_bytes = NNCX_ON_PATH(binary_conv2d_scratch_bytes(params));
  const Tensor scratch = torch::stable::new_empty(input, {parts * scratch_bytes}, ScalarType::Byte);
  auto* bytes = static_cast<uint8_t*>(scratch.mutable_data_ptr());
  const auto cut = [](int64_t count, int64_t part, int64_t of) { return count * part / of; };
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const int64_t i = part / block_parts, j = part % block_parts;
      const BinaryTile tile = {cut(pixels, i, pixel_parts), cut(pixels, i + 1, pixel_parts),
                               cut(blocks, j, block_parts), cut(blocks, j + 1, block_parts)};
      NNCX_ON_PATH(binary_conv2d(params, tile, bytes + part * scratch_bytes));
    }
  });
}

}  // namespace nncx
