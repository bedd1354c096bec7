#include "quantize_int8.h"

#include "backend.h"
#include "parallel.h"

namespace nncx {
namespace {

constexpr const char* kOp = "quantize_int8";
constexpr const char* kSignOp = "sign_int8";

// Lines of pixels; dimensions of size 1 where the input has fewer than four.
QuantizeInt8Params read_geometry(const char* op, const Tensor& input) {
  QuantizeInt8Params p{};
  p.input = input.const_data_ptr();
  p.dtype = to_dtype(input.scalar_type(), op, "input");
  p.batch = p.height = 1;
  p.channels = input.size(-1);
  p.width = p.channels ? input.numel() / p.channels : 0;
  p.stride_c = 1;
  p.stride_w = p.channels;
  if (input.dim() != 4) return p;
  p.batch = input.size(0);
  p.channels = input.size(1);
  p.height = input.size(2);
  p.width = input.size(3);
  p.stride_n = input.stride(0);
  p.stride_c = input.stride(1);
  p.stride_h = input.stride(2);
  p.stride_w = input.stride(3);
  // An image whose lines follow one another is one long line, which the vector loops like.
  if (p.stride_h == p.width * p.stride_w) {
    p.width *= p.height;
    p.height = 1;
  }
  return p;
}

void check_quantizer(const Tensor& input, const Tensor& scale, const Tensor& zero_point) {
  const bool rows = scale.dim() == 1 && input.dim() == 2;
  const std::vector<int64_t> shape =
      rows ? std::vector<int64_t>{input.size(0)} : std::vector<int64_t>{};
  NNCX_CHECK(scale.scalar_type() == ScalarType::Float && has_shape(scale, shape) &&
                 scale.device() == input.device(),
             kOp,
             ": scale must be float32 of shape [], or [M] for an input [M, K], on the input's "
             "device, got ",
             tensor_text(scale));
  NNCX_CHECK(zero_point.scalar_type() == ScalarType::Char && has_shape(zero_point, shape) &&
                 zero_point.device() == input.device(),
             kOp, ": zero_point must be int8 of the scale's shape ", shape_text(shape),
             " on the input's device, got ", tensor_text(zero_point));
}

#ifdef NNCX_DEVICE_CUDA

void run(const QuantizeInt8Params& p, const Tensor& input) {
  const Backend backend(input);
  backend.check(kOp, cuda::quantize_int8(p, backend.stream()));
}

#else

// Calls convert(begin, end) for parts of the pixels.
template <class Convert>
void for_pixels(const QuantizeInt8Params& p, const Convert& convert) {
  constexpr int64_t kNumbers = 1 << 15;  // per task at least: about 10 us
  constexpr int64_t kPixels = 32;        // a task starts at a multiple of the vector loops' step
  const int64_t pixels = p.batch * p.height * p.width;
  const int64_t numbers = kPixels * std::max<int64_t>(1, p.channels);
  const int64_t grain = std::max<int64_t>(1, kNumbers / numbers);
  parallel_for(0, (pixels + kPixels - 1) / kPixels, grain, [&](int64_t begin, int64_t end) {
    convert(begin * kPixels, std::min(pixels, end * kPixels));
  });
}

void run(const QuantizeInt8Params& p, const Tensor& input) {
  const Isa isa = Backend(input).isa;
  for_pixels(p,
             [&](int64_t begin, int64_t end) { NNCX_ON_PATH(isa, quantize_int8(p, begin, end)); });
}

#endif

// int8, images channels innermost.
Tensor new_codes(const Tensor& input) {
  const auto sizes = input.sizes();
  return new_tensor(input, std::vector<int64_t>(sizes.begin(), sizes.end()), ScalarType::Char,
                    input.dim() == 4);
}

Tensor quantize_int8(const Tensor& input, const Tensor& scale, const Tensor& zero_point) {
  const ScalarType type = input.scalar_type();
  NNCX_CHECK(type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16,
             kOp, ": input must be float32, float16 or bfloat16, got ",
             torch::headeronly::toString(type));
  NNCX_CHECK(input.dim() >= 1, kOp, ": input must have a dimension, got a number");
  check_quantizer(input, scale, zero_point);
  const Tensor output = new_codes(input);
  if (output.numel() == 0) return output;
  const Tensor numbers = input.dim() == 4 ? input : dense(input);
  const Tensor scales = dense(scale), zero_points = dense(zero_point);
  QuantizeInt8Params p = read_geometry(kOp, numbers);
  p.output = static_cast<int8_t*>(output.mutable_data_ptr());
  p.scale = static_cast<const float*>(scales.const_data_ptr());
  p.zero_point = static_cast<const int8_t*>(zero_points.const_data_ptr());
  p.per_pixel = scale.dim() == 1;
  run(p, input);
  return output;
}

#ifndef NNCX_DEVICE_CUDA

Tensor sign_int8(const Tensor& input) {
  NNCX_CHECK(input.dim() >= 1, kSignOp, ": input must have a dimension, got a number");
  const Tensor output = new_codes(input);
  const Tensor numbers = input.dim() == 4 ? input : dense(input);
  QuantizeInt8Params p = read_geometry(kSignOp, numbers);
  if (output.numel() == 0) return output;
  p.output = static_cast<int8_t*>(output.mutable_data_ptr());
  const Isa isa = Backend(input).isa;
  for_pixels(p, [&](int64_t begin, int64_t end) { NNCX_ON_PATH(isa, sign_int8(p, begin, end)); });
  return output;
}

#endif

}  // namespace

NNCX_SCHEMAS(library) {
  library.def("quantize_int8(Tensor input, Tensor scale, Tensor zero_point) -> Tensor");
  library.def("sign_int8(Tensor input) -> Tensor");
}

NNCX_KERNELS(library) {
  library.impl("quantize_int8", TORCH_BOX(&quantize_int8));
#ifndef NNCX_DEVICE_CUDA
  library.impl("sign_int8", TORCH_BOX(&sign_int8));
#endif
}

}  // namespace nncx
