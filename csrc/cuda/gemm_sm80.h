// The GEMM for tensor cores from sm_80 on: cp.async, ldmatrix, mma.sync. Code that is compiled for
// less multiplies the same tiles with popc and dp4a.
//
// A block computes 128 output pixels x 64 or 128 output channels of one group, a warp 32 x 64 of
// them. K passes in tiles of 128 bytes through a ring of stages in shared memory, multiplied in steps
// of 32 bytes: as many as hold data, since K of a small layer is a step or three.
//
//   row r of a stage is 128 bytes, its 16-byte pieces permuted by r % 8, so that neither the copies
//   nor ldmatrix meet in a bank
//
// The rows of A are gathered as they are read (gemm_rows.h): a thread copies the same piece of several
// rows, so it computes one tap offset for a K tile. What pieces smaller than 4 bytes make up (channels
// like 3 or 7) is put together in registers.
//
// By the machine code, a K tile of the wide tile costs a warp 64 mma, 24 ldmatrix and, with the copies,
// 235 instructions (int8) or 275 (bits, which it counts): half of the 512 clocks that its mma take on an
// A100. There shared memory is as busy as the tensor cores, so the next step would be a warp of 64 x 64,
// in blocks of 256 x 128, which reads a third less. Not tried: none was at hand.
#pragma once

#include <algorithm>

#include "cuda/gemm_epilogue.h"
#include "cuda/gemm_plan.h"
#include "cuda/launch.h"

namespace nncx::cuda {

template <class Op, int kTileOutputs, int kPiece>
class Sm80Block {
 public:
  using Params = typename Op::Params;
  static constexpr int kThreads = sm80_threads(kTileOutputs);

  __device__ Sm80Block(const Params& params, const GemmTiles::Tile& tile, int stages)
      : p(params),
        tile(tile),
        channel_bytes(Op::weight(params.shape).channel_bytes),
        k_bytes(Op::weight(params.shape).k_bytes()),
        stages(stages),
        ring(dynamic_shared_memory()) {}

  __device__ void run() {
    locate_rows();
    if (k_bytes > 0) multiply();
    store();
  }

 private:
  static constexpr int kWarpRows = 32, kWarpOutputs = kChunkOutputs;
  static constexpr int kRowWarps = kSm80TileRows / kWarpRows;
  static constexpr int kStepBytes = 32;
  static constexpr int kAPiece = kPiece == 1 ? 16 : kPiece;  // of a K tile, that a thread loads
  static constexpr int kARowPieces = kSm80TileBytes / kAPiece, kBRowPieces = kSm80TileBytes / 16;
  static constexpr int kAStride = kThreads / kARowPieces, kBStride = kThreads / kBRowPieces;
  static constexpr int kChunks = kWarpRows / kChunkRows;
  static constexpr int kColumns = kWarpOutputs / 8;  // of 8 outputs, as mma has them

  const Params& p;
  const GemmTiles::Tile tile;
  const int64_t channel_bytes, k_bytes;
  const int stages;
  uint8_t* const ring;

  // As mma.sync holds them: with g = lane / 4, t = lane % 4, element i is of row g + 8 * (i / 2) of
  // the chunk and of output 2 * t + i % 2 of the column.
  int32_t sums[kChunks][kColumns][4] = {};
  int32_t bits[kChunks][2] = {};  // this lane's part of those in the rows g and g + 8

  // ---- Shared memory: the ring, and behind it what is known of the tile's rows. The sums of the
  // warps are staged in the ring when all is multiplied.

  __device__ RowOrigin* origins() const {
    return reinterpret_cast<RowOrigin*>(ring + sm80_ring_bytes(kTileOutputs, stages));
  }
  __device__ int32_t* row_bits() const {
    return reinterpret_cast<int32_t*>(origins() + kSm80TileRows);
  }
  __device__ uint8_t* a_stage(int slot) const {
    return ring + slot * sm80_stage_bytes(kTileOutputs);
  }
  __device__ uint8_t* b_stage(int slot) const {
    return a_stage(slot) + kSm80TileRows * kSm80TileBytes;
  }

  __device__ static int swizzled(int row, int byte) {
    return row * kSm80TileBytes + (byte ^ row % 8 * 16);
  }

  __device__ int64_t pixel_bytes() const { return p.shape.groups * channel_bytes; }
  __device__ int64_t first_row() const { return tile.row * kSm80TileRows; }
  __device__ int64_t first_output() const { return tile.output * kTileOutputs; }
  __device__ int64_t rows() const { return p.batch * p.out_height * p.out_width; }
  __device__ static int lane() { return threadIdx.x % 32; }
  __device__ static int warp() { return threadIdx.x / 32; }
  __device__ static int warp_row() { return warp() % kRowWarps * kWarpRows; }
  __device__ static int warp_output() { return warp() / kRowWarps * kWarpOutputs; }

  // ---- Loading

  __device__ void locate_rows() const {
    if (threadIdx.x < kSm80TileRows) {
      const int64_t row = first_row() + threadIdx.x;
      origins()[threadIdx.x] = row < rows() ? row_origin(p, pixel_bytes(), row) : kNoRow;
    }
    __syncthreads();
  }

  // `cursor` is at this thread's piece of the K tile, of which `bytes` are read.
  __device__ void load_a(uint8_t* stage, const TapCursor& cursor, int bytes) const {
    const int byte = threadIdx.x % kARowPieces * kAPiece;
    if (byte >= bytes) return;
    const uint8_t* from = input_of<Op>(p) + tile.group * channel_bytes;
    if constexpr (kPiece > 1) from += cursor.offset(p, pixel_bytes());
#pragma unroll 4
    for (int i = 0; i < kSm80TileRows / kAStride; ++i) {
      const int r = threadIdx.x / kARowPieces + i * kAStride;
      const RowOrigin row = origins()[r];
      uint8_t* to = stage + swizzled(r, byte);
      if constexpr (kPiece > 1) {
        ptx::cp_async<kPiece>(to, from + row.offset, cursor.is_inside(p, row));
      } else {
        *reinterpret_cast<uint4*>(to) = gather(from, cursor, row);
      }
    }
  }

  // 16 neighbouring bytes of a row, put together from single ones.
  __device__ uint4 gather(const uint8_t* from, TapCursor at, const RowOrigin& row) const {
    uint32_t words[4] = {};
    const uint8_t* tap = nullptr;
    bool is_inside = false;
#pragma unroll
    for (int i = 0; i < 16; ++i, at.advance(p, channel_bytes, 1)) {
      if (i == 0 || at.byte == 0) {
        is_inside = at.is_inside(p, row);
        tap = from + row.offset + at.offset(p, pixel_bytes()) - at.byte;
      }
      if (is_inside) words[i / 4] |= uint32_t{tap[at.byte]} << i % 4 * 8;
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
  }

  // A thread copies the same piece of every kBStride-th row, of which the first `rows` exist; the one
  // of the first is at `from`.
  __device__ void load_b(uint8_t* stage, const uint8_t* from, int rows, int bytes) const {
    const int byte = threadIdx.x % kBRowPieces * 16;
    if (byte >= bytes) return;
#pragma unroll
    for (int i = 0; i < kTileOutputs / kBStride; ++i) {
      const int r = threadIdx.x / kBRowPieces + i * kBStride;
      ptx::cp_async<16>(stage + swizzled(r, byte), from, i < rows);
      from += kBStride * Op::weight(p.shape).row_bytes();
    }
  }

  // ---- Multiplying

  __device__ static void wait_for_all_but(int groups) {
    if (groups <= 0) return ptx::cp_async_wait<0>();
    if (groups == 1) return ptx::cp_async_wait<1>();
    ptx::cp_async_wait<2>();
  }

  __device__ void multiply() {
    const auto tiles = static_cast<int>((k_bytes + kSm80TileBytes - 1) / kSm80TileBytes);
    const int last_bytes = static_cast<int>(k_bytes - int64_t{tiles - 1} * kSm80TileBytes);
    const auto bytes_of_tile = [&](int tile) {  // that its steps read
      return tile < tiles - 1 ? kSm80TileBytes
                              : (last_bytes + kStepBytes - 1) / kStepBytes * kStepBytes;
    };
    TapCursor cursor(p, channel_bytes, threadIdx.x % kARowPieces * kAPiece);
    const int64_t b_row = first_output() + threadIdx.x / kBRowPieces;
    const uint8_t* b =
        gemm_rows_of<Op>(p) +
        (tile.group * p.shape.out_channels + b_row) * Op::weight(p.shape).row_bytes() +
        threadIdx.x % kBRowPieces * 16;
    const auto b_rows = static_cast<int>(
        min((p.shape.out_channels - b_row + kBStride - 1) / kBStride, int64_t{kTileOutputs}));
    int slot = 1 % stages;  // of tile modulo stages
    for (int tile = 1 - stages; tile < tiles; ++tile) {
      if (tile >= 0) {
        if (stages > 1) wait_for_all_but(stages - 2);
        __syncthreads();  // this tile is there, and the slot before it has been read
      }
      const int next = tile + stages - 1;
      if (next < tiles) {
        const int next_slot = slot == 0 ? stages - 1 : slot - 1;
        load_a(a_stage(next_slot), cursor, bytes_of_tile(next));
        load_b(b_stage(next_slot), b, b_rows, bytes_of_tile(next));
        cursor.advance(p, channel_bytes, kSm80TileBytes);
        b += kSm80TileBytes;
      }
      ptx::cp_async_commit();  // also of nothing, so that groups count K tiles
      if (stages == 1) {
        wait_for_all_but(0);
        __syncthreads();
      }
      if (tile >= 0) multiply_tile(a_stage(slot), b_stage(slot), bytes_of_tile(tile));
      if (++slot == stages) slot = 0;
    }
    __syncthreads();  // the ring is free
  }

  __device__ void multiply_tile(const uint8_t* a, const uint8_t* b, int bytes) {
    if (!ptx::compiled_for(80)) {
#pragma unroll 1
      for (int byte = 0; byte < bytes; byte += 16) multiply_cores(a, b, byte);
    } else if (bytes == kSm80TileBytes) {
#pragma unroll
      for (int byte = 0; byte < kSm80TileBytes; byte += kStepBytes) multiply_mma(a, b, byte);
    } else {
#pragma unroll 1
      for (int byte = 0; byte < bytes; byte += kStepBytes) multiply_mma(a, b, byte);
    }
  }

  __device__ void multiply_mma(const uint8_t* a, const uint8_t* b, int byte) {
    uint32_t rows[kChunks][4];
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const int r = warp_row() + i * kChunkRows + lane() % 16;
      ptx::ldmatrix_x4(rows[i], a + swizzled(r, byte + lane() / 16 * 16));
      if constexpr (Op::kCountsBits) {
        bits[i][0] += __popc(rows[i][0]) + __popc(rows[i][2]);
        bits[i][1] += __popc(rows[i][1]) + __popc(rows[i][3]);
      }
    }
#pragma unroll
    for (int j = 0; j < kColumns; j += 2) {
      uint32_t outputs[4];
      const int r = warp_output() + j * 8 + lane() / 16 * 8 + lane() % 8;
      ptx::ldmatrix_x4(outputs, b + swizzled(r, byte + lane() / 8 % 2 * 16));
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t column[2] = {outputs[2 * half], outputs[2 * half + 1]};
#pragma unroll
        for (int i = 0; i < kChunks; ++i) Op::mma(sums[i][j + half], rows[i], column);
      }
    }
  }

  // 16 bytes of K: this lane's 4 rows x 16 outputs.
  __device__ void multiply_cores(const uint8_t* a, const uint8_t* b, int byte) {
    const int g = lane() / 4, t = lane() % 4;
    uint4 rows[2 * kChunks];
#pragma unroll
    for (int i = 0; i < 2 * kChunks; ++i) {
      const uint8_t* row = a + swizzled(warp_row() + g + 8 * i, byte);
      rows[i] = *reinterpret_cast<const uint4*>(row);
      if constexpr (Op::kCountsBits) {
        bits[i / 2][i % 2] += __popc(reinterpret_cast<const uint32_t*>(row)[t]);
      }
    }
#pragma unroll
    for (int j = 0; j < 2 * kColumns; ++j) {
      const int r = warp_output() + j / 2 * 8 + 2 * t + j % 2;
      const uint4 output = *reinterpret_cast<const uint4*>(b + swizzled(r, byte));
#pragma unroll
      for (int i = 0; i < 2 * kChunks; ++i) {
        int32_t& sum = sums[i / 2][j / 2][i % 2 * 2 + j % 2];
        sum = Op::add_products(rows[i].x, output.x, sum);
        sum = Op::add_products(rows[i].y, output.y, sum);
        sum = Op::add_products(rows[i].z, output.z, sum);
        sum = Op::add_products(rows[i].w, output.w, sum);
      }
    }
  }

  // ---- Storing

  __device__ void store() {
    auto* staged = reinterpret_cast<int32_t*>(ring) + warp() * kChunkRows * kChunkPitch;
    int32_t* staged_bits = row_bits() + warp() * kChunkRows;
    const int64_t output = first_output() + warp_output();
    const auto outputs =
        static_cast<int>(min(p.shape.out_channels - output, static_cast<int64_t>(kWarpOutputs)));
    if (outputs <= 0) return;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const int64_t row = first_row() + warp_row() + i * kChunkRows;
      const int count = static_cast<int>(min(rows() - row, static_cast<int64_t>(kChunkRows)));
      if (count <= 0) return;
      if constexpr (Op::kCountsBits) {
        for (int32_t& count : bits[i]) {
          count += __shfl_xor_sync(kAllLanes, count, 1);
          count += __shfl_xor_sync(kAllLanes, count, 2);
        }
      }
      if constexpr (Op::kHasSigns) {
        if (p.epilogue.threshold) {
          store_signs<Op>(p, row, count, static_cast<int>(tile.group), output, outputs, sums[i],
                          bits[i]);
          continue;
        }
      }
      stage_chunk(i, staged, staged_bits);
      __syncwarp();
      store_sums<Op, 2>(p, row, count, static_cast<int>(tile.group), output, outputs, staged,
                        kChunkPitch, staged_bits);
      __syncwarp();
    }
  }

  __device__ void stage_chunk(int i, int32_t* staged, int32_t* staged_bits) const {
    const int g = lane() / 4, t = lane() % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int32_t* row = staged + (g + 8 * half) * kChunkPitch + 2 * t;
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        *reinterpret_cast<int2*>(row + j * 8) =
            make_int2(sums[i][j][2 * half], sums[i][j][2 * half + 1]);
      }
      if (Op::kCountsBits && t == 0) staged_bits[g + 8 * half] = bits[i][half];
    }
  }
};

template <class Op, int kTileOutputs, int kPiece>
__global__ void __launch_bounds__(sm80_threads(kTileOutputs), sm80_resident_blocks(kTileOutputs))
    gemm_sm80(const __grid_constant__ typename Op::Params p, const GemmTiles tiles, int stages) {
  if (kTileOutputs > 64 && !ptx::compiled_for(80)) return;  // which the shape rule never asks for
  Sm80Block<Op, kTileOutputs, kPiece>(p, tiles.at(blockIdx.x), stages).run();
}

template <class Op>
int run_sm80(const typename Op::Params& p, const GemmProblem& problem, const GemmPlan& plan,
             cudaStream_t stream) {
  const GemmTiles tiles = gemm_tiles(problem, plan);
  if (tiles.count() >= int64_t{1} << 31) return cudaErrorInvalidConfiguration;
  const auto run = [&](auto kernel) {
    return launch(kernel, static_cast<unsigned>(tiles.count()), sm80_threads(plan.tile_outputs),
                  plan.shared_bytes, stream, p, tiles, plan.stages);
  };
  if (plan.tile_outputs == 128) {
    return plan.piece == 16 ? run(gemm_sm80<Op, 128, 16>) : run(gemm_sm80<Op, 128, 8>);
  }
  switch (plan.piece) {
    case 16:
      return run(gemm_sm80<Op, 64, 16>);
    case 8:
      return run(gemm_sm80<Op, 64, 8>);
    case 4:
      return run(gemm_sm80<Op, 64, 4>);
    default:
      return run(gemm_sm80<Op, 64, 1>);
  }
}

}  // namespace nncx::cuda
