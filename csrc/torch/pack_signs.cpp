#include "pack_signs.h"

#include "common.h"

namespace nncx {
namespace {

#ifdef NNCX_DEVICE_CUDA

void run(const PackSignsParams& params, const Tensor& input) {
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  const int error = cuda::pack_signs(params, current_stream(input));
  check(error == 0, "pack_signs: the CUDA launch must succeed, got cudaError ", error);
}

#else

constexpr int64_t kGrainNumbers = 1 << 15;  // about 10 us of work

void run(const PackSignsParams& params, const Tensor&) {
  const int64_t pixels = params.batch * params.height * params.width;
  const int64_t grain = kGrainNumbers / std::max<int64_t>(1, params.groups * params.channels);
  parallel(pixels, grain, 8,
           [&](int64_t begin, int64_t end) { NNCX_ON_PATH(pack_signs(params, begin, end)); });
}

#endif

Tensor pack_signs(const Tensor& input, int64_t groups) {
  const int64_t dim = input.dim();
  check(dim == 2 || dim == 4, "pack_signs: input must be [M, K] or [N, C, H, W], got shape ",
        shape_text(input));
  check(groups >= 1 && (dim == 4 || groups == 1),
        "pack_signs: groups must be at least 1, and 1 for a matrix, got ", groups);
  const int64_t channels = input.size(1);
  check(channels % groups == 0, "pack_signs: channels must be a multiple of groups, got ", channels,
        " channels and groups=", groups);

  PackSignsParams params{};
  params.input = input.const_data_ptr();
  params.dtype = to_dtype(input.scalar_type(), "pack_signs", "input");
  params.groups = groups;
  params.channels = channels / groups;
  params.batch = input.size(0);
  params.stride_n = input.stride(0);
  params.stride_c = input.stride(1);
  params.height = params.width = 1;
  if (dim == 4) {
    params.height = input.size(2);
    params.width = input.size(3);
    params.stride_h = input.stride(2);
    params.stride_w = input.stride(3);
  }
  const int64_t group_bytes = packed_bytes(params.channels);
  const Tensor output =
      dim == 2 ? torch::stable::new_empty(input, {params.batch, group_bytes}, ScalarType::Byte)
               : torch::stable::new_empty(
                     input, {params.batch, params.height, params.width, groups, group_bytes},
                     ScalarType::Byte);
  if (output.numel() == 0) return output;
  params.output = static_cast<uint8_t*>(output.mutable_data_ptr());

  // An image whose rows follow one another is one long row; so are the rows of a matrix. Long runs
  // of pixels are what the vector loops like.
  if (params.stride_h == params.width * params.stride_w) {
    params.width *= params.height;
    params.height = 1;
  }
  run(params, input);
  return output;
}

}  // namespace

#ifndef NNCX_DEVICE_CUDA
STABLE_TORCH_LIBRARY_FRAGMENT(nncx, library) {
  library.def("pack_signs(Tensor input, int groups=1) -> Tensor");
}
#endif

STABLE_TORCH_LIBRARY_IMPL(nncx, NNCX_DEVICE, library) {
  library.impl("pack_signs", TORCH_BOX(&pack_signs));
}

}  // namespace nncx
