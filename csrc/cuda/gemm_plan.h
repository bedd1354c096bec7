// The shape rule: which kernel runs a GEMM, with which tile. Plain functions of the shape and the
// GPU, without CUDA, so that tests on any machine ask them (nncx._C.gemm_plan).
//
//   skinny       at most 16 rows, each in one piece (1 x 1 kernel, no stride or padding): reading the
//                weight is all the work
//   sm90, sm80   tensor cores, if the library has such code for this GPU
//   cuda_cores   else
//
// A tile is `tile_rows` output pixels x `tile_outputs` output channels of one group. The input is read
// in pieces: the largest of 16, 8, 4 and 1 bytes that its addresses and a tap's channels are multiples
// of.
#pragma once

#include <algorithm>

#include "conv2d.h"
#include "cuda/device.h"

namespace nncx::cuda {

// What a warp stores at a time (gemm_epilogue.h), from shared memory; so many sums between rows there
// keep mma's registers and the epilogue's reads off each other's banks.
constexpr int kChunkRows = 16, kChunkOutputs = 64, kChunkPitch = 72;

// sm80: K passes in tiles of so many bytes; a warp has 32 rows x 64 outputs.
constexpr int kSm80TileRows = 128, kSm80TileBytes = 128;

constexpr int sm80_threads(int tile_outputs) {
  return kSm80TileRows / 32 * tile_outputs / kChunkOutputs * 32;
}

// So many blocks share a multiprocessor's registers.
constexpr int sm80_resident_blocks(int tile_outputs) { return tile_outputs == 128 ? 1 : 3; }

constexpr int sm80_stage_bytes(int tile_outputs) {
  return (kSm80TileRows + tile_outputs) * kSm80TileBytes;
}

// Of the stages; when all is multiplied, each warp stages its sums there.
constexpr int sm80_ring_bytes(int tile_outputs, int stages) {
  const int sums = sm80_threads(tile_outputs) / 32 * kChunkRows * kChunkPitch * 4;
  return std::max(stages * sm80_stage_bytes(tile_outputs), sums);
}

// And what is known of a tile's rows: 16 bytes where they lie, and their bits.
constexpr int sm80_shared_bytes(int tile_outputs, int stages) {
  return sm80_ring_bytes(tile_outputs, stages) + kSm80TileRows * 20;
}

// skinny: a warp has 16 outputs and, of K, steps of 64 bytes. Up to 8 rows take few registers, so that
// three blocks of 8 warps share a multiprocessor; for more rows it is one of 16 warps.
constexpr int kMostSkinnyRows = 16;
constexpr int kSkinnyWarpOutputs = 16, kSkinnyStepBytes = 64;

constexpr int skinny_row_tiles(int64_t rows) { return rows > 8 ? 2 : 1; }
constexpr int skinny_warps(int row_tiles) { return 8 * row_tiles; }
constexpr int skinny_resident_blocks(int row_tiles) { return row_tiles > 1 ? 1 : 3; }

enum class GemmKernel { skinny, sm90, sm80, cuda_cores };

struct GemmProblem : Conv2dGeometry {
  Conv2dWeightShape shape;
  int64_t channel_bytes;  // of one tap of one row
  uintptr_t input;        // its address

  constexpr int64_t rows() const { return batch * out_height * out_width; }
  constexpr int64_t k_bytes() const { return shape.taps * channel_bytes; }
};

struct GemmPlan {
  GemmKernel kernel;
  int piece;
  int tile_rows, tile_outputs;
  int stages;  // tiles of A and B that shared memory holds: one is multiplied, the others on their way
  int shared_bytes;
};

// Tiles are numbered through groups, and in a group through bands of kBand tiles of rows: blocks that
// run at the same time read few different rows and outputs, which stay in the L2 cache. A grid has
// less than 2^31 tiles, so that 32 bits divide them.
struct GemmTiles {
  int64_t row_tiles, output_tiles, groups;

  struct Tile {
    int64_t group, row, output;
  };

  constexpr int64_t count() const { return row_tiles * output_tiles * groups; }

  constexpr Tile at(uint32_t index) const {
    constexpr uint32_t kBand = 16;
    const auto rows = static_cast<uint32_t>(row_tiles);
    const auto outputs = static_cast<uint32_t>(output_tiles);
    const uint32_t group = index / (rows * outputs);
    const uint32_t in_group = index - group * (rows * outputs);
    const uint32_t band = in_group / (kBand * outputs);
    const uint32_t first = band * kBand;
    const uint32_t height = rows - first < kBand ? rows - first : kBand;
    const uint32_t in_band = in_group - first * outputs;
    const uint32_t output = in_band / height;
    return {group, first + in_band - output * height, output};
  }
};

constexpr int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr GemmTiles gemm_tiles(const GemmProblem& problem, int tile_rows, int tile_outputs) {
  return {divided_up(problem.rows(), tile_rows),
          divided_up(problem.shape.out_channels, tile_outputs), problem.shape.groups};
}

constexpr GemmTiles gemm_tiles(const GemmProblem& problem, const GemmPlan& plan) {
  return gemm_tiles(problem, plan.tile_rows, plan.tile_outputs);
}

// How many warps share out K: no more than it has steps.
int skinny_k_warps(const GemmProblem& problem, int tile_outputs);

GemmPlan gemm_plan(const GemmProblem& problem, const Device& device);

}  // namespace nncx::cuda
