#include "grouped_conv2d.h"

#include "activation.h"
#include "float_conv2d.h"

namespace nncx {
namespace {

constexpr const char* kOp = "grouped_conv2d";

// With `out_channels` of all groups.
Conv2dWeightShape read_filters(const Tensor& input, const Tensor& weight, int64_t groups) {
  NNCX_CHECK(weight.dim() == 4, kOp, ": weight must be [O, C / groups, kh, kw], got shape ",
             shape_text(weight));
  const Conv2dWeightShape s = read_weight_shape(kOp, input.size(1), weight.size(0),
                                                {weight.size(2), weight.size(3)}, groups);
  NNCX_CHECK(weight.size(1) == s.channels, kOp,
             ": weight must be [O, C / groups, kh, kw] with C / groups = ", s.channels,
             ", got shape ", shape_text(weight));
  return s;
}

void check_shuffle(int64_t shuffle, int64_t channels) {
  NNCX_CHECK(shuffle >= 1 && channels % shuffle == 0, kOp,
             ": shuffle must divide the channels, got shuffle=", shuffle, ", channels=", channels);
}

#ifdef NNCX_DEVICE_CUDA

// As [output][tap][channel], which contiguous weights of one tap or one channel are already.
Tensor as_filters(const Tensor& weight, const Conv2dWeightShape& s) {
  if (weight.is_contiguous() && (s.taps == 1 || s.channels == 1)) return weight;
  return torch::stable::contiguous(weight, torch::headeronly::MemoryFormat::ChannelsLast);
}

}  // namespace

void run_grouped_conv2d(GroupedConv2dParams p, const Tensor& input, const Tensor& weight,
                        const std::optional<Tensor>& bias) {
  const Backend backend(input);
  const Tensor filters = as_filters(weight, p.shape);
  std::optional<Tensor> biases;
  if (bias) biases = dense(*bias);
  backend.check(
      kOp, cuda::grouped_conv2d(p, filters.const_data_ptr(),
                                biases ? biases->const_data_ptr() : nullptr, backend.stream()));
}

#else

}  // namespace

// Splits the pixels over torch's threads; where there are too few, the output channels too.
void run_grouped_conv2d(GroupedConv2dParams p, const Tensor& input, const Tensor& weight,
                        const std::optional<Tensor>& bias) {
  constexpr double kMinProducts = 1 << 19;  // per thread: about 10 us
  constexpr int64_t kPixels = 96;           // per part at least, if the pixels suffice
  const Isa isa = Backend(input).isa;
  const Tensor filters = as_floats(weight);
  std::optional<Tensor> biases;
  if (bias) biases = as_floats(*bias);
  p.weight = static_cast<const float*>(filters.const_data_ptr());
  p.bias = biases ? static_cast<const float*>(biases->const_data_ptr()) : nullptr;
  const Conv2dWeightShape& s = p.shape;
  const int64_t pixels = p.batch * p.out_height * p.out_width;
  const int64_t blocks = s.groups * grouped_blocks(s);
  const double products = static_cast<double>(pixels) *
                          static_cast<double>(s.groups * s.out_channels) *
                          static_cast<double>(s.channels * s.taps);
  const int64_t threads = threads_for(products / kMinProducts);
  const int64_t pixel_parts = std::clamp<int64_t>(pixels / kPixels, 1, threads);
  const int64_t block_parts = std::min((threads + pixel_parts - 1) / pixel_parts, blocks);
  const int64_t scratch_bytes = NNCX_ON_PATH(isa, grouped_conv2d_scratch_bytes(p));
  run_tiles(input, {0, pixels, 0, blocks}, pixel_parts, block_parts, scratch_bytes,
            [&](const Conv2dTile& tile, uint8_t* scratch) {
              NNCX_ON_PATH(isa, grouped_conv2d(p, tile, scratch));
            });
}

#endif

namespace {

Tensor grouped_conv2d(const Tensor& input, const Tensor& weight, std::optional<Tensor> bias,
                      std::vector<int64_t> stride, std::vector<int64_t> padding,
                      std::vector<int64_t> dilation, int64_t groups, int64_t shuffle,
                      std::string activation) {
  check_window(kOp, stride, padding, dilation);
  check_input_dtype(kOp, input);
  NNCX_CHECK(input.dim() == 4, kOp, ": input must be [N, C, H, W], got shape ", shape_text(input));
  GroupedConv2dParams p{};
  p.shape = read_filters(input, weight, groups);
  const int64_t outputs = weight.size(0);
  check_shuffle(shuffle, outputs);
  const std::vector<int64_t> kernel_size = {weight.size(2), weight.size(3)};
  const ScalarType type = input.scalar_type();
  check_operand(kOp, "weight", input, weight,
                {outputs, weight.size(1), kernel_size[0], kernel_size[1]}, type);
  check_operand(kOp, "bias", input, bias, {outputs}, type);
  p.activation = to_activation(kOp, activation);
  static_cast<Conv2dGeometry&>(p) = read_geometry(kOp, input.size(0), input.size(2), input.size(3),
                                                  kernel_size, stride, padding, dilation);
  p.channels_last = keeps_channels_last(input);
  const Tensor output =
      new_tensor(input, {p.batch, outputs, p.out_height, p.out_width}, type, p.channels_last);
  if (output.numel() == 0) return output;
  const Tensor image = p.channels_last ? input : dense(input);
  p.shuffle = shuffle;
  p.dtype = to_dtype(type, kOp, "input");
  p.input = image.const_data_ptr();
  p.output = output.mutable_data_ptr();
  run_grouped_conv2d(p, input, weight, bias);
  return output;
}

}  // namespace

NNCX_SCHEMAS(library) {
  library.def(
      "grouped_conv2d(Tensor input, Tensor weight, Tensor? bias=None, int[2] stride=1, "
      "int[2] padding=0, int[2] dilation=1, int groups=1, int shuffle=1, "
      "str activation=\"none\") -> Tensor");
}

NNCX_KERNELS(library) { library.impl("grouped_conv2d", TORCH_BOX(&grouped_conv2d)); }

}  // namespace nncx
