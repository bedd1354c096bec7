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
  return binary_prepack(op, weight,
                        {.groups = groups,
                         .out_channels = weight.size(0) / groups,
                         .taps = taps,
                         .channels = channels});
}

// The geometry, checked; its pointers are still null.
BinaryConv2dParams read_params(const char* op, const Tensor& input, int64_t in_channels,
                               int64_t out_channels, Pair kernel_size, Pair stride, Pair padding,
                               Pair dilation, int64_t groups, int64_t pad_value) {
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
                     std::optional<Tensor> input_scale, std::optional<ScalarType> out_dtype,
                     bool channels_last) {
  constexpr const char* op = "binary_conv2d";
  BinaryConv2dParams p = read_params(op, input, in_channels, out_channels, kernel_size, stride,
                                     padding, dilation, groups, pad_value);
  const Tensor output =
      new_tensor(input, {p.batch, out_channels, p.out_height, p.out_width},
                 check_out_dtype(op, out_dtype.value_or(ScalarType::Float)), channels_last);
  p.epilogue.channels_last = channels_last;
  execute_numbers(op, p, input, weight, scale, bias, input_scale,
                  {p.batch, groups, p.out_height, p.out_width}, output);
  return output;
}

Tensor binary_conv2d_sign(const Tensor& input, const Tensor& weight, const Tensor& threshold,
                          const Tensor& flip, int64_t in_channels, int64_t out_channels,
                          std::vector<int64_t> kernel_size, std::vector<int64_t> stride,
                          std::vector<int64_t> padding, std::vector<int64_t> dilation,
                          int64_t groups, int64_t pad_value, int64_t out_groups) {
  constexpr const char* op = "binary_conv2d_sign";
  const BinaryConv2dParams p = read_params(op, input, in_channels, out_channels, kernel_size,
                                           stride, padding, dilation, groups, pad_value);
  NNCX_CHECK(out_groups >= 1 && out_channels % out_groups == 0, op,
             ": out_groups must divide out_channels, got out_groups=", out_groups,
             ", out_channels=", out_channels);
  const Tensor output = new_tensor(
      input,
      {p.batch, p.out_height, p.out_width, out_groups, packed_bytes(out_channels / out_groups)},
      ScalarType::Byte);
  execute_signs(op, p, input, weight, threshold, flip, out_groups, output);
  return output;
}

}  // namespace

NNCX_SCHEMAS(library) {
  library.def("binary_conv2d_prepack(Tensor weight, int in_channels, int groups=1) -> Tensor");
  library.def(
      "binary_conv2d(Tensor input, Tensor weight, int in_channels, int out_channels, "
      "int[2] kernel_size, int[2] stride=1, int[2] padding=0, int[2] dilation=1, int groups=1, "
      "int pad_value=0, Tensor? scale=None, Tensor? bias=None, Tensor? input_scale=None, "
      "ScalarType? out_dtype=None, bool channels_last=True) -> Tensor");
  library.def(
      "binary_conv2d_sign(Tensor input, Tensor weight, Tensor threshold, Tensor flip, "
      "int in_channels, int out_channels, int[2] kernel_size, int[2] stride=1, int[2] padding=0, "
      "int[2] dilation=1, int groups=1, int pad_value=0, int out_groups=1) -> Tensor");
}

NNCX_KERNELS(library) {
  library.impl("binary_conv2d_prepack", TORCH_BOX(&binary_conv2d_prepack));
  library.impl("binary_conv2d", TORCH_BOX(&binary_conv2d));
  library.impl("binary_conv2d_sign", TORCH_BOX(&binary_conv2d_sign));
}

}  // namespace nncx
