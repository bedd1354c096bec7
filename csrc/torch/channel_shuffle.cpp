#include "channel_shuffle.h"

#include "conv2d_ops.h"

namespace nncx {
namespace {

constexpr const char* kOp = "channel_shuffle";

#ifdef NNCX_DEVICE_CUDA

void run(const ChannelShuffleParams&, const Tensor& input) {
  fail(kOp, ": input must be on a device that has a kernel, cpu, got ", device_text(input));
}

#else

void run(const ChannelShuffleParams& p, const Tensor& input) {
  constexpr int64_t kBytes = 1 << 17;  // moved per task at least: about 10 us
  const Isa isa = Backend(input).isa;
  const int64_t unit = p.element_bytes * (p.channels_last ? p.groups * p.channels : p.pixels);
  const int64_t grain = std::max<int64_t>(1, kBytes / unit);
  parallel_for(0, shuffle_units(p), grain, [&](int64_t begin, int64_t end) {
    NNCX_ON_PATH(isa, channel_shuffle(p, begin, end));
  });
}

#endif

Tensor channel_shuffle(const Tensor& input, int64_t groups) {
  NNCX_CHECK(input.dim() >= 3, kOp,
             ": input must be [N, C, ...] of at least 3 dimensions, got shape ", shape_text(input));
  const int64_t channels = input.size(1);
  NNCX_CHECK(groups >= 1 && channels % groups == 0, kOp,
             ": groups must divide the channels, got groups=", groups, ", channels=", channels);
  ChannelShuffleParams p{};
  p.element_bytes = static_cast<int64_t>(input.element_size());
  NNCX_CHECK(p.element_bytes <= 8, kOp, ": input must have elements of at most 8 bytes, got ",
             torch::headeronly::toString(input.scalar_type()));
  p.channels_last = input.dim() == 4 && keeps_channels_last(input);
  const auto sizes = input.sizes();
  const Tensor output =
      new_tensor(input, {sizes.begin(), sizes.end()}, input.scalar_type(), p.channels_last);
  if (output.numel() == 0) return output;
  const Tensor image = p.channels_last ? input : dense(input);
  p.input = image.const_data_ptr();
  p.output = output.mutable_data_ptr();
  p.batch = input.size(0);
  p.groups = groups;
  p.channels = channels / groups;
  p.pixels = input.numel() / (p.batch * channels);
  run(p, input);
  return output;
}

}  // namespace

NNCX_SCHEMAS(library) { library.def("channel_shuffle(Tensor input, int groups) -> Tensor"); }

NNCX_KERNELS(library) { library.impl("channel_shuffle", TORCH_BOX(&channel_shuffle)); }

}  // namespace nncx
