#include "int8.h"

namespace nncx {
namespace {

using torch::headeronly::MemoryFormat;

Tensor int8_conv2d_prepack(const Tensor& weight, int64_t groups) {
  constexpr const char* op = "int8_conv2d_prepack";
  check_int8(op, "weight", weight);
  NNCX_CHECK(weight.dim() == 4, op,
             ": weight must be [out_channels, in_channels/groups, kernel_h, kernel_w], got shape ",
             shape_text(weight));
  NNCX_CHECK(groups >= 1, op, ": groups must be at least 1, got ", groups);
  int64_t in_channels;
  if (__builtin_mul_overflow(weight.size(1), groups, &in_channels)) {
    in_channels = std::numeric_limits<int64_t>::max() / groups * groups;  // refused as too large
  }
  const Conv2dWeightShape s =
      read_weight_shape(op, in_channels, weight.size(0), {weight.size(2), weight.size(3)}, groups);
  check_terms(op, s);
  return int8_prepack(op, weight, s);
}

Tensor int8_conv2d(const Tensor& input, const Tensor& weight, int64_t in_channels,
                   int64_t out_channels, std::vector<int64_t> kernel_size,
                   std::vector<int64_t> stride, std::vector<int64_t> padding,
                   std::vector<int64_t> dilation, int64_t groups,
                   std::optional<Tensor> input_zero_point, std::optional<Tensor> scale,
                   std::optional<Tensor> bias, std::optional<Tensor> residual,
                   std::optional<Tensor> residual_scale, std::optional<Tensor> residual_zero_point,
                   std::string activation, std::optional<Tensor> out_scale,
                   std::optional<Tensor> out_zero_point, std::optional<ScalarType> out_dtype,
                   bool channels_last) {
  constexpr const char* op = "int8_conv2d";
  const Int8Arguments arguments = {
      input_zero_point,    scale,      bias,      std::nullopt,   residual, residual_scale,
      residual_zero_point, activation, out_scale, out_zero_point, out_dtype};
  Int8Conv2dParams p{};
  p.shape = read_weight_shape(op, in_channels, out_channels, kernel_size, groups);
  check_terms(op, p.shape);
  check_window(op, stride, padding, dilation);
  check_int8(op, "input", input);
  NNCX_CHECK(input.dim() == 4 && input.size(1) == in_channels, op, ": input must be [N, ",
             in_channels, ", H, W], got shape ", shape_text(input));
  static_cast<Conv2dGeometry&>(p) = read_geometry(op, input.size(0), input.size(2), input.size(3),
                                                  kernel_size, stride, padding, dilation);
  const ScalarType type = arguments.output_type(op);
  channels_last = channels_last || type == ScalarType::Char;
  const Tensor output =
      new_tensor(input, {p.batch, out_channels, p.out_height, p.out_width}, type, channels_last);
  const Int8Tensors tensors(op, input, arguments, out_channels, output, channels_last);
  const Tensor pixels = torch::stable::contiguous(input, MemoryFormat::ChannelsLast);
  execute(op, p, pixels, weight, tensors, output, channels_last);
  return output;
}

}  // namespace

NNCX_SCHEMAS(library) {
  library.def("int8_conv2d_prepack(Tensor weight, int groups=1) -> Tensor");
  library.def(
      "int8_conv2d(Tensor input, Tensor weight, int in_channels, int out_channels, "
      "int[2] kernel_size, int[2] stride=1, int[2] padding=0, int[2] dilation=1, int groups=1, "
      "Tensor? input_zero_point=None, Tensor? scale=None, Tensor? bias=None, "
      "Tensor? residual=None, Tensor? residual_scale=None, Tensor? residual_zero_point=None, "
      "str activation=\"none\", Tensor? out_scale=None, Tensor? out_zero_point=None, "
      "ScalarType? out_dtype=None, bool channels_last=True) -> Tensor");
}

NNCX_KERNELS(library) {
  library.impl("int8_conv2d_prepack", TORCH_BOX(&int8_conv2d_prepack));
  library.impl("int8_conv2d", TORCH_BOX(&int8_conv2d));
}

}  // namespace nncx
