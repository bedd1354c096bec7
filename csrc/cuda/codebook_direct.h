// codebook_conv2d of groups with few outputs, such as depthwise convolutions, of which a tile of a
// GEMM would be mostly empty. Lanes are outputs, of whatever group, so that in a depthwise
// convolution they read neighbouring channels; a thread decodes each weight once, for 4 pixels.
#pragma once

#include "cuda/codebook_store.h"
#include "cuda/codebook_weight.h"
#include "cuda/launch.h"

namespace nncx::cuda {

constexpr int kSquare = 32;  // pixels, and outputs, of a block
constexpr int kSquareWarps = 8;

struct CodebookSquares {
  CodebookConv2dParams params;
  CodebookWeight weight;
  unsigned columns;  // of squares, side by side along the outputs
};

template <class T>
class CodebookSquare {
 public:
  __device__ explicit CodebookSquare(const CodebookSquares& squares)
      : p_(squares.params),
        w_(squares.weight),
        first_output_(int64_t{blockIdx.x % squares.columns} * kSquare),
        first_pixel_(int64_t{blockIdx.x / squares.columns} * kSquare),
        outputs_(w_.groups * w_.outputs - first_output_),
        pixels_(p_.batch * p_.out_height * p_.out_width - first_pixel_) {}

  __device__ void run() {
    __shared__ __align__(16) Memory memory;
    if (warp() == 0) locate(memory);
    __syncthreads();
    if (lane() < outputs_) multiply(memory);
    __syncthreads();
    store_square<kSquare, kSquareWarps * 32>(p_, memory.sums, memory.offsets, pixels_,
                                             first_output_, outputs_, warp() * 32 + lane());
  }

 private:
  static constexpr int kPixels = kSquare / kSquareWarps;  // of a thread

  struct Memory {
    RowOrigin rows[kSquare];
    int64_t offsets[kSquare];
    float sums[kSquare * (kSquare + 1)];
  };

  const CodebookConv2dParams& p_;
  const CodebookWeight& w_;
  const int64_t first_output_, first_pixel_;
  const int64_t outputs_, pixels_;  // from the first one on

  __device__ static int lane() { return static_cast<int>(threadIdx.x); }
  __device__ static int warp() { return static_cast<int>(threadIdx.y); }
  __device__ int64_t pixel_terms() const { return p_.shape.groups * p_.shape.channels; }

  __device__ void locate(Memory& memory) const {
    const int64_t pixel = first_pixel_ + lane();
    memory.rows[lane()] = lane() < pixels_ ? row_origin(p_, pixel_terms(), pixel) : kNoRow;
    memory.offsets[lane()] = output_offset(p_, pixel);
  }

  __device__ void multiply(Memory& memory) const {
    const int64_t o = first_output_ + lane();
    const int64_t group = o / w_.outputs, output = o - group * w_.outputs;
    const int64_t block = group * w_.blocks() + output / kCodesBlock;
    const uint8_t* step = p_.weight + kCodesOffset + block * w_.block_bytes() +
                          output % kCodesBlock * kCodesStepBytes;
    const float* codebook = p_.codebook + o * p_.codebook_stride;
    const T* from = static_cast<const T*>(p_.input) + group * p_.shape.channels;
    const unsigned mask = (1u << p_.bits) - 1;  // a forged code looks up no other memory
    TapCursor cursor(p_, max(p_.shape.channels, int64_t{1}), 0);
    RowOrigin rows[kPixels];
    float sums[kPixels] = {};
#pragma unroll
    for (int i = 0; i < kPixels; ++i) rows[i] = memory.rows[warp() * kPixels + i];
    const int terms = static_cast<int>(w_.terms);
    for (int k = 0; k < terms; step += kCodesBlock * kCodesStepBytes) {
      const uint4 codes = *reinterpret_cast<const uint4*>(step);
      const uint32_t words[] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
      for (uint32_t word : words) {
#pragma unroll 1
        for (int bit = 0; bit < 32 && k < terms; bit += 1 << w_.slot_log2, ++k) {
          const float weight = __ldg(codebook + (word >> bit & mask));
          const int64_t offset = cursor.offset(p_, pixel_terms());
#pragma unroll
          for (int i = 0; i < kPixels; ++i) {
            const bool is_inside = cursor.is_inside(p_, rows[i]);
            const float x = is_inside ? to_float(from[rows[i].offset + offset]) : 0.0f;
            sums[i] = __fmaf_rn(x, weight, sums[i]);
          }
          cursor.advance(p_, p_.shape.channels, 1);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kPixels; ++i) {
      memory.sums[(warp() * kPixels + i) * (kSquare + 1) + lane()] = sums[i];
    }
  }
};

template <class T>
__global__ void __launch_bounds__(32 * kSquareWarps)
    codebook_direct(const __grid_constant__ CodebookSquares squares) {
  CodebookSquare<T>(squares).run();
}

template <class T>
int run_direct(const CodebookConv2dParams& p, cudaStream_t stream) {
  const CodebookWeight weight = codebook_weight(p.shape, p.bits);
  const auto squares_of = [](int64_t count) { return (count + kSquare - 1) / kSquare; };
  const int64_t columns = squares_of(weight.groups * weight.outputs);
  const int64_t blocks = squares_of(p.batch * p.out_height * p.out_width) * columns;
  const CodebookSquares squares = {p, weight, static_cast<unsigned>(columns)};
  return launch(codebook_direct<T>, static_cast<unsigned>(blocks), dim3(32, kSquareWarps), 0,
                stream, squares);
}

}  // namespace nncx::cuda
