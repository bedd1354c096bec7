#include "pack_signs.h"

#include "backend.h"
#include "parallel.h"

namespace nncx {
namespace {

#ifdef NNCX_DEVICE_CUDA

void run(const PackSignsParams& params, const Tensor& input) {
  const Backend backend(input);
  backend.check("pack_signs", cuda::pack_signs(params, backend.stream()));
}

#else

void run(const PackSignsParams& params, const Tensor& input) {
  constexpr int64_t kNumbers = 1 << 15;  // per task at least: about 10 us
  constexpr int64_t kPixels = 8;         // a task starts at a multiple of the vector loops' step
  const Isa isa = Backend(input).isa;
  const int64_t pixels = params.batch * params.height * params.width;
  const int64_t numbers = kPixels * std::max<int64_t>(1, params.groups * params.channels);
  const int64_t grain = std::max<int64_t>(1, kNumbers / numbers);
  const int64_t steps = (pixels + kPixels - 1) / kPixels;
  parallel_for(0, steps, grain, [&](int64_t begin, int64_t end) {
    NNCX_ON_PATH(isa, pack_signs(params, begin * kPixels, std::min(pixels, end * kPixels)));
  });
}

#endif

// Pixels of a matrix are its rows: one line of one image.
PackSignsParams read_geometry(const Tensor& input, int64_t groups) {
  PackSignsParams params{};
  params.input = input.const_data_ptr();
  params.dtype = to_dtype(input.scalar_type(), "pack_signs", "input");
  params.groups = groups;
  params.channels = input.size(1) / groups;
  params.stride_c = input.stride(1);
  if (input.dim() == 2) {
    params.batch = params.height = 1;
    params.width = input.size(0);
    params.stride_w = input.stride(0);
    return params;
  }
  params.batch = input.size(0);
  params.height = input.size(2);
  params.width = input.size(3);
  params.stride_n = input.stride(0);
  params.stride_h = input.stride(2);
  params.stride_w = input.stride(3);
  // An image whose lines follow one another is one long line, which the vector loops like.
  if (params.stride_h == params.width * params.stride_w) {
    params.width *= params.height;
    params.height = 1;
  }
  return params;
}

Tensor pack_signs(const Tensor& input, int64_t groups) {
  const int64_t dim = input.dim();
  NNCX_CHECK(dim == 2 || dim == 4, "pack_signs: input must be [M, K] or [N, C, H, W], got shape ",
             shape_text(input));
  NNCX_CHECK(groups >= 1 && (dim == 4 || groups == 1),
             "pack_signs: groups must be at least 1, and 1 for a matrix, got ", groups);
  NNCX_CHECK(input.size(1) % groups == 0, "pack_signs: channels must be a multiple of groups, got ",
             input.size(1), " channels and groups=", groups);
  PackSignsParams params = read_geometry(input, groups);
  std::vector<int64_t> shape = {input.size(0)};
  if (dim == 4) shape.insert(shape.end(), {input.size(2), input.size(3), groups});
  shape.push_back(packed_bytes(params.channels));
  const Tensor output = new_tensor(input, shape, ScalarType::Byte);
  if (output.numel() == 0) return output;
  params.output = static_cast<uint8_t*>(output.mutable_data_ptr());
  run(params, input);
  return output;
}

}  // namespace

NNCX_SCHEMAS(library) { library.def("pack_signs(Tensor input, int groups=1) -> Tensor"); }

NNCX_KERNELS(library) { library.impl("pack_signs", TORCH_BOX(&pack_signs)); }

}  // namespace nncx
