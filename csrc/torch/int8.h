// What int8_conv2d and int8_linear share. A linear layer is a 1 x 1 convolution of one-pixel
// images, so both run on int8_conv2d's backends.
#pragma once

#include "activation.h"
#include "conv2d_ops.h"
#include "int8_conv2d.h"

namespace nncx {

inline void check_terms(const char* op, const Conv2dWeightShape& s) {
  NNCX_CHECK(s.taps * s.channels <= kMostInt8Terms, op, ": a dot product must have at most ",
             kMostInt8Terms, " terms, which fit int32, got ", s.taps, " x ", s.channels);
}

inline void check_int8(const char* op, const char* name, const Tensor& tensor) {
  NNCX_CHECK(tensor.scalar_type() == ScalarType::Char, op, ": ", name, " must be int8, got ",
             torch::headeronly::toString(tensor.scalar_type()));
}

// The epilogue's arguments, in the schema's order.
struct Int8Arguments {
  std::optional<Tensor> input_zero_point, scale, bias, input_scale;
  std::optional<Tensor> residual, residual_scale, residual_zero_point;
  std::string activation;
  std::optional<Tensor> out_scale, out_zero_point;
  std::optional<ScalarType> out_dtype;

  // int8 where there is a scale for it, else a float format.
  ScalarType output_type(const char* op) const {
    NNCX_CHECK(out_scale.has_value() == out_zero_point.has_value(), op,
               ": out_scale and out_zero_point must be given together, got one of them");
    if (!out_scale) return check_out_dtype(op, out_dtype.value_or(ScalarType::Float));
    NNCX_CHECK(out_dtype.value_or(ScalarType::Char) == ScalarType::Char, op,
               ": out_dtype must be int8 where out_scale is given, got ",
               torch::headeronly::toString(*out_dtype));
    return ScalarType::Char;
  }
};

// Those tensors, checked against each other, and dense while the kernel reads them.
class Int8Tensors {
 public:
  Int8Tensors(const char* op, const Tensor& input, const Int8Arguments& a, int64_t out_channels,
              const Tensor& output, bool channels_last)
      : scale_(op, "scale", input, a.scale, {out_channels}),
        bias_(op, "bias", input, a.bias, {out_channels}),
        input_scale_(op, "input_scale", input, a.input_scale, {input.size(0)}),
        zero_point_(op, "input_zero_point", input, a.input_zero_point,
                    zero_point_shape(input, a.input_zero_point), ScalarType::Char),
        residual_scale_(op, "residual_scale", input, a.residual_scale, {}),
        residual_zero_point_(op, "residual_zero_point", input, a.residual_zero_point, {},
                             ScalarType::Char),
        out_scale_(op, "out_scale", input, a.out_scale, {}),
        out_zero_point_(op, "out_zero_point", input, a.out_zero_point, {}, ScalarType::Char),
        activation_(to_activation(op, a.activation)),
        zero_point_per_image_(a.input_zero_point && a.input_zero_point->dim() == 1) {
    if (!a.residual) {
      NNCX_CHECK(!a.residual_scale && !a.residual_zero_point, op,
                 ": residual_scale and residual_zero_point must come with a residual, got none");
      return;
    }
    read_residual(op, input, a, output, channels_last);
  }

  void fill(Int8Conv2dParams& p) const {
    p.zero_point = zero_point_.data<int8_t>();
    p.zero_point_per_image = zero_point_per_image_;
    Int8Epilogue& e = p.epilogue;
    e.scale = scale_.data();
    e.bias = bias_.data();
    e.input_scale = input_scale_.data();
    e.activation = activation_;
    if (residual_) {
      e.residual = residual_->const_data_ptr();
      e.residual_is_int8 = residual_is_int8_;
      e.residual_dtype = residual_dtype_;
      e.residual_scale = residual_scale_.data();
      e.residual_zero_point = residual_zero_point_.data<int8_t>();
    }
    e.out_scale = out_scale_.data();
    e.out_zero_point = out_zero_point_.data<int8_t>();
  }

 private:
  EpilogueTensor scale_, bias_, input_scale_, zero_point_, residual_scale_, residual_zero_point_,
      out_scale_, out_zero_point_;
  Activation activation_;
  bool zero_point_per_image_;
  std::optional<Tensor> residual_;
  bool residual_is_int8_ = false;
  Dtype residual_dtype_ = Dtype::float32;

  // One for the tensor, or for rows one each.
  static std::vector<int64_t> zero_point_shape(const Tensor& input,
                                               const std::optional<Tensor>& given) {
    if (given && given->dim() == 1 && input.dim() == 2) return {input.size(0)};
    return {};
  }

  void read_residual(const char* op, const Tensor& input, const Int8Arguments& a,
                     const Tensor& output, bool channels_last) {
    const Tensor& residual = *a.residual;
    const bool quantized = residual.scalar_type() == ScalarType::Char;
    const auto sizes = output.sizes();
    NNCX_CHECK(has_shape(residual, std::vector<int64_t>(sizes.begin(), sizes.end())) &&
                   residual.device() == input.device(),
               op, ": residual must have the output's shape ", shape_text(output),
               " on the input's device, got ", tensor_text(residual));
    NNCX_CHECK(
        quantized == a.residual_scale.has_value() && quantized == a.residual_zero_point.has_value(),
        op,
        ": residual_scale and residual_zero_point must come with an int8 residual, and "
        "only with that, got a residual of ",
        torch::headeronly::toString(residual.scalar_type()));
    residual_is_int8_ = quantized;
    if (!quantized) {
      const ScalarType type = residual.scalar_type();
      NNCX_CHECK(
          type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16, op,
          ": residual must be float32, float16, bfloat16 or int8, got ",
          torch::headeronly::toString(type));
      residual_dtype_ = to_dtype(type, op, "residual");
    }
    residual_ = channels_last ? torch::stable::contiguous(
                                    residual, torch::headeronly::MemoryFormat::ChannelsLast)
                              : dense(residual);
  }
};

#ifdef NNCX_DEVICE_CUDA

inline int64_t int8_prepacked_bytes(const Backend&, const Conv2dWeightShape& s) {
  return cuda::int8_conv2d_prepacked_bytes(s);
}

inline void int8_fill(const char* op, const Backend& backend, const Conv2dWeightShape& s,
                      const int8_t* weight, uint8_t* bytes) {
  if (is_empty(s)) return;  // nothing but zeros
  backend.check(op, cuda::int8_conv2d_prepack(s, weight, bytes, backend.stream()));
}

// Rows of a linear layer that are no multiple of 16 bytes are copied into ones that are, which takes a
// tenth of the time that reading them as they are would. The weight's rows have zeros there.
inline void run(const char* op, const Backend& backend, Int8Conv2dParams params,
                const Tensor& input) {
  const int64_t beyond = input.dim() == 2 ? params.shape.channels % 16 : 0;
  std::optional<Tensor> whole;
  if (beyond > 0 && input.size(0) > 0) {
    const int64_t zeros[] = {0, 16 - beyond};
    whole = torch::stable::pad(input, {zeros, 2});
    params.input = static_cast<const int8_t*>(whole->const_data_ptr());
    params.shape.channels += 16 - beyond;
  }
  backend.check(op, cuda::int8_conv2d(params, backend.stream()));
}

#else

inline int64_t int8_prepacked_bytes(const Backend& backend, const Conv2dWeightShape& s) {
  return NNCX_ON_PATH(backend.isa, int8_conv2d_prepacked_bytes(s));
}

inline void int8_fill(const char*, const Backend& backend, const Conv2dWeightShape& s,
                      const int8_t* weight, uint8_t* bytes) {
  NNCX_ON_PATH(backend.isa, int8_conv2d_prepack(s, weight, bytes));
}

// Splits the pixels over torch's threads; where there are too few, the output channels too.
inline void run(const char*, const Backend& backend, Int8Conv2dParams params, const Tensor& input) {
  const Isa isa = backend.isa;
  params.epilogue.scalars = read_scalars(params.epilogue);
  constexpr double kMinProducts = 1 << 19;  // per thread: about 10 us
  constexpr int64_t kPixels = 48;           // per part at least, if the pixels suffice
  const Conv2dWeightShape& s = params.shape;
  const int64_t pixels = params.batch * params.out_height * params.out_width;
  const int64_t blocks = s.groups * int8_blocks(s.out_channels);
  const double products = static_cast<double>(pixels) * static_cast<double>(blocks * kInt8Block) *
                          static_cast<double>(s.taps * s.channels);
  const int64_t threads = threads_for(products / kMinProducts);
  int64_t pixel_parts = 1, block_parts = 1;
  if (threads > 1) {
    pixel_parts = std::clamp<int64_t>(pixels / kPixels, 1, 4 * threads);
    block_parts = pixel_parts >= threads ? 1 : std::min(threads, blocks);
  }
  const int64_t scratch_bytes = NNCX_ON_PATH(isa, int8_conv2d_scratch_bytes(params));
  run_tiles(input, {0, pixels, 0, blocks}, pixel_parts, block_parts, scratch_bytes,
            [&](const Conv2dTile& tile, uint8_t* scratch) {
              NNCX_ON_PATH(isa, int8_conv2d(params, tile, scratch));
            });
}

#endif

inline PrepackedHeader int8_header(const Backend& backend, const Conv2dWeightShape& s) {
  return backend.header("int8", s, int8_prepacked_bytes(backend, s));
}

inline Tensor int8_prepack(const char* op, const Tensor& weight, const Conv2dWeightShape& s) {
  const Backend backend(weight);
  return prepack(op, backend, weight, int8_header(backend, s),
                 [&](const uint8_t* dense, uint8_t* bytes) {
                   int8_fill(op, backend, s, reinterpret_cast<const int8_t*>(dense), bytes);
                 });
}

// Everything else of `p` is filled and checked: opens the weight and fills `output`. `pixels` is
// the input, channels innermost.
inline void execute(const char* op, Int8Conv2dParams p, const Tensor& pixels, const Tensor& weight,
                    const Int8Tensors& tensors, const Tensor& output, bool channels_last) {
  check_device(op, pixels, weight);
  const Backend backend(pixels);
  const Tensor prepacked = open_prepacked(op, backend, weight, int8_header(backend, p.shape));
  if (output.numel() == 0) return;
  p.weight = behind_header(prepacked);
  tensors.fill(p);
  p.input = static_cast<const int8_t*>(pixels.const_data_ptr());
  const ScalarType type = output.scalar_type();
  p.epilogue.output = output.mutable_data_ptr();
  p.epilogue.output_is_int8 = type == ScalarType::Char;
  if (!p.epilogue.output_is_int8) p.epilogue.dtype = to_dtype(type, op, "output");
  p.epilogue.channels_last = channels_last;
  p.epilogue.channels = p.shape.groups * p.shape.out_channels;
  p.epilogue.image = p.out_height * p.out_width;
  run(op, backend, p, pixels);
}

}  // namespace nncx
