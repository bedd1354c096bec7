// hashed_linear on CUDA. Lanes are outputs: a thread hashes each weight once, for all rows of its
// tile, whose activations a warp reads as one broadcast. The warps of a block share out the k's,
// since a layer has few outputs for a GPU; their sums meet in shared memory.
//
// It has run on an emulated GPU only: nothing is known of its speed.
#include "cuda/launch.h"
#include "cuda/numbers.h"
#include "hashed_linear.h"

namespace nncx::cuda {
namespace {

constexpr int kLanes = 32;  // outputs of a block
constexpr int kWarps = 8;   // parts of a sum: warp i has the k's i, i + 8, ...

struct HashedTiles {
  HashedLinearParams params;
  unsigned columns;  // of tiles, side by side along the outputs
};

__device__ float value_of(const HashedWeight& w, uint32_t place) {
  return __uint_as_float(__float_as_uint(__ldg(w.buckets + place / 2)) ^ place << 31);
}

template <class T, int Rows>
__global__ void __launch_bounds__(kLanes* kWarps)
    hashed_tiles(const __grid_constant__ HashedTiles tiles) {
  __shared__ float sums[kWarps][Rows][kLanes];
  const HashedLinearParams& p = tiles.params;
  const HashedWeight& w = p.weight;
  const int lane = static_cast<int>(threadIdx.x), warp = static_cast<int>(threadIdx.y);
  const int64_t o = int64_t{blockIdx.x % tiles.columns} * kLanes + lane;
  const int64_t first_row = int64_t{blockIdx.x / tiles.columns} * Rows;
  const HashKeys keys = hash_keys(w.seed, o);  // also of an output that does not exist
  const T* x[Rows];
  float acc[Rows] = {};
#pragma unroll
  for (int r = 0; r < Rows; ++r) {  // a row that does not exist is the last one
    x[r] = static_cast<const T*>(p.input) + min(first_row + r, p.rows - 1) * w.in_features;
  }
  for (int64_t k = warp; k < w.in_features; k += kWarps) {
    const float value = value_of(w, hash_place(keys, k, w.places));
#pragma unroll
    for (int r = 0; r < Rows; ++r) acc[r] = __fmaf_rn(to_float(x[r][k]), value, acc[r]);
  }
#pragma unroll
  for (int r = 0; r < Rows; ++r) sums[warp][r][lane] = acc[r];
  __syncthreads();
  if (o >= w.out_features) return;
  for (int r = warp; r < Rows && first_row + r < p.rows; r += kWarps) {
    float sum = 0;
    for (int part = 0; part < kWarps; ++part) sum += sums[part][r][lane];
    const FloatEpilogue& e = p.epilogue;
    store_number(finish(e, sum, o), e.dtype, e.output, (first_row + r) * e.stride_n + o);
  }
}

template <class T, int Rows>
int run_tiles(const HashedLinearParams& p, cudaStream_t stream) {
  const int64_t columns = (p.weight.out_features + kLanes - 1) / kLanes;
  const int64_t blocks = (p.rows + Rows - 1) / Rows * columns;
  const HashedTiles tiles = {p, static_cast<unsigned>(columns)};
  return launch(hashed_tiles<T, Rows>, static_cast<unsigned>(blocks), dim3(kLanes, kWarps), 0,
                stream, tiles);
}

template <class T>
int run(const HashedLinearParams& p, cudaStream_t stream) {
  if (p.rows == 1) return run_tiles<T, 1>(p, stream);
  return p.rows <= 8 ? run_tiles<T, 8>(p, stream) : run_tiles<T, 32>(p, stream);
}

}  // namespace

int hashed_linear(const HashedLinearParams& p, void* stream) {
  auto* cuda_stream = static_cast<cudaStream_t>(stream);
  switch (p.input_dtype) {
    case Dtype::float32:
      return run<float>(p, cuda_stream);
    case Dtype::float16:
      return run<Half>(p, cuda_stream);
    case Dtype::bfloat16:
      return run<BFloat16>(p, cuda_stream);
    case Dtype::float64:
      break;  // the op refuses it
  }
  return cudaErrorInvalidValue;
}

}  // namespace nncx::cuda
