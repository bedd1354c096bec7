// A linear layer is codebook_conv2d with a 1 x 1 kernel on M images of one pixel.
#include "codebook.h"

namespace nncx {
namespace {

Tensor codebook_linear_prepack(const Tensor& codes, int64_t bits, int64_t in_features,
                               int64_t out_features) {
  constexpr const char* op = "codebook_linear_prepack";
  const int width = check_bits(op, bits);
  return codebook_prepack(op, codes, read_weight_shape(op, in_features, out_features), width);
}

Tensor codebook_linear(const Tensor& input, const Tensor& weight, const Tensor& codebook,
                       int64_t bits, int64_t in_features, int64_t out_features,
                       std::optional<Tensor> bias, std::string activation,
                       std::optional<ScalarType> out_dtype) {
  constexpr const char* op = "codebook_linear";
  CodebookConv2dParams p{};
  p.bits = check_bits(op, bits);
  p.shape = read_weight_shape(op, in_features, out_features);
  check_input_dtype(op, input);
  NNCX_CHECK(input.dim() == 2 && input.size(1) == in_features, op, ": input must be [M, ",
             in_features, "], got shape ", shape_text(input));
  static_cast<Conv2dGeometry&>(p) = row_geometry(input.size(0));
  p.codebook_stride = codebook_stride(codebook, p.bits);
  p.epilogue.activation = to_activation(op, activation);
  const CodebookTensors tensors(op, input, codebook, bias, bits, out_features);
  const Tensor output = new_tensor(input, {p.batch, out_features},
                                   check_out_dtype(op, out_dtype.value_or(input.scalar_type())));
  p.epilogue.stride_n = out_features;
  p.epilogue.stride_o = 1;
  const Tensor rows = torch::stable::contiguous(torch::stable::to(input, read_type(input)));
  execute(op, p, rows, weight, tensors, output);
  return output;
}

}  // namespace

NNCX_SCHEMAS(library) {
  library.def(
      "codebook_linear_prepack(Tensor codes, int bits, int in_features, int out_features) "
      "-> Tensor");
  library.def(
      "codebook_linear(Tensor input, Tensor weight, Tensor codebook, int bits, int in_features, "
      "int out_features, Tensor? bias=None, str activation=\"none\", "
      "ScalarType? out_dtype=None) -> Tensor");
}

NNCX_KERNELS(library) {
  library.impl("codebook_linear_prepack", TORCH_BOX(&codebook_linear_prepack));
  library.impl("codebook_linear", TORCH_BOX(&codebook_linear));
}

}  // namespace nncx
