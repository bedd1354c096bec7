// codebook_conv2d for any shape: an implicit GEMM in float32 on the CUDA cores. (Tensor cores would
// round the activations or the codebook to fewer bits than the op promises.)
//
// A block computes 64 output pixels x 64 outputs of one group, a thread 8 x 4 of them, in registers.
// The k's come 16 at a time: each thread fetches 8 terms of one pixel and the codes of 8 weights of
// one output while the 16 before are multiplied, and writes them as floats to shared memory. An
// output is summed in the order of its k's.
//
// Codebooks of up to 4 bits wait in shared memory, entry by entry, in a copy for each output: lanes
// are outputs, so that they never meet in a bank. Longer ones are looked up through L1.
#pragma once

#include "cuda/codebook_store.h"
#include "cuda/codebook_weight.h"
#include "cuda/launch.h"

namespace nncx::cuda {

constexpr int kTile = 64;       // pixels, and outputs
constexpr int kTileTerms = 16;  // k's
constexpr int kTileThreads = 128;
constexpr int kTableBits = 4;

struct CodebookTiles {
  CodebookConv2dParams params;
  CodebookWeight weight;
  unsigned outputs;  // tiles of a group
  bool is_wide;      // 8 terms of a pixel lie side by side, 16-byte aligned
};

template <class T>
class CodebookTile {
 public:
  __device__ explicit CodebookTile(const CodebookTiles& tiles, int64_t pixel_tile, unsigned column)
      : t_(tiles),
        p_(tiles.params),
        group_(column / tiles.outputs),
        first_output_(int64_t{column % tiles.outputs} * kTile),
        first_pixel_(pixel_tile * kTile),
        fetched_term_(static_cast<int>(threadIdx.x) / kTile * kFetched),
        cursor_(p_, max(p_.shape.channels, int64_t{1}), fetched_term_) {
    const int64_t group_outputs = p_.shape.out_channels;
    const int64_t pixel = first_pixel_ + fetched_row();
    row_ = pixel < pixels() ? row_origin(p_, pixel_terms(), pixel) : kNoRow;
    // beyond the last output it reads the last one's
    const int64_t output = min(first_output_ + fetched_row(), group_outputs - 1);
    const int64_t block = group_ * t_.weight.blocks() + output / kCodesBlock;
    codes_ = p_.weight + kCodesOffset + block * t_.weight.block_bytes() +
             output % kCodesBlock * kCodesStepBytes;
    codebook_ = p_.codebook + (group_ * group_outputs + output) * p_.codebook_stride;
  }

  __device__ void run() {
    fill_table();
    fill_offsets();
    __syncthreads();
    multiply_all();
    stage_sums();
    __syncthreads();
    store();
  }

 private:
  static constexpr int kFetched = 8;
  static constexpr int kPixels = 8, kOutputs = 4;  // of a thread
  static constexpr int kPitch = kTile + 1;         // of the sums

  struct Memory {
    float tiles[kTile * kPitch];  // the tiles that are multiplied, then the sums
    float table[kTile << kTableBits];
    int64_t offsets[kTile];  // of the pixels in the output
  };

  const CodebookTiles& t_;
  const CodebookConv2dParams& p_;
  const int64_t group_, first_output_, first_pixel_;
  const int fetched_term_;
  TapCursor cursor_;
  RowOrigin row_;
  const uint8_t* codes_;
  const float* codebook_;
  float fetched_[kFetched];
  uint64_t fetched_codes_;
  float sums_[kPixels][kOutputs] = {};

  __device__ static Memory& memory() {
    __shared__ __align__(16) Memory memory;
    return memory;
  }

  __device__ static int fetched_row() { return static_cast<int>(threadIdx.x) % kTile; }
  __device__ int64_t pixels() const { return p_.batch * p_.out_height * p_.out_width; }
  __device__ int64_t pixel_terms() const { return p_.shape.groups * p_.shape.channels; }
  __device__ int terms() const { return static_cast<int>(t_.weight.terms); }
  __device__ bool has_table() const { return p_.bits <= kTableBits; }

  // [term][pixel], [term][output]
  __device__ static float* pixel_tile(int stage) {
    return memory().tiles + stage * 2 * kTileTerms * kTile;
  }
  __device__ static float* weight_tile(int stage) { return pixel_tile(stage) + kTileTerms * kTile; }

  __device__ void fill_table() const {
    if (!has_table()) return;
    for (int code = fetched_term_ / kFetched; code < 1 << p_.bits; code += kTileThreads / kTile) {
      memory().table[code * kTile + fetched_row()] = codebook_[code];
    }
  }

  __device__ void fill_offsets() const {
    if (threadIdx.x >= kTile) return;
    memory().offsets[threadIdx.x] = output_offset(p_, first_pixel_ + threadIdx.x);
  }

  // ---- From global memory to registers

  __device__ void fetch(int k) {
    fetch_codes(k + fetched_term_);
    const T* from = static_cast<const T*>(p_.input) + group_ * p_.shape.channels + row_.offset;
    if (t_.is_wide) {
      fetch_eight(from);
    } else {
      TapCursor cursor = cursor_;
      for (int i = 0; i < kFetched; ++i) {
        const bool is_inside = cursor.is_inside(p_, row_);
        fetched_[i] = is_inside ? to_float(from[cursor.offset(p_, pixel_terms())]) : 0.0f;
        cursor.advance(p_, p_.shape.channels, 1);
      }
    }
    cursor_.advance(p_, p_.shape.channels, kTileTerms);
  }

  __device__ void fetch_eight(const T* from) {
    union {
      uint4 pieces[kFetched * sizeof(T) / 16];
      T numbers[kFetched];
    } eight = {};
    if (cursor_.is_inside(p_, row_)) {
      const auto* pieces = reinterpret_cast<const uint4*>(from + cursor_.offset(p_, pixel_terms()));
#pragma unroll
      for (int i = 0; i < int{sizeof eight.pieces / 16}; ++i) eight.pieces[i] = pieces[i];
    }
#pragma unroll
    for (int i = 0; i < kFetched; ++i) fetched_[i] = to_float(eight.numbers[i]);
  }

  // k is a multiple of 8, and steps are too.
  __device__ void fetch_codes(int k) {
    const int slot_log2 = t_.weight.slot_log2, step_terms = t_.weight.step_terms();
    const uint8_t* from = codes_ + int64_t{k / step_terms} * (kCodesBlock * kCodesStepBytes) +
                          ((k & (step_terms - 1)) << slot_log2) / 8;
    switch (slot_log2) {
      case 0:
        fetched_codes_ = *from;
        break;
      case 1:
        fetched_codes_ = *reinterpret_cast<const uint16_t*>(from);
        break;
      case 2:
        fetched_codes_ = *reinterpret_cast<const uint32_t*>(from);
        break;
      default:
        fetched_codes_ = *reinterpret_cast<const uint64_t*>(from);
    }
  }

  // ---- From registers to shared memory

  // A k beyond the last one is 0 times 0: its code may stand for an infinity.
  __device__ void write(int stage, int k) const {
    const int slot_log2 = t_.weight.slot_log2;
    const unsigned mask = (1u << p_.bits) - 1;  // a forged code looks up no other memory
    float* pixel = pixel_tile(stage) + fetched_term_ * kTile + fetched_row();
    float* weight = weight_tile(stage) + fetched_term_ * kTile + fetched_row();
#pragma unroll
    for (int i = 0; i < kFetched; ++i) {
      const unsigned code = static_cast<unsigned>(fetched_codes_ >> (i << slot_log2)) & mask;
      const float value =
          has_table() ? memory().table[code * kTile + fetched_row()] : __ldg(codebook_ + code);
      pixel[i * kTile] = fetched_[i];
      weight[i * kTile] = k + fetched_term_ + i < terms() ? value : 0.0f;
    }
  }

  // ---- The product. 16 threads have the outputs, 8 the pixels.

  __device__ static int own_output() { return static_cast<int>(threadIdx.x) % 16 * kOutputs; }
  __device__ static int own_pixel() { return static_cast<int>(threadIdx.x) / 16 * kPixels; }

  __device__ void multiply_all() {
    if (terms() == 0) return;
    fetch(0);
    write(0, 0);
    __syncthreads();
    int stage = 0;
    for (int k = 0; k < terms(); k += kTileTerms, stage ^= 1) {
      const int next = k + kTileTerms;
      if (next < terms()) fetch(next);
      multiply(stage);
      if (next < terms()) write(stage ^ 1, next);
      __syncthreads();
    }
  }

  __device__ void multiply(int stage) {
    const float* pixel = pixel_tile(stage) + own_pixel();
    const float* weight = weight_tile(stage) + own_output();
#pragma unroll
    for (int k = 0; k < kTileTerms; ++k) {
      const float4 low = *reinterpret_cast<const float4*>(pixel + k * kTile);
      const float4 high = *reinterpret_cast<const float4*>(pixel + k * kTile + 4);
      const float4 w4 = *reinterpret_cast<const float4*>(weight + k * kTile);
      const float x[kPixels] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
      const float w[kOutputs] = {w4.x, w4.y, w4.z, w4.w};
#pragma unroll
      for (int i = 0; i < kPixels; ++i) {
#pragma unroll
        for (int j = 0; j < kOutputs; ++j) sums_[i][j] = __fmaf_rn(x[i], w[j], sums_[i][j]);
      }
    }
  }

  // ---- The end

  __device__ void stage_sums() const {
#pragma unroll
    for (int i = 0; i < kPixels; ++i) {
#pragma unroll
      for (int j = 0; j < kOutputs; ++j) {
        memory().tiles[(own_pixel() + i) * kPitch + own_output() + j] = sums_[i][j];
      }
    }
  }

  __device__ void store() const {
    const int64_t group_outputs = p_.shape.out_channels;
    store_square<kTile, kTileThreads>(p_, memory().tiles, memory().offsets, pixels() - first_pixel_,
                                      group_ * group_outputs + first_output_,
                                      group_outputs - first_output_, static_cast<int>(threadIdx.x));
  }
};

template <class T>
__global__ void __launch_bounds__(kTileThreads)
    codebook_tiled(const __grid_constant__ CodebookTiles tiles) {
  const unsigned columns = tiles.outputs * static_cast<unsigned>(tiles.weight.groups);
  CodebookTile<T>(tiles, blockIdx.x / columns, blockIdx.x % columns).run();
}

template <class T>
int run_tiled(const CodebookConv2dParams& p, cudaStream_t stream) {
  const CodebookWeight weight = codebook_weight(p.shape, p.bits);
  const int64_t pixels = p.batch * p.out_height * p.out_width;
  const auto tiles_of = [](int64_t count) { return (count + kTile - 1) / kTile; };
  const CodebookTiles tiles = {
      p, weight, static_cast<unsigned>(tiles_of(p.shape.out_channels)),
      p.shape.channels % 8 == 0 && reinterpret_cast<uintptr_t>(p.input) % 16 == 0};
  const int64_t blocks = tiles_of(pixels) * tiles.outputs * p.shape.groups;
  return launch(codebook_tiled<T>, static_cast<unsigned>(blocks), kTileThreads, 0, stream, tiles);
}

}  // namespace nncx::cuda
