// What codebook_conv2d and codebook_linear share. A linear layer is a 1 x 1 convolution of
// one-pixel images, so both run on codebook_conv2d's backends.
#pragma once

#include "activation.h"
#include "codebook_conv2d.h"
#include "conv2d_ops.h"

namespace nncx {

inline int check_bits(const char* op, int64_t bits) {
  NNCX_CHECK(bits >= 1 && bits <= 8, op, ": bits must be 1 to 8, got ", bits);
  return static_cast<int>(bits);
}

#ifdef NNCX_DEVICE_CUDA

// The format that the sums read: any.
inline ScalarType read_type(const Tensor& input) { return input.scalar_type(); }

inline int64_t codebook_prepacked_bytes(const Backend&, const Conv2dWeightShape& s, int bits) {
  return cuda::codebook_conv2d_prepacked_bytes(s, bits);
}

inline void codebook_fill(const char* op, const Backend& backend, const Conv2dWeightShape& s,
                          int bits, const uint8_t* codes, uint8_t* bytes) {
  if (is_empty(s)) return;  // nothing but zeros
  backend.check(op, cuda::codebook_conv2d_prepack(s, bits, codes, bytes, backend.stream()));
}

inline void run(const char* op, const Backend& backend, const CodebookConv2dParams& params,
                const Tensor&) {
  backend.check(op, cuda::codebook_conv2d(params, backend.stream()));
}

#else

inline ScalarType read_type(const Tensor&) { return ScalarType::Float; }

inline int64_t codebook_prepacked_bytes(const Backend& backend, const Conv2dWeightShape& s,
                                        int bits) {
  return NNCX_ON_PATH(backend.isa, codebook_conv2d_prepacked_bytes(s, bits));
}

inline void codebook_fill(const char*, const Backend& backend, const Conv2dWeightShape& s, int bits,
                          const uint8_t* codes, uint8_t* bytes) {
  NNCX_ON_PATH(backend.isa, codebook_conv2d_prepack(s, bits, codes, bytes));
}

// Splits the output channels over torch's threads, so that each decodes its own weights; where
// there are too few, the pixels too.
inline void run(const char*, const Backend& backend, const CodebookConv2dParams& params,
                const Tensor& input) {
  const Isa isa = backend.isa;
  constexpr double kMinProducts = 1 << 19;  // per thread: about 10 us
  constexpr int64_t kPixels = 48;           // per part at least
  const Conv2dWeightShape& s = params.shape;
  const int64_t pixels = params.batch * params.out_height * params.out_width;
  const int64_t blocks = s.groups * codebook_blocks(s);
  const double products = static_cast<double>(pixels) *
                          static_cast<double>(blocks * kCodebookBlock) *
                          static_cast<double>(s.taps * s.channels);
  const int64_t threads = threads_for(products / kMinProducts);
  const int64_t block_parts = std::min(threads, blocks);
  const int64_t pixel_parts =
      std::clamp<int64_t>(pixels / kPixels, 1, (threads + block_parts - 1) / block_parts);
  const int64_t scratch_bytes = NNCX_ON_PATH(isa, codebook_conv2d_scratch_bytes(params));
  run_tiles(input, {0, pixels, 0, blocks}, pixel_parts, block_parts, scratch_bytes,
            [&](const Conv2dTile& tile, uint8_t* scratch) {
              NNCX_ON_PATH(isa, codebook_conv2d(params, tile, scratch));
            });
}

#endif

inline PrepackedHeader codebook_header(const Backend& backend, const Conv2dWeightShape& s,
                                       int bits) {
  return backend.header("codebook" + std::to_string(bits), s,
                        codebook_prepacked_bytes(backend, s, bits));
}

inline Tensor codebook_prepack(const char* op, const Tensor& codes, const Conv2dWeightShape& s,
                               int bits) {
  const int64_t count = s.groups * s.out_channels * s.taps * s.channels;
  const int64_t bytes = (count * bits + 7) / 8;
  NNCX_CHECK(codes.scalar_type() == ScalarType::Byte && has_shape(codes, {bytes}), op,
             ": codes must be uint8 [", bytes, "] from pack_codes, got ",
             torch::headeronly::toString(codes.scalar_type()), " of shape ", shape_text(codes));
  const Backend backend(codes);
  return prepack(op, backend, codes, codebook_header(backend, s, bits),
                 [&](const uint8_t* dense, uint8_t* prepacked) {
                   codebook_fill(op, backend, s, bits, dense, prepacked);
                 });
}

// One codebook for the layer, or one per output channel.
inline int64_t codebook_stride(const Tensor& codebook, int bits) {
  return codebook.dim() == 1 ? 0 : int64_t{1} << bits;
}

struct CodebookTensors {
  EpilogueTensor codebook, bias;

  CodebookTensors(const char* op, const Tensor& input, const Tensor& given_codebook,
                  const std::optional<Tensor>& given_bias, int64_t bits, int64_t out_channels)
      : codebook(op, "codebook", input, given_codebook,
                 given_codebook.dim() == 1 ? std::vector{int64_t{1} << bits}
                                           : std::vector{out_channels, int64_t{1} << bits}),
        bias(op, "bias", input, given_bias, {out_channels}) {}
};

// Everything else of `p` is filled and checked: opens the weight and fills `output`. `pixels` is
// the input in its read_type, channels innermost.
inline void execute(const char* op, CodebookConv2dParams p, const Tensor& pixels,
                    const Tensor& weight, const CodebookTensors& tensors, const Tensor& output) {
  check_device(op, pixels, weight);
  const Backend backend(pixels);
  const Tensor prepacked =
      open_prepacked(op, backend, weight, codebook_header(backend, p.shape, p.bits));
  if (output.numel() == 0) return;
  p.weight = behind_header(prepacked);
  p.input = pixels.const_data_ptr();
  p.input_dtype = to_dtype(pixels.scalar_type(), op, "input");
  p.codebook = tensors.codebook.data();
  p.epilogue.bias = tensors.bias.data();
  p.epilogue.output = output.mutable_data_ptr();
  p.epilogue.dtype = to_dtype(output.scalar_type(), op, "output");
  run(op, backend, p, pixels);
}

}  // namespace nncx
