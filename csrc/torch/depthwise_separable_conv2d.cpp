// depthwise_separable_conv2d: depthwise_conv2d, and grouped_conv2d of one group with a 1 x 1 kernel.
//
// On a CPU the image between them is not stored whole. A thread runs both convolutions on some lines
// after the other, so that what the first writes is still in its L2 cache when the second reads it.
// A block of lines is to both an image of its own: to the first one with less padding above, to the
// second one that begins at a line of the output. So their kernels and their bits are used as they
// are, whatever the format and layout; in half formats the image between is rounded too.
#include <numeric>

#include "activation.h"
#include "float_conv2d.h"

namespace nncx {
namespace {

constexpr const char* kOp = "depthwise_separable_conv2d";

struct Halves {
  DepthwiseConv2dParams depthwise;
  GroupedConv2dParams pointwise;
  Tensor pointwise_weight;
  std::optional<Tensor> pointwise_bias;
};

// One after the other, with the whole image between them in memory.
void run_apart(Halves h, const Tensor& input) {
  const Tensor between = new_tensor(input,
                                    {h.depthwise.batch, h.pointwise.shape.channels,
                                     h.depthwise.out_height, h.depthwise.out_width},
                                    input.scalar_type(), h.depthwise.channels_last);
  h.depthwise.output = between.mutable_data_ptr();
  run_depthwise_conv2d(h.depthwise, input);
  h.pointwise.input = between.const_data_ptr();
  run_grouped_conv2d(h.pointwise, input, h.pointwise_weight, h.pointwise_bias);
}

#ifdef NNCX_DEVICE_CUDA

void run(const Halves& h, const Tensor& input) { run_apart(h, input); }

#else

constexpr int64_t element_bytes(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

// Lines of a block: what is between the convolutions shall stay in an L2 cache of 1 MB, beside the
// pointwise weights and its scratch; 0 if not even a line does. 128 and 512 KB are within 2 % with
// channels innermost; planes cost something of their own for each block, so those are larger.
int64_t block_lines(const DepthwiseConv2dParams& d) {
  constexpr int64_t kPixels = 16;  // whole vectors of them, if the lines suffice
  const double most_bytes = d.channels_last ? 1 << 18 : 1 << 19;
  const double line_bytes = static_cast<double>(d.out_width) *  // may be beyond int64
                            static_cast<double>(depthwise_outputs(d)) *
                            static_cast<double>(element_bytes(d.dtype));
  const auto fit = static_cast<int64_t>(
      std::min(most_bytes / std::max(line_bytes, 1.0), static_cast<double>(d.out_height)));
  const int64_t unit = kPixels / std::gcd(kPixels, d.out_width);
  return fit < unit || fit == d.out_height ? fit : fit / unit * unit;
}

// What a thread runs: both convolutions on a block of lines of one image.
class Block {
 public:
  Block(const Halves& halves, int64_t most, Isa path)
      : depthwise(halves.depthwise), pointwise(halves.pointwise), lines(most), isa(path) {
    depthwise.batch = pointwise.batch = 1;
    depthwise.out_height = pointwise.height = lines;
    between_bytes = lines * depthwise.out_width * depthwise_outputs(depthwise) * bytes();
    between_bytes = (between_bytes + 63) / 64 * 64;
    scratch_bytes = std::max(NNCX_ON_PATH(isa, depthwise_conv2d_scratch_bytes(depthwise)),
                             NNCX_ON_PATH(isa, grouped_conv2d_scratch_bytes(pointwise)));
  }

  int64_t memory_bytes() const { return between_bytes + scratch_bytes; }

  // Lines [begin, end) of the output, counted over the batch.
  void run_all(int64_t begin, int64_t end, uint8_t* memory) const {
    while (begin < end) {
      const int64_t n = begin / pointwise.out_height, y = begin % pointwise.out_height;
      const int64_t count = std::min({lines, end - begin, pointwise.out_height - y});
      run(n, y, count, memory);
      begin += count;
    }
  }

 private:
  DepthwiseConv2dParams depthwise;  // whose output has `lines` lines
  GroupedConv2dParams pointwise;    // whose input has them
  int64_t lines;
  Isa isa;
  int64_t between_bytes, scratch_bytes;

  int64_t bytes() const { return element_bytes(depthwise.dtype); }

  void run(int64_t n, int64_t y, int64_t count, uint8_t* between) const {
    uint8_t* scratch = between + between_bytes;
    DepthwiseConv2dParams d = depthwise;
    const int64_t image_in = d.channels * d.height * d.width * bytes();
    const int64_t blocks = (depthwise_outputs(d) + kDepthwiseBlock - 1) / kDepthwiseBlock;
    d.input = static_cast<const uint8_t*>(d.input) + n * image_in;
    d.padding_h -= y * d.stride_h;
    d.output = between;
    NNCX_ON_PATH(isa, depthwise_conv2d(d, {0, count * d.out_width, 0, blocks}, scratch));
    GroupedConv2dParams p = pointwise;
    const int64_t image_out = p.shape.out_channels * p.out_height * p.out_width * bytes();
    const Conv2dTile tile = {y * p.out_width, (y + count) * p.out_width, 0,
                             grouped_blocks(p.shape)};
    p.input = between;
    p.padding_h = y;
    p.output = static_cast<uint8_t*>(p.output) + n * image_out;
    NNCX_ON_PATH(isa, grouped_conv2d(p, tile, scratch));
  }
};

void run(Halves h, const Tensor& input) {
  constexpr double kMinProducts = 1 << 19;  // per thread: about 10 us
  constexpr int64_t kPixels = 96;           // per thread at least
  const DepthwiseConv2dParams& d = h.depthwise;
  const int64_t lines = d.batch * d.out_height;
  const double products =
      static_cast<double>(lines * d.out_width) * static_cast<double>(depthwise_outputs(d)) *
      static_cast<double>(d.kernel_h * d.kernel_w + h.pointwise.shape.out_channels);
  const int64_t threads = threads_for(products / kMinProducts), most = block_lines(d);
  if (most == 0 || threads > std::max<int64_t>(lines * d.out_width / kPixels, 1)) {
    return run_apart(h, input);
  }
  const Tensor weight = as_floats(h.pointwise_weight);
  std::optional<Tensor> bias;
  if (h.pointwise_bias) bias = as_floats(*h.pointwise_bias);
  h.pointwise.weight = static_cast<const float*>(weight.const_data_ptr());
  h.pointwise.bias = bias ? static_cast<const float*>(bias->const_data_ptr()) : nullptr;
  const Block block(h, most, Backend(input).isa);
  run_tiles(input, {0, lines, 0, 1}, std::min(threads, lines), 1, block.memory_bytes(),
            [&](const Conv2dTile& tile, uint8_t* memory) {
              block.run_all(tile.pixel_begin, tile.pixel_end, memory);
            });
}

#endif

Tensor depthwise_separable_conv2d(const Tensor& input, const Tensor& depthwise_weight,
                                  const Tensor& pointwise_weight,
                                  std::optional<Tensor> depthwise_bias,
                                  std::optional<Tensor> pointwise_bias, std::vector<int64_t> stride,
                                  std::vector<int64_t> padding, std::vector<int64_t> dilation,
                                  std::string depthwise_activation, std::string activation) {
  check_window(kOp, stride, padding, dilation);
  check_input_dtype(kOp, input);
  NNCX_CHECK(input.dim() == 4, kOp, ": input must be [N, C, H, W], got shape ", shape_text(input));
  Halves h{{}, {}, pointwise_weight, pointwise_bias};
  DepthwiseConv2dParams& d = h.depthwise;
  GroupedConv2dParams& p = h.pointwise;
  d.channels = input.size(1);
  d.multiplier = read_multiplier(kOp, "depthwise_weight", input, depthwise_weight);
  const int64_t between = depthwise_outputs(d);
  const std::vector<int64_t> kernel_size = {depthwise_weight.size(2), depthwise_weight.size(3)};
  read_weight_shape(kOp, d.channels, between, kernel_size, std::max<int64_t>(d.channels, 1));
  NNCX_CHECK(pointwise_weight.dim() == 4, kOp,
             ": pointwise_weight must be [O, C * multiplier, 1, 1], got shape ",
             shape_text(pointwise_weight));
  const int64_t outputs = pointwise_weight.size(0);
  p.shape = read_weight_shape(kOp, between, outputs, {1, 1}, 1);
  const ScalarType type = input.scalar_type();
  const EpilogueTensor filters(kOp, "depthwise_weight", input, depthwise_weight,
                               {between, 1, kernel_size[0], kernel_size[1]}, type);
  check_operand(kOp, "pointwise_weight", input, pointwise_weight, {outputs, between, 1, 1}, type);
  const EpilogueTensor biases(kOp, "depthwise_bias", input, depthwise_bias, {between}, type);
  check_operand(kOp, "pointwise_bias", input, pointwise_bias, {outputs}, type);
  d.activation = to_activation(kOp, depthwise_activation);
  p.activation = to_activation(kOp, activation);
  static_cast<Conv2dGeometry&>(d) = read_geometry(kOp, input.size(0), input.size(2), input.size(3),
                                                  kernel_size, stride, padding, dilation);
  static_cast<Conv2dGeometry&>(p) = {d.batch, d.out_height, d.out_width, 1, 1, 1, 1, 0, 0, 1,
                                     1,       d.out_height, d.out_width};
  d.channels_last = p.channels_last = keeps_channels_last(input);
  const Tensor output =
      new_tensor(input, {d.batch, outputs, d.out_height, d.out_width}, type, d.channels_last);
  if (output.numel() == 0) return output;
  const Tensor image = d.channels_last ? input : dense(input);
  d.dtype = p.dtype = to_dtype(type, kOp, "input");
  d.input = image.const_data_ptr();
  d.weight = filters.data<void>();
  d.bias = biases.data<void>();
  p.shuffle = 1;
  p.output = output.mutable_data_ptr();
  run(h, input);
  return output;
}

}  // namespace

NNCX_SCHEMAS(library) {
  library.def(
      "depthwise_separable_conv2d(Tensor input, Tensor depthwise_weight, Tensor pointwise_weight, "
      "Tensor? depthwise_bias=None, Tensor? pointwise_bias=None, int[2] stride=1, int[2] "
      "padding=0, "
      "int[2] dilation=1, str depthwise_activation=\"none\", str activation=\"none\") -> Tensor");
}

NNCX_KERNELS(library) {
  library.impl("depthwise_separable_conv2d", TORCH_BOX(&depthwise_separable_conv2d));
}

}  // namespace nncx
