// max_pool2d_signs on CUDA: a thread ORs one piece, of up to 16 bytes, of an output pixel.
#include "cuda/launch.h"
#include "cuda/rows.h"
#include "max_pool2d_signs.h"

namespace nncx::cuda {
namespace {

constexpr int kThreads = 256;

struct Pool {
  MaxPool2dSignsParams window;
  int64_t pieces;  // of the output
  Divider pixel_pieces, out_width, out_height, dilation_h, dilation_w;
};

struct Taps {
  int64_t begin, end;
};

// Those that lie in [0, size), if the first of them is at `first`: a window may be nearly all padding.
__device__ Taps taps_inside(int64_t first, const Divider& dilation, int64_t taps, int64_t size) {
  const auto before = [&](int64_t distance) {
    return distance <= 0 ? 0 : dilation.quotient(distance + dilation.divisor() - 1);
  };
  return {before(-first), min(taps, before(size - first))};
}

__device__ uint2 operator|(uint2 a, uint2 b) { return {a.x | b.x, a.y | b.y}; }
__device__ uint4 operator|(uint4 a, uint4 b) {
  return {a.x | b.x, a.y | b.y, a.z | b.z, a.w | b.w};
}

template <int Bytes>
__global__ void __launch_bounds__(kThreads) pool(const __grid_constant__ Pool p) {
  const MaxPool2dSignsParams& q = p.window;
  const int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (at >= p.pieces) return;
  const int64_t pixel = p.pixel_pieces.quotient(at);
  const int64_t line = p.out_width.quotient(pixel);
  const int64_t n = p.out_height.quotient(line);
  const int64_t y = (line - n * q.out_height) * q.stride_h - q.padding_h;
  const int64_t x = (pixel - line * q.out_width) * q.stride_w - q.padding_w;
  const Taps rows = taps_inside(y, p.dilation_h, q.kernel_h, q.height);
  const Taps columns = taps_inside(x, p.dilation_w, q.kernel_w, q.width);
  const int64_t pixel_pieces = p.pixel_pieces.divisor();
  const auto* input = reinterpret_cast<const Piece<Bytes>*>(q.input) + (at - pixel * pixel_pieces);
  Piece<Bytes> any = {};
  for (int64_t i = rows.begin; i < rows.end; ++i) {
    const int64_t input_line = n * q.height + y + i * q.dilation_h;
    const auto* from = input + (input_line * q.width + x) * pixel_pieces;
#pragma unroll 4
    for (int64_t j = columns.begin; j < columns.end; ++j) {
      any = any | from[j * q.dilation_w * pixel_pieces];
    }
  }
  reinterpret_cast<Piece<Bytes>*>(q.output)[at] = any;
}

}  // namespace

int max_pool2d_signs(const MaxPool2dSignsParams& p, int64_t lines, void* stream) {
  const auto run = [&](auto* kernel, int piece) {
    const int64_t pixel_pieces = p.pixel_bytes / piece;
    const Pool pool_params = {p,
                              lines * p.out_width * pixel_pieces,
                              Divider(pixel_pieces),
                              Divider(p.out_width),
                              Divider(p.out_height),
                              Divider(p.dilation_h),
                              Divider(p.dilation_w)};
    const auto blocks = static_cast<unsigned>((pool_params.pieces + kThreads - 1) / kThreads);
    return launch(kernel, blocks, kThreads, 0, static_cast<cudaStream_t>(stream), pool_params);
  };
  const int widest = widest_piece(address_of(p.input), address_of(p.output), p.pixel_bytes);
  if (widest == 16) return run(pool<16>, 16);
  if (widest == 8) return run(pool<8>, 8);
  return run(pool<1>, 1);  // a part of another tensor can begin anywhere
}

}  // namespace nncx::cuda
