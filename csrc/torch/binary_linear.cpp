// A linear layer on signs is binary_conv2d with a 1 x 1 kernel on M images of one pixel.
#include "binary.h"

namespace nncx {
namespace {

Tensor binary_linear_prepack(const Tensor& weight, int64_t in_features) {
  constexpr const char* op = "binary_linear_prepack";
  NNCX_CHECK(in_features >= 0, op, ": in_features must be at least 0, got ", in_features);
  check_weight_shape(op, 1, 0, 1, in_features);
  NNCX_CHECK(weight.scalar_type() == ScalarType::Byte && weight.dim() == 2 &&
                 weight.size(1) == packed_bytes(in_features),
             op, ": weight must be uint8 [out_features, ", packed_bytes(in_features),
             "] from pack_signs, got ", torch::headeronly::toString(weight.scalar_type()),
             " of shape ", shape_text(weight));
  check_weight_shape(op, 1, weight.size(0), 1, in_features);
  return binary_prepack(
      op, weight,
      {.groups = 1, .out_channels = weight.size(0), .taps = 1, .channels = in_features});
}

// M images of one pixel, checked; its pointers are still null.
BinaryConv2dParams read_rows(const char* op, const Tensor& input, int64_t in_features,
                             int64_t out_features) {
  BinaryConv2dParams p{};
  p.shape = read_weight_shape(op, in_features, out_features);
  NNCX_CHECK(input.scalar_type() == ScalarType::Byte && input.dim() == 2 &&
                 input.size(1) == packed_bytes(in_features),
             op, ": input must be uint8 [M, ", packed_bytes(in_features), "] from pack_signs, got ",
             torch::headeronly::toString(input.scalar_type()), " of shape ", shape_text(input));
  static_cast<Conv2dGeometry&>(p) = row_geometry(input.size(0));
  p.epilogue.channels_last = true;
  return p;
}

Tensor binary_linear(const Tensor& input, const Tensor& weight, int64_t in_features,
                     int64_t out_features, std::optional<Tensor> scale, std::optional<Tensor> bias,
                     std::optional<Tensor> input_scale, std::optional<ScalarType> out_dtype) {
  constexpr const char* op = "binary_linear";
  const BinaryConv2dParams p = read_rows(op, input, in_features, out_features);
  const Tensor output = new_tensor(input, {p.batch, out_features},
                                   check_out_dtype(op, out_dtype.value_or(ScalarType::Float)));
  execute_numbers(op, p, input, weight, scale, bias, input_scale, {p.batch}, output);
  return output;
}

Tensor binary_linear_sign(const Tensor& input, const Tensor& weight, const Tensor& threshold,
                          const Tensor& flip, int64_t in_features, int64_t out_features) {
  constexpr const char* op = "binary_linear_sign";
  const BinaryConv2dParams p = read_rows(op, input, in_features, out_features);
  const Tensor output = new_tensor(input, {p.batch, packed_bytes(out_features)}, ScalarType::Byte);
  execute_signs(op, p, input, weight, threshold, flip, 1, output);
  return output;
}

}  // namespace

NNCX_SCHEMAS(library) {
  library.def("binary_linear_prepack(Tensor weight, int in_features) -> Tensor");
  library.def(
      "binary_linear(Tensor input, Tensor weight, int in_features, int out_features, "
      "Tensor? scale=None, Tensor? bias=None, Tensor? input_scale=None, "
      "ScalarType? out_dtype=None) -> Tensor");
  library.def(
      "binary_linear_sign(Tensor input, Tensor weight, Tensor threshold, Tensor flip, "
      "int in_features, int out_features) -> Tensor");
}

NNCX_KERNELS(library) {
  library.impl("binary_linear_prepack", TORCH_BOX(&binary_linear_prepack));
  library.impl("binary_linear", TORCH_BOX(&binary_linear));
  library.impl("binary_linear_sign", TORCH_BOX(&binary_linear_sign));
}

}  // namespace nncx
