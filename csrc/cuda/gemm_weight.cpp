// How large a prepacked weight of binary_conv2d or int8_conv2d is on CUDA. Plain C++: also a build
// without CUDA has to know it, for tensors that only pretend to be on a GPU.
//
//   64 unused bytes   the header is 64 bytes, so that the rows start at 128
//   rows              [groups * out_channels][k_bytes]: taps, of each the channels of a group; zeros
//                     up to a multiple of 128
//   sums              int32 [taps + 1][groups * out_channels]: of the tap's bits or numbers; of all
#include "binary_conv2d.h"
#include "int8_conv2d.h"
#include "pack_signs.h"

namespace nncx::cuda {
namespace {

int64_t prepacked_bytes(const Conv2dWeightShape& s, int64_t channel_bytes) {
  const int64_t outputs = s.groups * s.out_channels;
  const int64_t k_bytes = (s.taps * channel_bytes + 127) / 128 * 128;
  return 64 + outputs * k_bytes + (s.taps + 1) * outputs * int64_t{sizeof(int32_t)};
}

}  // namespace

int64_t binary_conv2d_prepacked_bytes(const BinaryWeightShape& s) {
  return prepacked_bytes(s, packed_bytes(s.channels));
}

int64_t int8_conv2d_prepacked_bytes(const Conv2dWeightShape& s) {
  return prepacked_bytes(s, s.channels);
}

}  // namespace nncx::cuda
