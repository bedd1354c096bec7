// The end of the kernels of codebook_conv2d that compute a square of output pixels and outputs.
#pragma once

#include "cuda/gemm_rows.h"
#include "cuda/numbers.h"

namespace nncx::cuda {

// Where the pixel begins in the output.
__device__ inline int64_t output_offset(const CodebookConv2dParams& p, int64_t pixel) {
  const OutputPixel at = output_pixel(p, pixel);
  return at.n * p.epilogue.stride_n + at.in_image * p.epilogue.stride_pixel;
}

// sums[pixel][kSide + 1], of which `pixels` x `outputs` exist, from output `o` on, counted over all
// groups. Neighbouring threads write neighbours, whichever dimension is innermost.
template <int kSide, int kThreads>
__device__ void store_square(const CodebookConv2dParams& p, const float* sums,
                             const int64_t* offsets, int64_t pixels, int64_t o, int64_t outputs,
                             int thread) {
  const FloatEpilogue& e = p.epilogue;
  const bool outputs_innermost = e.stride_o == 1;
  for (int at = thread; at < kSide * kSide; at += kThreads) {
    const int pixel = outputs_innermost ? at / kSide : at % kSide;
    const int output = outputs_innermost ? at % kSide : at / kSide;
    if (pixel >= pixels || output >= outputs) continue;
    const float y = finish(e, sums[pixel * (kSide + 1) + output], o + output);
    store_number(y, e.dtype, e.output, offsets[pixel] + (o + output) * e.stride_o);
  }
}

}  // namespace nncx::cuda
