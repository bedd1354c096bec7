// A linear layer on signs is binary_conv2d with a 1 x 1 kernel on M images of one pixel.
#include <limits>

#include "binary.h"

namespace nncx {
namespace {

constexpr const char* kOp = "binary_linear";

Tensor binary_linear_prepack(const Tensor& weight, int64_t in_features) {
  constexpr const char* op = "binary_linear_prepack";
  check(in_features >= 0, op, ": in_features must be at least 0, got ", in_features);
  check(weight.scalar_type() == ScalarType::Byte && weight.dim() == 2 &&
            weight.size(1) == packed_bytes(in_features),
        op, ": weight must be uint8 [out_features, ", packed_bytes(in_features),
        "] from pack_signs, got ", torch::headeronly::toString(weight.scalar_type()), " of shape ",
        shape_text(weight));
  return prepack(weight,
                 {.groups = 1, .out_channels = weight.size(0), .taps = 1, .channels = in_features});
}

Tensor binary_linear(const Tensor& input, const Tensor& weight, int64_t in_features,
                     int64_t out_features, std::optional<Tensor> scale, std::optional<Tensor> bias,
                     std::optional<Tensor> input_scale, std::optional<ScalarType> out_dtype) {
  check(in_features >= 0 && out_features >= 0 &&
            in_features <= std::numeric_limits<int32_t>::max() / 2,
        kOp, ": in_features must be 0 to 2^30 and out_features at least 0, got ", in_features,
        " and ", out_features);
  check(input.scalar_type() == ScalarType::Byte && input.dim() == 2 &&
            input.size(1) == packed_bytes(in_features),
        kOp, ": input must be uint8 [M, ", packed_bytes(in_features), "] from pack_signs, got ",
        torch::headeronly::toString(input.scalar_type()), " of shape ", shape_text(input));

  BinaryConv2dParams p{};
  p.shape = {.groups = 1, .out_channels = out_features, .taps = 1, .channels = in_features};
  p.batch = input.size(0);
  p.height = p.width = p.out_height = p.out_width = 1;
  p.kernel_h = p.kernel_w = p.stride_h = p.stride_w = p.dilation_h = p.dilation_w = 1;

  const Tensor output =
      torch::stable::new_empty(input, {p.batch, out_features}, out_dtype_or_float(kOp, out_dtype));
  const EpilogueTensors tensors(kOp, input, scale, bias, input_scale, out_features, p.batch);
  p.weight = open_prepacked(kOp, weight, p.shape);
  if (output.numel() == 0) return output;
  const Tensor dense = torch::stable::contiguous(input);
  p.input = static_cast<const uint8_t*>(dense.const_data_ptr());
  p.epilogue = tensors.writing_to(output);
  run(p, input);
  return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(nncx, library) {
  library.def("binary_linear_prepack(Tensor weight, int in_features) -> Tensor");
  library.def(
      "binary_linear(Tensor input, Tensor weight, int in_features, int out_features, "
      "Tensor? scale=None, Tensor? bias=None, Tensor? input_scale=None, "
      "ScalarType? out_dtype=None) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(nncx, NNCX_DEVICE, library) {
  library.impl("binary_linear_prepack", TORCH_BOX(&binary_linear_prepack));
  library.impl("binary_linear", TORCH_BOX(&binary_linear));
}

}  // namespace nncx
