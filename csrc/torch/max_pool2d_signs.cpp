#include "max_pool2d_signs.h"

#include "conv2d_ops.h"

namespace nncx {
namespace {

constexpr const char* kOp = "max_pool2d_signs";

int64_t out_size(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation,
                 bool ceil_mode) {
  const int64_t span = size + 2 * padding - dilation * (kernel - 1) - 1;
  const int64_t out = (span + (ceil_mode ? stride - 1 : 0)) / stride + 1;
  return ceil_mode && (out - 1) * stride >= size + padding ? out - 1 : out;
}

MaxPool2dSignsParams read_geometry(const Tensor& input, Pair kernel_size, Pair stride, Pair padding,
                                   Pair dilation, bool ceil_mode) {
  NNCX_CHECK(input.scalar_type() == ScalarType::Byte && input.dim() == 5, kOp,
             ": input must be uint8 [N, H, W, G, bytes] from pack_signs, got ",
             torch::headeronly::toString(input.scalar_type()), " of shape ", shape_text(input));
  NNCX_CHECK(input.size(4) % 8 == 0, kOp,
             ": input must have whole 64-bit words a group, as pack_signs makes them, got shape ",
             shape_text(input));
  check_pair(kOp, "kernel_size", kernel_size, 1);
  check_window(kOp, stride, padding, dilation);
  NNCX_CHECK(2 * padding[0] <= kernel_size[0] && 2 * padding[1] <= kernel_size[1], kOp,
             ": padding must be at most half of kernel_size, got padding ", padding[0], " x ",
             padding[1], ", kernel_size ", kernel_size[0], " x ", kernel_size[1]);
  MaxPool2dSignsParams p{};
  p.height = input.size(1), p.width = input.size(2);
  p.pixel_bytes = input.size(3) * input.size(4);
  p.kernel_h = kernel_size[0], p.kernel_w = kernel_size[1];
  p.stride_h = stride[0], p.stride_w = stride[1];
  p.padding_h = padding[0], p.padding_w = padding[1];
  p.dilation_h = dilation[0], p.dilation_w = dilation[1];
  NNCX_CHECK(p.height + 2 * p.padding_h > p.dilation_h * (p.kernel_h - 1) &&
                 p.width + 2 * p.padding_w > p.dilation_w * (p.kernel_w - 1),
             kOp, ": the padded input must be at least as large as the dilated kernel, got input ",
             p.height, " x ", p.width, ", kernel_size ", p.kernel_h, " x ", p.kernel_w,
             ", padding ", p.padding_h, " x ", p.padding_w);
  p.out_height = out_size(p.height, p.kernel_h, p.stride_h, p.padding_h, p.dilation_h, ceil_mode);
  p.out_width = out_size(p.width, p.kernel_w, p.stride_w, p.padding_w, p.dilation_w, ceil_mode);
  return p;
}

#ifdef NNCX_DEVICE_CUDA

void run(const MaxPool2dSignsParams& p, int64_t lines, const Tensor& input) {
  const Backend backend(input);
  backend.check(kOp, cuda::max_pool2d_signs(p, lines, backend.stream()));
}

#else

void run(const MaxPool2dSignsParams& p, int64_t lines, const Tensor& input) {
  constexpr int64_t kWords = 1 << 14;  // OR-ed per task at least: about 10 us
  const Isa isa = Backend(input).isa;
  const double words = static_cast<double>(p.out_width * p.pixel_bytes / 8) *
                       static_cast<double>(p.kernel_h * p.kernel_w);  // too many for an int64
  const auto grain = static_cast<int64_t>(std::max(1.0, kWords / words));
  parallel_for(0, lines, grain, [&](int64_t begin, int64_t end) {
    NNCX_ON_PATH(isa, max_pool2d_signs(p, begin, end));
  });
}

#endif

Tensor max_pool2d_signs(const Tensor& input, std::vector<int64_t> kernel_size,
                        std::vector<int64_t> stride, std::vector<int64_t> padding,
                        std::vector<int64_t> dilation, bool ceil_mode) {
  MaxPool2dSignsParams p = read_geometry(input, kernel_size, stride, padding, dilation, ceil_mode);
  const Tensor output =
      new_tensor(input, {input.size(0), p.out_height, p.out_width, input.size(3), input.size(4)},
                 ScalarType::Byte);
  if (output.numel() == 0) return output;
  const Tensor packed = dense(input);
  p.input = static_cast<const uint8_t*>(packed.const_data_ptr());
  p.output = static_cast<uint8_t*>(output.mutable_data_ptr());
  run(p, input.size(0) * p.out_height, input);
  return output;
}

}  // namespace

NNCX_SCHEMAS(library) {
  library.def(
      "max_pool2d_signs(Tensor input, int[2] kernel_size, int[2] stride, int[2] padding=0, "
      "int[2] dilation=1, bool ceil_mode=False) -> Tensor");
}

NNCX_KERNELS(library) { library.impl("max_pool2d_signs", TORCH_BOX(&max_pool2d_signs)); }

}  // namespace nncx
