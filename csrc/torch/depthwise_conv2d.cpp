#include "depthwise_conv2d.h"

#include "activation.h"
#include "float_conv2d.h"

namespace nncx {
namespace {

constexpr const char* kOp = "depthwise_conv2d";

}  // namespace

#ifdef NNCX_DEVICE_CUDA

void run_depthwise_conv2d(const DepthwiseConv2dParams& p, const Tensor& input) {
  const Backend backend(input);
  backend.check(kOp, cuda::depthwise_conv2d(p, backend.stream()));
}

#else

namespace {

struct Parts {
  int64_t lines, blocks;
};

// Both layouts are split along the outer dimension first, the other where that has too few parts.
Parts split(const DepthwiseConv2dParams& p, int64_t lines, int64_t blocks) {
  constexpr double kMinProducts = 1 << 19;  // per thread: about 10 us
  constexpr int64_t kLines = 8;             // per part at least: parts read shared lines twice
  const double products = static_cast<double>(lines) *
                          static_cast<double>(p.out_width * depthwise_outputs(p)) *
                          static_cast<double>(p.kernel_h * p.kernel_w);
  const int64_t threads = threads_for(products / kMinProducts);
  const auto rest = [&](int64_t parts) { return (threads + parts - 1) / parts; };
  const int64_t most_lines = std::max<int64_t>(1, lines / kLines);
  if (p.channels_last) {
    const int64_t parts = std::min(threads, most_lines);
    return {parts, std::min(rest(parts), blocks)};
  }
  const int64_t parts = std::min(threads, blocks);
  return {std::min(rest(parts), most_lines), parts};
}

}  // namespace

void run_depthwise_conv2d(const DepthwiseConv2dParams& p, const Tensor& input) {
  const Isa isa = Backend(input).isa;
  const int64_t lines = p.batch * p.out_height;
  const int64_t blocks = (depthwise_outputs(p) + kDepthwiseBlock - 1) / kDepthwiseBlock;
  const Parts parts = split(p, lines, blocks);
  const int64_t scratch_bytes = NNCX_ON_PATH(isa, depthwise_conv2d_scratch_bytes(p));
  run_tiles(input, {0, lines, 0, blocks}, parts.lines, parts.blocks, scratch_bytes,
            [&](Conv2dTile tile, uint8_t* scratch) {
              tile.pixel_begin *= p.out_width;
              tile.pixel_end *= p.out_width;
              NNCX_ON_PATH(isa, depthwise_conv2d(p, tile, scratch));
            });
}

#endif

namespace {

Tensor depthwise_conv2d(const Tensor& input, const Tensor& weight, std::optional<Tensor> bias,
                        std::vector<int64_t> stride, std::vector<int64_t> padding,
                        std::vector<int64_t> dilation, std::string activation) {
  check_window(kOp, stride, padding, dilation);
  check_input_dtype(kOp, input);
  NNCX_CHECK(input.dim() == 4, kOp, ": input must be [N, C, H, W], got shape ", shape_text(input));
  DepthwiseConv2dParams p{};
  p.channels = input.size(1);
  p.multiplier = read_multiplier(kOp, "weight", input, weight);
  const std::vector<int64_t> kernel_size = {weight.size(2), weight.size(3)};
  const int64_t outputs = depthwise_outputs(p);
  read_weight_shape(kOp, p.channels, outputs, kernel_size, std::max<int64_t>(p.channels, 1));
  const ScalarType type = input.scalar_type();
  const EpilogueTensor filters(kOp, "weight", input, weight,
                               {outputs, 1, kernel_size[0], kernel_size[1]}, type);
  const EpilogueTensor biases(kOp, "bias", input, bias, {outputs}, type);
  p.activation = to_activation(kOp, activation);
  static_cast<Conv2dGeometry&>(p) = read_geometry(kOp, input.size(0), input.size(2), input.size(3),
                                                  kernel_size, stride, padding, dilation);
  p.channels_last = keeps_channels_last(input);
  const Tensor output =
      new_tensor(input, {p.batch, outputs, p.out_height, p.out_width}, type, p.channels_last);
  if (output.numel() == 0) return output;
  const Tensor image = p.channels_last ? input : dense(input);
  p.dtype = to_dtype(type, kOp, "input");
  p.input = image.const_data_ptr();
  p.weight = filters.data<void>();
  p.bias = biases.data<void>();
  p.output = output.mutable_data_ptr();
  run_depthwise_conv2d(p, input);
  return output;
}

}  // namespace

NNCX_SCHEMAS(library) {
  library.def(
      "depthwise_conv2d(Tensor input, Tensor weight, Tensor? bias=None, int[2] stride=1, "
      "int[2] padding=0, int[2] dilation=1, str activation=\"none\") -> Tensor");
}

NNCX_KERNELS(library) { library.impl("depthwise_conv2d", TORCH_BOX(&depthwise_conv2d)); }

}  // namespace nncx
