// A linear layer is int8_conv2d with a 1 x 1 kernel on M images of one pixel.
#include "int8.h"

namespace nncx {
namespace {

Tensor int8_linear_prepack(const Tensor& weight) {
  constexpr const char* op = "int8_linear_prepack";
  check_int8(op, "weight", weight);
  NNCX_CHECK(weight.dim() == 2, op, ": weight must be [out_features, in_features], got shape ",
             shape_text(weight));
  const Conv2dWeightShape s = read_weight_shape(op, weight.size(1), weight.size(0));
  check_terms(op, s);
  return int8_prepack(op, weight, s);
}

Tensor int8_linear(const Tensor& input, const Tensor& weight, int64_t in_features,
                   int64_t out_features, std::optional<Tensor> input_zero_point,
                   std::optional<Tensor> scale, std::optional<Tensor> bias,
                   std::optional<Tensor> input_scale, std::optional<Tensor> residual,
                   std::optional<Tensor> residual_scale, std::optional<Tensor> residual_zero_point,
                   std::string activation, std::optional<Tensor> out_scale,
                   std::optional<Tensor> out_zero_point, std::optional<ScalarType> out_dtype) {
  constexpr const char* op = "int8_linear";
  const Int8Arguments arguments = {
      input_zero_point,    scale,      bias,      input_scale,    residual, residual_scale,
      residual_zero_point, activation, out_scale, out_zero_point, out_dtype};
  Int8Conv2dParams p{};
  p.shape = read_weight_shape(op, in_features, out_features);
  check_terms(op, p.shape);
  check_int8(op, "input", input);
  NNCX_CHECK(input.dim() == 2 && input.size(1) == in_features, op, ": input must be [M, ",
             in_features, "], got shape ", shape_text(input));
  static_cast<Conv2dGeometry&>(p) = row_geometry(input.size(0));
  const Tensor output = new_tensor(input, {p.batch, out_features}, arguments.output_type(op));
  const Int8Tensors tensors(op, input, arguments, out_features, output, false);
  execute(op, p, dense(input), weight, tensors, output, true);
  return output;
}

}  // namespace

NNCX_SCHEMAS(library) {
  library.def("int8_linear_prepack(Tensor weight) -> Tensor");
  library.def(
      "int8_linear(Tensor input, Tensor weight, int in_features, int out_features, "
      "Tensor? input_zero_point=None, Tensor? scale=None, Tensor? bias=None, "
      "Tensor? input_scale=None, Tensor? residual=None, Tensor? residual_scale=None, "
      "Tensor? residual_zero_point=None, str activation=\"none\", Tensor? out_scale=None, "
      "Tensor? out_zero_point=None, ScalarType? out_dtype=None) -> Tensor");
}

NNCX_KERNELS(library) {
  library.impl("int8_linear_prepack", TORCH_BOX(&int8_linear_prepack));
  library.impl("int8_linear", TORCH_BOX(&int8_linear));
}

}  // namespace nncx
