#include "cuda/gemm_plan.h"

#include "cuda/gemm_sm90_plan.h"

namespace nncx::cuda {
namespace {

int piece_of(const GemmProblem& p) {
  for (const int piece : {16, 8, 4}) {
    if (p.channel_bytes % piece == 0 && p.input % piece == 0) return piece;
  }
  return 1;
}

// The wide tile reads A half as often. It is not worth columns without outputs, multiprocessors
// without tiles, or its code for rare channel counts; and CUDA cores are slower than any memory.
int sm80_tile_outputs(const GemmProblem& p, const Device& device) {
  const bool wastes = (p.shape.out_channels - 1) % 128 < 64;
  const bool fills = gemm_tiles(p, kSm80TileRows, 128).count() >= device.multiprocessors;
  const bool is_rare = piece_of(p) < 8;
  return device.path == Path::cuda_cores || wastes || !fills || is_rare ? 64 : 128;
}

// Four for a block that has a multiprocessor to itself, or three for each of two that hide each other's
// beginnings and ends, if they fit; never more than there are K tiles. For CUDA cores one: they have no
// asynchronous copies, and Turing's memory is better used by more blocks.
int sm80_stages(const GemmProblem& p, const Device& device, int tile_outputs) {
  if (device.path == Path::cuda_cores) return 1;
  const auto fit = [&](int shared_bytes) {
    int stages = 4;
    while (stages > 1 && sm80_shared_bytes(tile_outputs, stages) > shared_bytes) --stages;
    return stages;
  };
  const int shared = sm80_resident_blocks(tile_outputs) > 1 ? fit(device.shared_bytes / 2) : 0;
  const int stages = shared >= 3 ? shared : fit(device.shared_bytes);
  const int64_t k_tiles = std::max<int64_t>(divided_up(p.k_bytes(), kSm80TileBytes), 1);
  return static_cast<int>(std::min<int64_t>(stages, k_tiles));
}

GemmPlan sm80_plan(const GemmProblem& p, const Device& device) {
  const int tile_outputs = sm80_tile_outputs(p, device);
  const int stages = sm80_stages(p, device, tile_outputs);
  return {.kernel = device.path == Path::cuda_cores ? GemmKernel::cuda_cores : GemmKernel::sm80,
          .piece = piece_of(p),
          .tile_rows = kSm80TileRows,
          .tile_outputs = tile_outputs,
          .stages = stages,
          .shared_bytes = sm80_shared_bytes(tile_outputs, stages)};
}

GemmPlan sm90_plan(const GemmProblem& p, const Device& device) {
  const int tile_outputs = sm90_tile_outputs(p, device.multiprocessors);
  return {.kernel = GemmKernel::sm90,
          .piece = piece_of(p),
          .tile_rows = kSm90TileRows,
          .tile_outputs = tile_outputs,
          .stages = sm90_stages(tile_outputs),
          .shared_bytes = sm90_shared_bytes(tile_outputs)};
}

bool is_skinny(const GemmProblem& p) {
  return p.rows() <= kMostSkinnyRows && p.shape.taps == 1 && p.stride_h == 1 && p.stride_w == 1 &&
         p.padding_h == 0 && p.padding_w == 0;
}

// As few outputs one after another as possible, on a multiprocessor that runs several tiles at a time.
// Else wide tiles: each reads all of A.
int skinny_tile_outputs(const GemmProblem& p, const Device& device) {
  const int row_tiles = skinny_row_tiles(p.rows());
  const int64_t slots = int64_t{device.multiprocessors} * skinny_resident_blocks(row_tiles);
  const auto in_sequence = [&](int tile_outputs) {
    return divided_up(gemm_tiles(p, kMostSkinnyRows, tile_outputs).count(), slots) * tile_outputs;
  };
  const int widest = skinny_warps(row_tiles) * 4;
  int best = widest;
  for (int width = widest; width >= kSkinnyWarpOutputs; width /= 2) {
    if (in_sequence(width) < in_sequence(best)) best = width;
  }
  return best;
}

GemmPlan skinny_plan(const GemmProblem& p, const Device& device) {
  return {.kernel = GemmKernel::skinny,
          .piece = piece_of(p),
          .tile_rows = kMostSkinnyRows,
          .tile_outputs = skinny_tile_outputs(p, device),
          .stages = 0,
          .shared_bytes = 0};
}

}  // namespace

int skinny_k_warps(const GemmProblem& p, int tile_outputs) {
  const int most = skinny_warps(skinny_row_tiles(p.rows())) * kSkinnyWarpOutputs / tile_outputs;
  return static_cast<int>(std::clamp<int64_t>(divided_up(p.k_bytes(), kSkinnyStepBytes), 1, most));
}

GemmPlan gemm_plan(const GemmProblem& p, const Device& device) {
  if (is_skinny(p)) return skinny_plan(p, device);
  if (device.path == Path::sm90 && sm90_supports(p)) return sm90_plan(p, device);
  return sm80_plan(p, device);
}

}  // namespace nncx::cuda
