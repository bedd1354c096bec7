#include "depthwise_conv2d.h"
namespace nncx::avx512 {
int64_t depthwise_conv2d_scratch_bytes(const DepthwiseConv2dParams& p) { return scalar::depthwise_conv2d_scratch_bytes(p);}
void depthwise_conv2d(const DepthwiseConv2dParams& p, const Conv2dTile& tile, uint8_t* s) { scalar::depthwise_conv2d(p, tile, s); }
}
