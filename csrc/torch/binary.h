// What binary_conv2d and binary_linear share. A linear layer is a 1 x 1 convolution of one-pixel
// images, so both run on binary_conv2d's backends.
#pragma once

#include "binary_conv2d.h"
#include "conv2d_ops.h"
#include "pack_signs.h"

namespace nncx {

inline PrepackedHeader prepacked_header(Isa isa, const BinaryWeightShape& s) {
  return prepacked_header("binary/" + std::string(isa_name(isa)), s,
                          NNCX_ON_PATH(isa, binary_conv2d_prepacked_bytes(s)));
}

inline Tensor prepack(const Tensor& weight, const BinaryWeightShape& s) {
  const Isa isa = active_isa();
  return prepack(weight, prepacked_header(isa, s), [&](const uint8_t* packed, uint8_t* bytes) {
    NNCX_ON_PATH(isa, binary_conv2d_prepack(s, packed, bytes));
  });
}

// Splits the pixels over torch's threads; where there are too few, the output channels too.
inline void run(Isa isa, const BinaryConv2dParams& params, const Tensor& input) {
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
    block_parts = pixel_parts >= threads ? 1 : std::min(threads, blocks);
  }
  const int64_t scratch_bytes = NNCX_ON_PATH(isa, binary_conv2d_scratch_bytes(params));
  run_tiles(input, {0, pixels, 0, blocks}, pixel_parts, block_parts, scratch_bytes,
            [&](const BinaryTile& tile, uint8_t* scratch) {
              NNCX_ON_PATH(isa, binary_conv2d(params, tile, scratch));
            });
}

struct BinaryEpilogueTensors {
  EpilogueTensor scale, bias, input_scale;
};

// Everything after the geometry of `p` is checked: opens the weight and fills `output`.
inline void execute(const char* op, BinaryConv2dParams p, const Tensor& input, const Tensor& weight,
                    const BinaryEpilogueTensors& epilogue, const Tensor& output) {
  const Isa isa = active_isa();
  p.weight = open_prepacked(op, input, weight, prepacked_header(isa, p.shape));
  if (output.numel() == 0) return;
  const Tensor dense = torch::stable::contiguous(input);
  p.input = static_cast<const uint8_t*>(dense.const_data_ptr());
  p.epilogue = {epilogue.scale.data(), epilogue.bias.data(), epilogue.input_scale.data(),
                output.mutable_data_ptr(), to_dtype(output.scalar_type(), op, "output")};
  run(isa, p, input);
}

}  // namespace nncx
