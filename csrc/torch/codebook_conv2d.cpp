#include "codebook.h"

namespace nncx {
namespace {

using torch::headeronly::MemoryFormat;

Tensor codebook_conv2d_prepack(const Tensor& codes, int64_t bits, int64_t in_channels,
                               int64_t out_channels, std::vector<int64_t> kernel_size,
                               int64_t groups) {
  constexpr const char* op = "codebook_conv2d_prepack";
  const int width = check_bits(op, bits);
  return codebook_prepack(
      op, codes, read_weight_shape(op, in_channels, out_channels, kernel_size, groups), width);
}

// Channels innermost: in one pass where torch has to copy.
Tensor as_pixels(const Tensor& input) {
  return torch::stable::contiguous(
      torch::stable::to(input, read_type(input), std::nullopt, std::nullopt, std::nullopt, false,
                        false, MemoryFormat::ChannelsLast),
      MemoryFormat::ChannelsLast);
}

Tensor codebook_conv2d(const Tensor& input, const Tensor& weight, const Tensor& codebook,
                       int64_t bits, int64_t in_channels, int64_t out_channels,
                       std::vector<int64_t> kernel_size, std::vector<int64_t> stride,
                       std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups,
                       std::optional<Tensor> bias, std::string activation,
                       std::optional<ScalarType> out_dtype) {
  constexpr const char* op = "codebook_conv2d";
  CodebookConv2dParams p{};
  p.bits = check_bits(op, bits);
  p.shape = read_weight_shape(op, in_channels, out_channels, kernel_size, groups);
  check_window(op, stride, padding, dilation);
  check_input_dtype(op, input);
  NNCX_CHECK(input.dim() == 4 && input.size(1) == in_channels, op, ": input must be [N, ",
             in_channels, ", H, W], got shape ", shape_text(input));
  static_cast<Conv2dGeometry&>(p) = read_geometry(op, input.size(0), input.size(2), input.size(3),
                                                  kernel_size, stride, padding, dilation);
  p.codebook_stride = codebook_stride(codebook, p.bits);
  p.epilogue.activation = to_activation(op, activation);
  const CodebookTensors tensors(op, input, codebook, bias, bits, out_channels);
  const bool channels_last = keeps_channels_last(input);
  const Tensor output =
      new_tensor(input, {p.batch, out_channels, p.out_height, p.out_width},
                 check_out_dtype(op, out_dtype.value_or(input.scalar_type())), channels_last);
  const int64_t image = p.out_height * p.out_width;
  p.epilogue.stride_n = out_channels * image;
  p.epilogue.stride_pixel = channels_last ? out_channels : 1;
  p.epilogue.stride_o = channels_last ? 1 : image;
  execute(op, p, as_pixels(input), weight, tensors, output);
  return output;
}

}  // namespace

NNCX_SCHEMAS(library) {
  library.def(
      "codebook_conv2d_prepack(Tensor codes, int bits, int in_channels, int out_channels, "
      "int[2] kernel_size, int groups=1) -> Tensor");
  library.def(
      "codebook_conv2d(Tensor input, Tensor weight, Tensor codebook, int bits, int in_channels, "
      "int out_channels, int[2] kernel_size, int[2] stride=1, int[2] padding=0, "
      "int[2] dilation=1, int groups=1, Tensor? bias=None, str activation=\"none\", "
      "ScalarType? out_dtype=None) -> Tensor");
}

NNCX_KERNELS(library) {
  library.impl("codebook_conv2d_prepack", TORCH_BOX(&codebook_conv2d_prepack));
  library.impl("codebook_conv2d", TORCH_BOX(&codebook_conv2d));
}

}  // namespace nncx
