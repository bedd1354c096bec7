#include "cuda/codebook_weight.h"

namespace nncx::cuda {

int64_t codebook_conv2d_prepacked_bytes(const Conv2dWeightShape& s, int bits) {
  return codebook_weight(s, bits).bytes();
}

}  // namespace nncx::cuda
