#include "binary.h"

namespace nncx {
namespace {

Tensor binary_conv2d_prepack(const Tensor& weight, int64_t in_channels, int64_t groups) {
  constexpr const char* op = "binary_conv2d_prepack";
  NNCX_CHECK(weight.scalar_type() == ScalarType::Byte && weight.dim() == 5 && weight.size(3) == 1,
             op,
             ": weight must be uint8 [out_channels, kernel_h, kernel_w, 1, bytes] from "
             "pack_signs, got ",
             torch::headeronly::toString(weight.scalar_type()), " of shape ", shape_text(weight));
  check_groups(op, in_channels, weight.size(0), groups);
  const int64_t channels = in_channels / groups;
  int64_t taps;  // of an empty weight they can be any number
  if (__builtin_mul_overflow(weight.size(1), weight.size(2), &taps)) taps = kMostTerms + 1;
  check_weight_shape(op, groups, weight.size(0) / groups, taps, channels);
  NNCX_CHECK(weight.size(4) == packed_bytes(channels), op, ": weight must have ",
             packed_bytes(channels), " bytes for ", channels, " channels a group, got shape ",
             shape_text(weight));
  return prepack(weight, {.groups = groups,
                          .out_channels = weight.size(0) / groups,
                          .taps = taps,
                          .channels = channels});
}

// The geometry, checked; its pointers are still null.
BinaryConv2dParams read_params(const Tensor& input, int64_t in_channels, int64_t out_channels,
                               Pair kernel_size, Pair stride, Pair padding, Pair dilation,
                               int64_t groups, int64_t pad_value) {
  constexpr const char* op = "binary_conv2d";
  BinaryConv2dParams p{};
  p.shape = read_weight_shape(op, in_channels, out_channels, kernel_size, groups);
  check_window(op, stride, padding, dilation);
  NNCX_CHECK(pad_value >= -1 && pad_value <= 1, op, ": pad_value must be -1, 0 or 1, got ",
             pad_value);
  p.pad_value = static_cast<int>(pad_value);
  const int64_t bytes = packed_bytes(p.shape.channels);
  NNCX_CHECK(input.scalar_type() == ScalarType::Byte && input.dim() == 5 &&
                 input.size(3) == groups && input.size(4) == bytes,
             op, ": input must be uint8 [N, H, W, ", groups, ", ", bytes, "] from pack_signs, got ",
             torch::headeronly::toString(input.scalar_type()), " of shape ", shape_text(input));
  static_cast<Conv2dGeometry&>(p) = read_geometry(op, input.size(0), input.size(1), input.size(2),
                                                  kernel_size, stride, padding, dilation);
  return p;
}

Tensor binary_conv2d(const Tensor& input, const Tensor& weight, int64_t in_channels,
                     int64_t out_channels, std::vector<int64_t> kernel_size,
                     std::vector<int64_t> stride, std::vector<int64_t> padding,
                     std::vector<int64_t> dilation, int64_t groups, int64_t pad_value,
                     std::optional<Tensor> scale, std::optional<Tensor> bias,
                     std::optional<Tensor> input_scale, std::optional<ScalarType> out_dtype) {
  constexpr const char* op = "binary_conv2d";
  const BinaryConv2dParams p = read_params(input, in_channels, out_channels, kernel_size, stride,
                                           padding, dilation, groups, pad_value);
  const Tensor output = torch::stable::empty(
      {p.batch, out_channels, p.out_height, p.out_width},
      check_out_dtype(op, out_dtype.value_or(ScalarType::Float)), std::nullopt, input.device(),
      std::nullopt, torch::headeronly::MemoryFormat::ChannelsLast);
  const std::vector<int64_t> per_pixel = {p.batch, groups, p.out_height, p.out_width};
  const BinaryEpilogueTensors epilogue = {{op, "scale", input, scale, {out_channels}},
                                          {op, "bias", input, bias, {out_channels}},
                                          {op, "input_scale", input, input_scale, per_pixel}};
  execute(op, p, input, weight, epilogue, output);
  return output;
}

}  // namespace

NNCX_SCHEMAS(library) {
  library.def("binary_conv2d_prepack(Tensor weight, int in_channels, int groups=1) -> Tensor");
  library.def(
      "binary_conv2d(Tensor input, Tensor weight, int in_channels, int out_channels, "
      "int[2] kernel_size, int[2] stride=1, int[2] padding=0, int[2] dilation=1, int groups=1, "
      "int pad_value=0, Tensor? scale=None, Tensor? bias=None, Tensor? input_scale=None, "
      "ScalarType? out_dtype=None) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(nncx, NNCX_DEVICE, library) {
  library.impl("binary_conv2d_prepack", TORCH_BOX(&binary_conv2d_prepack));
  library.impl("binary_conv2d", TORCH_BOX(&binary_conv2d));
}

}  // namespace nncx
