// GEMM and implicit-GEMM convolution on sm_90a: TMA, mbarriers, wgmma.
//
//   blocks    one for each multiprocessor; they stay, and block b takes the tiles b, b + blocks, ...
//   threads   a warpgroup that loads and two that multiply, each 64 rows x all outputs of a tile; the
//             loading one gives its registers to the others
//   stages    192 KB of shared memory, a ring. `full` tells that a stage's bytes are there, `empty`
//             that all eight warps are done with it. Loading runs ahead into the next tiles while
//             this one's sums leave.
//   k         in blocks of 128 bytes, which are four steps of wgmma
//
// B lies in a stage as [outputs][128 bytes] with the 128-byte swizzle. A lies there in parts of `span`
// bytes, [128 / span][128 rows][span] with the swizzle of that span (InputTile); span is 128 but for
// im2col of narrow taps.
#pragma once

#include <algorithm>
#include <bit>

#include "cuda/device.h"
#include "cuda/gemm_sm90_epilogue.h"
#include "cuda/gemm_sm90_plan.h"
#include "cuda/launch.h"
#include "cuda/ptx_sm90.h"
#include "cuda/tensor_map.h"

namespace nncx::cuda {

constexpr int kWarpgroup = 128;
constexpr int kSm90Threads = 3 * kWarpgroup, kMultiplyThreads = 2 * kWarpgroup;
constexpr int kLoadRegisters = 56, kMultiplyRegisters = 224;
constexpr int kStepBytes = 32;  // of k, in one wgmma

// A warpgroup that wants more registers waits until others have given them back, forever if there are
// not so many: a block has what it began with, as many for each thread as 64 K allow, in eights.
static_assert(kLoadRegisters + 2 * kMultiplyRegisters <= 3 * (65536 / kSm90Threads / 8 * 8));

// What is the same for all tiles.
struct Sm90Problem {
  GemmTiles tiles;
  InputLoader loader;
  int piece;       // that gathering copies
  int span_shift;  // span = 1 << span_shift
  int rows, outputs, k_bytes, channel_bytes;
  Sm90Borders borders;

  constexpr int span() const { return 1 << span_shift; }
};

struct Sm90Maps {
  TensorMap input;  // unused where it is gathered
  TensorMap weight;
};

// The part of A that a stage holds.
struct InputTile {
  int span_shift;

  // Where byte k of row 0 lies, but for the swizzle.
  constexpr uint32_t part(uint32_t k) const {
    const uint32_t span = 1u << span_shift;
    return (k >> span_shift) * (kSm90TileRows * span) + (k & (span - 1));
  }

  // Where it lies. A swizzle xors the number of a chunk of 16 bytes in its span with that of its
  // 128-byte line.
  constexpr uint32_t chunk(uint32_t row, uint32_t k) const {
    const uint32_t offset = part(k) + (row << span_shift);
    const uint32_t mask = (1u << (span_shift - 4)) - 1;
    return offset ^ (offset >> 7 & mask) << 4;
  }
};

// A wgmma descriptor of an operand in shared memory: in units of 16 bytes where it starts and where
// its next 8 rows do, and the swizzle: 1, 2, 3 for 128, 64, 32 bytes. Since addresses are swizzled,
// not offsets, the operand that lies `bytes` further on differs in its start alone.
class Operand {
 public:
  __device__ Operand(const void* shared, int span_shift)
      : start_(static_cast<uint32_t>(__cvta_generic_to_shared(shared)) / 16),
        layout_((8u - span_shift) << 30 | (8u << span_shift) / 16) {}

  __device__ uint64_t at(uint32_t bytes) const {
    return uint64_t{layout_} << 32 | (start_ + bytes / 16);
  }

 private:
  uint32_t start_, layout_;
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(NNCX_EMULATED)

template <int kOutputs>
class SharedMemory {
 public:
  static constexpr int kStages = sm90_stages(kOutputs);

  __device__ uint8_t* input(int stage) const { return bytes_ + stage * kStageBytes; }
  __device__ uint8_t* weight(int stage) const {
    return input(stage) + kSm90TileRows * kSm90TileBytes;
  }
  __device__ int32_t* table() const {
    return reinterpret_cast<int32_t*>(bytes_ + kStages * kStageBytes);
  }
  // Of one multiplying warp.
  __device__ int32_t* scratch(int warp) const {
    return table() + kSm90TableBytes / sizeof(int32_t) + warp * kChunkRows * kSm90ScratchPitch;
  }
  __device__ int32_t* row_bits(int warp) const { return scratch(kSm90Warps) + warp * kChunkRows; }
  __device__ ptx::Barrier* full(int stage) const {
    return reinterpret_cast<ptx::Barrier*>(row_bits(kSm90Warps)) + stage;
  }
  __device__ ptx::Barrier* empty(int stage) const { return full(kStages) + stage; }

 private:
  static constexpr int kStageBytes = sm90_stage_bytes(kOutputs);
  uint8_t* bytes_ = dynamic_shared_memory();
};

// Goes round the stages; a barrier's phases alternate with the rounds.
template <int kStages>
struct RingPosition {
  int stage = 0, parity = 0;

  __device__ void advance() {
    if (++stage < kStages) return;
    stage = 0;
    parity ^= 1;
  }

  __device__ int last() const { return stage == 0 ? kStages - 1 : stage - 1; }
};

// ------------------------------------------------------------------------------------------------
// Loading

// How many times a stage is arrived at until it is full: by the thread that starts TMA, and where A
// is gathered by every thread that does.
__device__ constexpr int full_arrivals(InputLoader loader) {
  return loader == InputLoader::gather ? 1 + kWarpgroup : 1;
}

// Fills stages in the order in which they are used, tile after tile: with TMA one thread does it all.
template <class Op, int kOutputs>
class Loader {
 public:
  using Params = typename Op::Params;
  using Memory = SharedMemory<kOutputs>;

  __device__ Loader(const Params& p, const Sm90Problem& problem, const Sm90Maps& maps)
      : p_(p), problem_(problem), maps_(maps) {}

  __device__ void run() {
    if (problem_.loader == InputLoader::gather) {
      if (problem_.piece == 16) return gather<16>();
      if (problem_.piece == 8) return gather<8>();
      return gather<4>();
    }
    if (threadIdx.x != 0) return;
    ptx::tma_prefetch(&maps_.input);
    ptx::tma_prefetch(&maps_.weight);
    problem_.loader == InputLoader::tma ? load_matrix() : load_images();
  }

 private:
  using Tile = GemmTiles::Tile;
  static constexpr int kWeightBytes = kOutputs * kSm90TileBytes;

  const Params& p_;
  const Sm90Problem& problem_;
  const Sm90Maps& maps_;
  const Memory memory_;
  RingPosition<Memory::kStages> at_;

  // begin(tile), then load(tile, k) for each of its blocks, into a stage that is free.
  template <class Begin, class Load>
  __device__ void for_each_block(const Begin& begin, const Load& load) {
    const auto tiles = static_cast<uint32_t>(problem_.tiles.count());
    for (uint32_t index = blockIdx.x; index < tiles; index += gridDim.x) {
      const Tile tile = problem_.tiles.at(index);
      begin(tile);
      for (int k = 0; k < problem_.k_bytes; k += kSm90TileBytes) {
        ptx::barrier_wait(memory_.empty(at_.stage), at_.parity ^ 1);
        load(tile, k);
        at_.advance();
      }
    }
  }

  // Arrives, and lets `input_bytes` and the weight's follow.
  __device__ void load_weight(const Tile& tile, int k, int input_bytes) {
    ptx::Barrier* full = memory_.full(at_.stage);
    ptx::barrier_arrive_expect(full, input_bytes + kWeightBytes);
    const auto row =
        static_cast<int>(tile.group) * problem_.outputs + static_cast<int>(tile.output) * kOutputs;
    ptx::tma_load_2d(memory_.weight(at_.stage), &maps_.weight, full, k, row);
  }

  __device__ void load_matrix() {
    for_each_block([](const Tile&) {},
                   [&](const Tile& tile, int k) {
                     load_weight(tile, k, kSm90TileRows * kSm90TileBytes);
                     const auto x = static_cast<int>(tile.group) * problem_.channel_bytes + k;
                     const auto y = static_cast<int>(tile.row) * kSm90TileRows;
                     ptx::tma_load_2d(memory_.input(at_.stage), &maps_.input,
                                      memory_.full(at_.stage), x, y);
                   });
  }

  // As many columns as k has spans left: a stage's last ones keep old bytes, which meet zeros of B.
  __device__ void load_images() {
    const int span = problem_.span();
    int w, h, n;
    TapCursor cursor(p_, problem_.channel_bytes, 0);
    for_each_block(
        [&](const Tile& tile) {
          const OutputPixel first = output_pixel(p_, tile.row * kSm90TileRows);
          w = static_cast<int>(first.x * p_.stride_w - p_.padding_w);
          h = static_cast<int>(first.y * p_.stride_h - p_.padding_h);
          n = static_cast<int>(first.n);
          cursor = TapCursor(p_, problem_.channel_bytes, 0);
        },
        [&](const Tile& tile, int k) {
          const int bytes = min(problem_.k_bytes - k, kSm90TileBytes);
          load_weight(tile, k, kSm90TileRows * bytes);
          const auto c = static_cast<int>(tile.group) * problem_.channel_bytes;
          uint8_t* to = memory_.input(at_.stage);
          for (int done = 0; done < bytes; done += span, to += kSm90TileRows * span) {
            ptx::tma_load_im2col(to, &maps_.input, memory_.full(at_.stage),
                                 c + static_cast<int>(cursor.byte), w, h, n,
                                 static_cast<uint16_t>(cursor.x * p_.dilation_w),
                                 static_cast<uint16_t>(cursor.y * p_.dilation_h));
            cursor.advance(p_, problem_.channel_bytes, span);
          }
        });
  }

  // A warp has 32 rows of the tile. Its lanes take the pieces of one row side by side, then those of
  // the next; the origins of the rows lie one to a lane.
  template <int kPiece>
  __device__ void gather() {
    constexpr int kRowLanes = kSm90TileBytes / kPiece, kRowsAtOnce = 32 / kRowLanes;
    const int lane = threadIdx.x % 32, first_row = threadIdx.x / 32 * 32;
    const int lane_k = lane % kRowLanes * kPiece;
    const InputTile layout{problem_.span_shift};
    const int64_t pixel_bytes = p_.shape.groups * problem_.channel_bytes;
    RowOrigin own;
    const uint8_t* input;
    TapCursor cursor(p_, problem_.channel_bytes, lane_k);
    for_each_block(
        [&](const Tile& tile) {
          const int64_t row = tile.row * kSm90TileRows + first_row + lane;
          own = row < problem_.rows ? row_origin(p_, pixel_bytes, row) : kNoRow;
          input = input_of<Op>(p_) + tile.group * problem_.channel_bytes;
          cursor = TapCursor(p_, problem_.channel_bytes, lane_k);
        },
        [&](const Tile& tile, int k) {
          if (threadIdx.x == 0) load_weight(tile, k, 0);
          uint8_t* to = memory_.input(at_.stage);
          const uint8_t* from = input + cursor.offset(p_, pixel_bytes);
          for (int r = lane / kRowLanes; r < 32; r += kRowsAtOnce) {
            const RowOrigin row = shuffle(own, r);
            ptx::cp_async<kPiece>(to + layout.chunk(first_row + r, lane_k & ~15) + lane_k % 16,
                                  from + row.offset, cursor.is_inside(p_, row));
          }
          ptx::cp_async_arrive(memory_.full(at_.stage));
          cursor.advance(p_, problem_.channel_bytes, kSm90TileBytes);
        });
    ptx::cp_async_wait<0>();
  }

  __device__ static RowOrigin shuffle(const RowOrigin& own, int lane) {
    return {__shfl_sync(kAllLanes, own.offset, lane), __shfl_sync(kAllLanes, own.y, lane),
            __shfl_sync(kAllLanes, own.x, lane)};
  }
};

// ------------------------------------------------------------------------------------------------
// Multiplying

template <class Op, int kOutputs>
__device__ inline void multiply(int32_t (&sums)[kOutputs / 2], uint64_t a, uint64_t b,
                                bool accumulate) {
  if constexpr (Op::kCountsBits) {
    ptx::wgmma_b1_and<kOutputs>(sums, a, b, accumulate);
  } else {
    ptx::wgmma_s8<kOutputs>(sums, a, b, accumulate);
  }
}

__device__ inline uint32_t popcount(const uint4& bits) {
  return __popc(bits.x) + __popc(bits.y) + __popc(bits.z) + __popc(bits.w);
}

// The bits that are 1 in the 16 rows of a warp. A lane counts in rows lane / 4 and lane / 4 + 8, two
// of their eight chunks; eight lanes that read at the same time meet eight different banks.
class RowBits {
 public:
  __device__ RowBits(const InputTile& layout, int first_row) {
    const int lane = threadIdx.x % 32;
    for (int i = 0; i < 2; ++i) {
      const int chunk = lane % 4 + (lane / 4 + i) % 2 * 4;
      k_[i] = chunk * 16;
      for (int half = 0; half < 2; ++half) {
        offset_[half][i] = layout.chunk(first_row + lane / 4 + 8 * half, k_[i]);
      }
    }
  }

  // Of the first `bytes` of k in a stage.
  __device__ void count(const uint8_t* input, int bytes) {
    for (int i = 0; i < 2; ++i) {
      if (k_[i] >= bytes) continue;
      for (int half = 0; half < 2; ++half) {
        count_[half] += popcount(*reinterpret_cast<const uint4*>(input + offset_[half][i]));
      }
    }
  }

  // Writes those of all rows, and counts from 0.
  __device__ void finish(int32_t* row_bits) {
    for (int half = 0; half < 2; ++half) {
      uint32_t count = count_[half];
      count += __shfl_xor_sync(kAllLanes, count, 1);
      count += __shfl_xor_sync(kAllLanes, count, 2);
      row_bits[threadIdx.x % 32 / 4 + 8 * half] = static_cast<int32_t>(count);
      count_[half] = 0;
    }
  }

 private:
  int k_[2];
  uint32_t offset_[2][2];
  uint32_t count_[2] = {};
};

template <class Op, int kOutputs>
class Multiplier {
 public:
  using Params = typename Op::Params;
  using Memory = SharedMemory<kOutputs>;

  __device__ Multiplier(const Params& p, const Sm90Problem& problem)
      : p_(p),
        problem_(problem),
        layout_{problem.span_shift},
        warp_(static_cast<int>(threadIdx.x - kWarpgroup) / 32),
        input_(memory_.input(0) + (warp_ / 4 * 64 << problem.span_shift), problem.span_shift),
        weight_(memory_.weight(0), 7),
        bits_(layout_, warp_ * kChunkRows),
        table_(memory_.table(), problem.borders) {}

  __device__ void run() {
    const auto tiles = static_cast<uint32_t>(problem_.tiles.count());
    for (uint32_t index = blockIdx.x; index < tiles; index += gridDim.x) {
      const GemmTiles::Tile tile = problem_.tiles.at(index);
      int32_t sums[kOutputs / 2];
      prepare(tile);
      multiply_tile(sums);
      ptx::wgmma_wait<0>();
      release(at_.last());
      store_tile(tile, sums);
    }
  }

 private:
  static constexpr int kStageBytes = sm90_stage_bytes(kOutputs);

  const Params& p_;
  const Sm90Problem& problem_;
  const Memory memory_;
  const InputTile layout_;
  const int warp_;
  const Operand input_, weight_;  // of the warpgroup, in stage 0
  RowBits bits_;
  const ChannelTable<Op, kOutputs> table_;
  int filled_ = -1;  // the first output that the table is of
  bool is_new_ = false;
  RingPosition<Memory::kStages> at_;

  // wgmma of a block starts while that of the one before may still run; when that is known to be done,
  // its stage is given back. The last block is left running. The compiler knows the number of steps:
  // where it does not, ptxas lets each of them wait for the one before.
  __device__ void multiply_tile(int32_t (&sums)[kOutputs / 2]) {
    int k = 0;
    for (; k + kSm90TileBytes <= problem_.k_bytes; k += kSm90TileBytes) {
      start_block<4>(sums, k > 0);
      finish_block(kSm90TileBytes, k > 0);
    }
    const int left = problem_.k_bytes - k;
    if (left > 0) {
      if (left > 3 * kStepBytes) {
        start_block<4>(sums, k > 0);
      } else if (left > 2 * kStepBytes) {
        start_block<3>(sums, k > 0);
      } else if (left > kStepBytes) {
        start_block<2>(sums, k > 0);
      } else {
        start_block<1>(sums, k > 0);
      }
      finish_block(left, k > 0);
    }
  }

  template <int kSteps>
  __device__ void start_block(int32_t (&sums)[kOutputs / 2], bool accumulate) const {
    ptx::barrier_wait(memory_.full(at_.stage), at_.parity);
    if (problem_.loader == InputLoader::gather) ptx::fence_async();
    const uint32_t stage = at_.stage * kStageBytes;
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kSteps * kStepBytes; k += kStepBytes) {
      multiply<Op, kOutputs>(sums, input_.at(stage + layout_.part(k)), weight_.at(stage + k),
                             k > 0 || accumulate);
    }
    ptx::wgmma_commit();
  }

  __device__ void finish_block(int bytes, bool has_last) {
    if constexpr (Op::kCountsBits) bits_.count(memory_.input(at_.stage), bytes);
    ptx::wgmma_wait<1>();
    if (has_last) release(at_.last());
    at_.advance();
  }

  __device__ void release(int stage) const {
    __syncwarp();
    if (threadIdx.x % 32 == 0) ptx::barrier_arrive(memory_.empty(stage));
  }

  // The table, if the next tile has other outputs than the last one.
  __device__ void prepare(const GemmTiles::Tile& tile) {
    const int first = first_output(tile);
    is_new_ = first != filled_;
    if (!is_new_) return;
    ptx::named_barrier(1, kMultiplyThreads);  // all are done with the last one
    table_.fill(p_, first, outputs_of(tile), static_cast<int>(threadIdx.x) - kWarpgroup,
                kMultiplyThreads);
    filled_ = first;
  }

  // Among those of all groups, less than 2^31.
  __device__ int first_output(const GemmTiles::Tile& tile) const {
    return static_cast<int>(tile.group * problem_.outputs + tile.output * kOutputs);
  }

  __device__ int outputs_of(const GemmTiles::Tile& tile) const {
    return min(problem_.outputs - static_cast<int>(tile.output) * kOutputs, kOutputs);
  }

  // A warp's 16 rows.
  __device__ void store_tile(const GemmTiles::Tile& tile, const int32_t (&sums)[kOutputs / 2]) {
    int32_t* row_bits = memory_.row_bits(warp_);
    if constexpr (Op::kCountsBits) bits_.finish(row_bits);
    if (is_new_) ptx::named_barrier(1, kMultiplyThreads);
    __syncwarp();
    const int64_t first_row = tile.row * kSm90TileRows + warp_ * kChunkRows;
    const auto rows = static_cast<int>(min(problem_.rows - first_row, int64_t{kChunkRows}));
    if (rows > 0) {
      TileEnd<Op, kOutputs>(p_, table_, problem_.borders, first_row, rows,
                            static_cast<int>(tile.group), filled_, outputs_of(tile),
                            memory_.scratch(warp_), row_bits)
          .store(sums);
    }
    __syncwarp();
  }
};

#endif

// ------------------------------------------------------------------------------------------------

template <class Op, int kOutputs>
__global__ void __launch_bounds__(kSm90Threads, 1)
    gemm_sm90(const __grid_constant__ typename Op::Params p,
              const __grid_constant__ Sm90Problem problem, const __grid_constant__ Sm90Maps maps) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(NNCX_EMULATED)
  const SharedMemory<kOutputs> memory;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < memory.kStages; ++stage) {
      ptx::barrier_init(memory.full(stage), full_arrivals(problem.loader));
      ptx::barrier_init(memory.empty(stage), kSm90Warps);
    }
    ptx::barrier_fence_init();
  }
  __syncthreads();
  if (threadIdx.x < kWarpgroup) {
    ptx::registers_decrease<kLoadRegisters>();
    Loader<Op, kOutputs>(p, problem, maps).run();
  } else {
    ptx::registers_increase<kMultiplyRegisters>();
    Multiplier<Op, kOutputs>(p, problem).run();
  }
#endif
}

template <class Op>
int encode_maps(const typename Op::Params& p, const GemmProblem& problem, const GemmPlan& plan,
                InputLoader loader, Sm90Maps& maps) {
  const TiledMap weight =
      weight_matrix(Op::weight(p.shape), p.weight + kGemmRowsOffset, plan.tile_outputs);
  if (const int error = encode_tiled(maps.weight, weight)) return error;
  switch (loader) {
    case InputLoader::tma:
      return encode_tiled(maps.input, input_matrix(problem));
    case InputLoader::im2col:
      return encode_im2col(maps.input, input_images(problem));
    case InputLoader::gather:
      return cudaSuccess;
  }
  return cudaErrorInvalidValue;
}

template <class Op>
int run_sm90(const typename Op::Params& p, const GemmProblem& problem, const GemmPlan& plan,
             const Device& device, cudaStream_t stream) {
  const InputLoader loader = sm90_loader(problem);
  const int span = loader == InputLoader::im2col ? im2col_span(problem) : kSm90TileBytes;
  const Sm90Problem all{gemm_tiles(problem, plan),
                        loader,
                        plan.piece,
                        std::countr_zero(static_cast<unsigned>(span)),
                        static_cast<int>(problem.rows()),
                        static_cast<int>(p.shape.out_channels),
                        static_cast<int>(problem.k_bytes()),
                        static_cast<int>(problem.channel_bytes),
                        sm90_borders(problem)};
  Sm90Maps maps{};
  if (const int error = encode_maps<Op>(p, problem, plan, loader, maps)) return error;
  const auto blocks =
      static_cast<unsigned>(std::min<int64_t>(all.tiles.count(), device.multiprocessors));
  const auto run = [&](auto kernel) {
    return launch(kernel, blocks, kSm90Threads, plan.shared_bytes, stream, p, all, maps);
  };
  switch (plan.tile_outputs) {
    case 64:
      return run(gemm_sm90<Op, 64>);
    case 128:
      return run(gemm_sm90<Op, 128>);
  }
  return run(gemm_sm90<Op, 256>);
}

}  // namespace nncx::cuda
