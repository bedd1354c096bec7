// What binary_conv2d and binary_linear share. A linear layer is a 1 x 1 convolution of one-pixel
// images, so both run on binary_conv2d's backends.
#pragma once

#include "binary_conv2d.h"
#include "conv2d_ops.h"
#include "pack_signs.h"

namespace nncx {

#ifdef NNCX_DEVICE_CUDA

inline int64_t binary_prepacked_bytes(const Backend&, const BinaryWeightShape& s) {
  return cuda::binary_conv2d_prepacked_bytes(s);
}

inline void binary_fill(const char* op, const Backend& backend, const BinaryWeightShape& s,
                        const uint8_t* packed, uint8_t* bytes) {
  if (is_empty(s)) return;  // nothing but zeros
  backend.check(op, cuda::binary_conv2d_prepack(s, packed, bytes, backend.stream()));
}

inline void run(const char* op, const Backend& backend, const BinaryConv2dParams& params,
                const Tensor&) {
  backend.check(op, cuda::binary_conv2d(params, backend.stream()));
}

#else

inline int64_t binary_prepacked_bytes(const Backend& backend, const BinaryWeightShape& s) {
  return NNCX_ON_PATH(backend.isa, binary_conv2d_prepacked_bytes(s));
}

inline void binary_fill(const char*, const Backend& backend, const BinaryWeightShape& s,
                        const uint8_t* packed, uint8_t* bytes) {
  NNCX_ON_PATH(backend.isa, binary_conv2d_prepack(s, packed, bytes));
}

// Splits the pixels over torch's threads; where there are too few, the output channels too.
inline void run(const char*, const Backend& backend, const BinaryConv2dParams& params,
                const Tensor& input) {
  const Isa isa = backend.isa;
  constexpr double kMinBits = 1 << 22;  // per thread: about 10 us
  constexpr int64_t kPixels = 48;       // per part at least, if the pixels suffice
  const BinaryWeightShape& s = params.shape;
  const int64_t pixels = params.batch * params.out_height * params.out_width;
  const int64_t blocks = s.groups * binary_blocks(s.out_channels);
  const double bits = static_cast<double>(pixels) * static_cast<double>(blocks * kBinaryBlock) *
                      static_cast<double>(s.taps * s.channels);
  const int64_t threads = threads_for(bits / kMinBits);
  int64_t pixel_parts = 1, block_parts = 1;
  if (threads > 1) {
    pixel_parts = std::clamp<int64_t>(pixels / kPixels, 1, 4 * threads);
    const bool splittable = blocks_own_their_bytes(params.epilogue, s.groups);
    block_parts = pixel_parts >= threads || !splittable ? 1 : std::min(threads, blocks);
  }
  const int64_t scratch_bytes = NNCX_ON_PATH(isa, binary_conv2d_scratch_bytes(params));
  run_tiles(input, {0, pixels, 0, blocks}, pixel_parts, block_parts, scratch_bytes,
            [&](const BinaryTile& tile, uint8_t* scratch) {
              NNCX_ON_PATH(isa, binary_conv2d(params, tile, scratch));
            });
}

#endif

inline PrepackedHeader binary_header(const Backend& backend, const BinaryWeightShape& s) {
  return backend.header("binary", s, binary_prepacked_bytes(backend, s));
}

inline Tensor binary_prepack(const char* op, const Tensor& weight, const BinaryWeightShape& s) {
  const Backend backend(weight);
  return prepack(
      op, backend, weight, binary_header(backend, s),
      [&](const uint8_t* packed, uint8_t* bytes) { binary_fill(op, backend, s, packed, bytes); });
}

// Everything after the geometry and the epilogue's tensors are checked: opens the weight and fills
// `output`, whatever the epilogue makes of the dot products.
inline void execute(const char* op, BinaryConv2dParams p, const Tensor& input, const Tensor& weight,
                    const Tensor& output) {
  check_device(op, input, weight);
  const Backend backend(input);
  const Tensor prepacked = open_prepacked(op, backend, weight, binary_header(backend, p.shape));
  if (output.numel() == 0) return;
  p.weight = behind_header(prepacked);
  if (p.epilogue.threshold) backend.zero(op, output);  // of the signs, which are OR-ed in
  const Tensor packed = dense(input);
  p.input = static_cast<const uint8_t*>(packed.const_data_ptr());
  p.epilogue.output = output.mutable_data_ptr();
  p.epilogue.channels = p.shape.groups * p.shape.out_channels;
  p.epilogue.image = p.out_height * p.out_width;
  run(op, backend, p, input);
}

// Numbers: (dot * scale) * input_scale + bias.
inline void execute_numbers(const char* op, BinaryConv2dParams p, const Tensor& input,
                            const Tensor& weight, const std::optional<Tensor>& scale,
                            const std::optional<Tensor>& bias,
                            const std::optional<Tensor>& input_scale,
                            const std::vector<int64_t>& per_pixel, const Tensor& output) {
  const std::vector<int64_t> channels = {p.shape.groups * p.shape.out_channels};
  const EpilogueTensor scales(op, "scale", input, scale, channels);
  const EpilogueTensor biases(op, "bias", input, bias, channels);
  const EpilogueTensor input_scales(op, "input_scale", input, input_scale, per_pixel);
  p.epilogue.scale = scales.data();
  p.epilogue.bias = biases.data();
  p.epilogue.input_scale = input_scales.data();
  p.epilogue.dtype = to_dtype(output.scalar_type(), op, "output");
  execute(op, p, input, weight, output);
}

// Packed signs: (dot >= threshold) xor flip, in `out_groups` groups of channels.
inline void execute_signs(const char* op, BinaryConv2dParams p, const Tensor& input,
                          const Tensor& weight, const Tensor& threshold, const Tensor& flip,
                          int64_t out_groups, const Tensor& output) {
  const std::vector<int64_t> channels = {p.shape.groups * p.shape.out_channels};
  const EpilogueTensor thresholds(op, "threshold", input, threshold, channels, ScalarType::Int);
  const EpilogueTensor flips(op, "flip", input, flip, channels, ScalarType::Bool);
  p.epilogue.threshold = thresholds.data<int32_t>();
  p.epilogue.flip = flips.data<bool>();
  p.epilogue.out_groups = out_groups;
  execute(op, p, input, weight, output);
}

}  // namespace nncx
