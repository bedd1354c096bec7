#include "depthwise_conv2d.h"

#include "depthwise_tiles.h"
#include "float_vector.h"

namespace nncx::avx2 {
namespace {

struct V : FloatVector {
  using Narrow = V;
  static constexpr int kRows = 2;  // times 3 sums, 9 weights and an input: 16 registers
  static constexpr int kColumns = 3;
  static constexpr int kLines = 4;
};

}  // namespace

int64_t depthwise_conv2d_scratch_bytes(const DepthwiseConv2dParams& p) {
  return scratch_bytes<V>(p);
}

void depthwise_conv2d(const DepthwiseConv2dParams& p, const Conv2dTile& tile, uint8_t* scratch) {
  run_depthwise<V>(p, tile, scratch);
}

}  // namespace nncx::avx2
