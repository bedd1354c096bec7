// The GEMM of at most 16 rows, a linear layer at a small batch: all of its time is the reading of the
// weight, once, from memory.
//
// A block computes 16, 32 or 64 output channels of one group. A warp has 16 of them; warps with the
// same ones share out K, in steps of 64 bytes. No ring of stages: a lane reads 16 bytes of two weight
// rows into the registers that mma.sync wants, four steps at a time, so that the 16 or 24 warps of a
// multiprocessor have 64 KB or more on the way. The weight is mma's 16-row operand, the rows of A are
// its 8 columns. Which byte of K sits in which of mma's slots does not matter, as long as it is the
// same for both.
//
// The sums of the warps meet in shared memory; then each row is finished and stored by a warp. Code
// that is compiled for less than 8.0 multiplies the same registers with popc and dp4a.
#pragma once

#include "cuda/gemm_epilogue.h"
#include "cuda/gemm_plan.h"
#include "cuda/launch.h"

namespace nncx::cuda {

template <class Params>
struct Skinny {
  Params params;
  unsigned output_tiles;  // of a group
  int rows, piece;
};

// kRowTiles: of 8 rows of A. A block is 32 lanes x warps with outputs side by side x warps that share
// out K.
template <class Op, int kRowTiles>
class SkinnyBlock {
 public:
  using Params = typename Op::Params;

  __device__ explicit SkinnyBlock(const Skinny<Params>& skinny)
      : s(skinny),
        p(skinny.params),
        group(static_cast<int>(blockIdx.x / skinny.output_tiles)),
        first_output(static_cast<int>(blockIdx.x % skinny.output_tiles * blockDim.y) *
                     kWarpOutputs),
        k_bytes(static_cast<int>(Op::weight(p.shape).k_bytes())),
        row_bytes(static_cast<int>(Op::weight(p.shape).row_bytes())),
        pitch(static_cast<int>(blockDim.y) * kWarpOutputs + kPad) {}

  __device__ void run() {
    prefetch_end();
    multiply();
    stage();
    __syncthreads();
    store();
  }

 private:
  static constexpr int kWarpOutputs = kSkinnyWarpOutputs;
  static constexpr int kRows = 8 * kRowTiles;
  static constexpr int kInFlight = 4;  // steps
  static constexpr int kPad = 4;  // of a row of sums: its bits, and other banks for its neighbour

  const Skinny<Params>& s;
  const Params& p;
  const int group, first_output;
  const int k_bytes, row_bytes;  // less than 2^30, as a dot product's terms
  const int pitch;

  // As mma.sync holds them: with g = lane / 4, t = lane % 4, element i is of output g + 8 * (i / 2) of
  // the warp's and of row 2 * t + i % 2 of the tile.
  int32_t sums[kRowTiles][4] = {};
  int32_t bits[kRowTiles] = {};  // this lane's part of those in row g

  __device__ static int g() { return static_cast<int>(threadIdx.x) / 4; }
  __device__ static int t() { return static_cast<int>(threadIdx.x) % 4; }

  // ---- Reading. What lies beyond the last row or output is taken from the last one, and not used.

  __device__ const uint8_t* a_row(int row) const {
    const int64_t channel_bytes = Op::weight(p.shape).channel_bytes;
    return input_of<Op>(p) + (min(row, s.rows - 1) * p.shape.groups + group) * channel_bytes;
  }

  __device__ const uint8_t* b_row(int output) const {
    const int64_t in_group =
        min(int64_t{first_output} + threadIdx.y * kWarpOutputs + output, p.shape.out_channels - 1);
    return gemm_rows_of<Op>(p) + (group * p.shape.out_channels + in_group) * row_bytes;
  }

  // 16 bytes from k on. Beyond the row's end those of A are zeros, and of B anything: a load without
  // a branch, of the last ones.
  __device__ uint4 load_b(const uint8_t* row, int k) const {
    return *reinterpret_cast<const uint4*>(row + min(k, row_bytes - 16));
  }

  __device__ uint4 load_a(const uint8_t* row, int k) const {
    const uint4 a = *reinterpret_cast<const uint4*>(row + min(k, k_bytes - 16));
    const uint32_t mask = k < k_bytes ? 0xFFFFFFFF : 0;
    return {a.x & mask, a.y & mask, a.z & mask, a.w & mask};
  }

  // The same where A must be read in smaller pieces, none of which crosses a row's end.
  __device__ uint4 gather_a(const uint8_t* row, int k) const {
    uint32_t words[4] = {};
    for (int i = 0; i < 4; ++i, k += 4) {
      if (s.piece > 1) {
        if (k < k_bytes) words[i] = *reinterpret_cast<const uint32_t*>(row + k);
      } else {
#pragma unroll 1
        for (int j = 0; j < 4 && k + j < k_bytes; ++j) words[i] |= uint32_t{row[k + j]} << 8 * j;
      }
    }
    return {words[0], words[1], words[2], words[3]};
  }

  // ---- Multiplying

  __device__ void multiply() {
    const uint8_t* const b_rows[2] = {b_row(g()), b_row(g() + 8)};
    const int step = static_cast<int>(blockDim.z) * kSkinnyStepBytes;
    for (int k = static_cast<int>(threadIdx.z) * kSkinnyStepBytes + t() * 16; k < row_bytes;
         k += kInFlight * step) {
      uint4 a[kInFlight][kRowTiles], b[kInFlight][2];
      if (s.piece < 16) {
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) {
          for (int r = 0; r < kRowTiles; ++r) a[i][r] = gather_a(a_row(g() + 8 * r), k + i * step);
        }
      }
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        for (int j = 0; j < 2; ++j) b[i][j] = load_b(b_rows[j], k + i * step);
      }
      if (s.piece == 16) {
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) {
          for (int r = 0; r < kRowTiles; ++r) a[i][r] = load_a(a_row(g() + 8 * r), k + i * step);
        }
      }
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        for (int r = 0; r < kRowTiles; ++r) {
          if (Op::kCountsBits) bits[r] += bits_of(a[i][r]);
          if (ptx::compiled_for(80)) {
            Op::mma(sums[r], {b[i][0].x, b[i][1].x, b[i][0].y, b[i][1].y}, {a[i][r].x, a[i][r].y});
            Op::mma(sums[r], {b[i][0].z, b[i][1].z, b[i][0].w, b[i][1].w}, {a[i][r].z, a[i][r].w});
          } else {
            multiply_without_mma(r, a[i][r], b[i]);
          }
        }
      }
    }
  }

  __device__ static int32_t bits_of(const uint4& a) {
    return __popc(a.x) + __popc(a.y) + __popc(a.z) + __popc(a.w);
  }

  // A lane multiplies its bytes of K with those of all rows, which other lanes hold; then the four that
  // share the outputs add up.
  __device__ void multiply_without_mma(int r, const uint4& own, const uint4 (&b)[2]) {
#pragma unroll 1
    for (int pair = 0; pair < 4; ++pair) {
      for (int i = 0; i < 4; ++i) {
        const int source = (2 * pair + i % 2) * 4 + t();
        const uint4& other = b[i / 2];
        int32_t sum = Op::add_products(__shfl_sync(kAllLanes, own.x, source), other.x, 0);
        sum = Op::add_products(__shfl_sync(kAllLanes, own.y, source), other.y, sum);
        sum = Op::add_products(__shfl_sync(kAllLanes, own.z, source), other.z, sum);
        sum = Op::add_products(__shfl_sync(kAllLanes, own.w, source), other.w, sum);
        sum = quad_sum(sum);
        if (pair == t()) sums[r][i] += sum;
      }
    }
  }

  __device__ static int32_t quad_sum(int32_t x) {
    x += __shfl_xor_sync(kAllLanes, x, 1);
    return x + __shfl_xor_sync(kAllLanes, x, 2);
  }

  // ---- The end. It would wait for memory once more, were not asked for before the weight what it
  // reads of the output channels.

  __device__ void prefetch_end() const {
    const auto& e = p.epilogue;
    const int64_t in_group = int64_t{first_output} + threadIdx.y * kWarpOutputs;
    if (threadIdx.z > 0 || in_group >= p.shape.out_channels) return;
    const int64_t o = group * p.shape.out_channels + in_group;
    if (threadIdx.x == 0) ptx::prefetch(tap_sums_of<Op>(p) + p.shape.taps * e.channels + o);
    if (threadIdx.x == 1 && e.scale) ptx::prefetch(e.scale + o);
    if (threadIdx.x == 2 && e.bias) ptx::prefetch(e.bias + o);
    if constexpr (Op::kHasSigns) {
      if (threadIdx.x == 3 && e.threshold) ptx::prefetch(e.threshold + o);
      if (threadIdx.x == 4 && e.threshold) ptx::prefetch(e.flip + o);
    }
  }

  // Staged: [k_warps][kRows][pitch] sums, behind those of a row its bits

  __device__ static int32_t* staged() {
    // store_sums may read 64 outputs of a row.
    __shared__ __align__(16)
        int32_t memory[skinny_warps(kRowTiles) * kRows * (kWarpOutputs + kPad) + kChunkOutputs];
    return memory;
  }

  __device__ void stage() const {
    int32_t* const own = staged() + threadIdx.z * kRows * pitch;
    for (int r = 0; r < kRowTiles; ++r) {
      for (int i = 0; i < 4; ++i) {
        const int row = 8 * r + 2 * t() + i % 2, output = g() + 8 * (i / 2);
        own[row * pitch + threadIdx.y * kWarpOutputs + output] = sums[r][i];
      }
      if (Op::kCountsBits) {
        const int32_t row_bits = quad_sum(bits[r]);
        if (threadIdx.y == 0 && t() == 0) own[(8 * r + g()) * pitch + pitch - kPad] = row_bits;
      }
    }
  }

  __device__ void store() const {
    const int warps = blockDim.y * blockDim.z, warp = threadIdx.z * blockDim.y + threadIdx.y;
    const int outputs = static_cast<int>(
        min(int64_t{blockDim.y} * kWarpOutputs, p.shape.out_channels - first_output));
    for (int row = warp; row < s.rows; row += warps) {
      int32_t* const own = staged() + row * pitch;
      for (int i = threadIdx.x; i <= pitch - kPad; i += 32) {
        int32_t sum = own[i];
        for (int k = 1; k < static_cast<int>(blockDim.z); ++k) sum += own[k * kRows * pitch + i];
        own[i] = sum;
      }
      __syncwarp();
      store_sums<Op, 1>(p, row, 1, group, first_output, outputs, own, pitch, own + pitch - kPad);
    }
  }
};

template <class Op, int kRowTiles>
__global__ void __launch_bounds__(skinny_warps(kRowTiles) * 32, skinny_resident_blocks(kRowTiles))
    skinny_gemm(const __grid_constant__ Skinny<typename Op::Params> s) {
  SkinnyBlock<Op, kRowTiles>(s).run();
}

template <class Op>
int run_skinny(const typename Op::Params& p, const GemmProblem& problem, const GemmPlan& plan,
               cudaStream_t stream) {
  const GemmTiles tiles = gemm_tiles(problem, plan);
  const Skinny<typename Op::Params> s = {p, static_cast<unsigned>(tiles.output_tiles),
                                         static_cast<int>(problem.rows()), plan.piece};
  const dim3 block(32, plan.tile_outputs / kSkinnyWarpOutputs,
                   skinny_k_warps(problem, plan.tile_outputs));
  const bool is_high = skinny_row_tiles(problem.rows()) > 1;
  return launch(is_high ? skinny_gemm<Op, 2> : skinny_gemm<Op, 1>,
                static_cast<unsigned>(tiles.count()), block, 0, stream, s);
}

}  // namespace nncx::cuda
