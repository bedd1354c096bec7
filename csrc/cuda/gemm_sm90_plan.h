// The shape rule of the sm_90a kernel (gemm_sm90.h): plain functions of the problem.
//
// A tile is 128 rows x 64, 128 or 256 outputs, whichever makes all of it load the least. A's part comes
// by the first of these loaders that can:
//
//   tma      A is a matrix in memory: linear layers, and 1 x 1 convolutions that read every pixel once;
//            boxes of 128 x 128 bytes
//   im2col   a tap has a multiple of 32 bytes: TMA walks through the images, in columns of 128 pixels of
//            128, 64 or 32 bytes, the widest that a tap's bytes are a multiple of. Narrower columns
//            would be more work for TMA than gathering is for the threads.
//   gather   threads copy pieces of 16, 8 or 4 bytes with cp.async
#pragma once

#include "cuda/gemm_plan.h"
#include "cuda/gemm_rows.h"
#include "cuda/gemm_weight.h"
#include "cuda/tensor_boxes.h"

namespace nncx::cuda {

constexpr int kSm90TileRows = 128;
constexpr int kSm90TileBytes = 128;  // of k, in a stage
constexpr int kSm90Warps = 8;        // that multiply, each for 16 rows of the tile

// At the end of a tile 16 rows x 32 outputs of a warp pass through shared memory, so many sums from
// row to row: no two lanes meet in a bank.
constexpr int kSm90ScratchOutputs = 32, kSm90ScratchPitch = 40;
constexpr int kSm90TableBytes = 14 * 1024;  // for what belongs to the outputs of a tile

enum class InputLoader { tma, im2col, gather };

constexpr int sm90_stage_bytes(int tile_outputs) {
  return (kSm90TileRows + tile_outputs) * kSm90TileBytes;
}

// 192 KB for all tiles.
constexpr int sm90_stages(int tile_outputs) { return 192 * 1024 / sm90_stage_bytes(tile_outputs); }

constexpr int sm90_shared_bytes(int tile_outputs) {
  constexpr int kWarpBytes =
      kChunkRows * (kSm90ScratchPitch + 1) * sizeof(int32_t);  // and row bits
  const int stages = sm90_stages(tile_outputs);
  return stages * sm90_stage_bytes(tile_outputs) + kSm90TableBytes + kSm90Warps * kWarpBytes +
         2 * stages * static_cast<int>(sizeof(uint64_t));
}

// The output pixels of one direction, by which of their taps lie in the image. From pixel to pixel that
// range moves towards the first tap, a class with every step of its begin or end.
struct BorderClasses {
  TapRange first;
  int count;

  constexpr int of(const TapRange& taps) const {
    return first.begin - taps.begin + first.end - taps.end;
  }
};

constexpr BorderClasses border_classes(const TapRange& first, const TapRange& last) {
  const BorderClasses one{first, 1};
  return {first, 1 + one.of(last)};
}

struct Sm90Borders {
  BorderClasses y, x;

  constexpr int classes() const { return y.count * x.count; }

  constexpr int class_of(const Conv2dGeometry& g, const OutputPixel& at) const {
    return y.of(valid_taps_y(g, at)) * x.count + x.of(valid_taps_x(g, at));
  }

  // One of the class, if it has any.
  constexpr OutputPixel pixel(const Conv2dGeometry& g, int of) const {
    OutputPixel at{};
    at.y = first_at_least(g.out_height, [&](int64_t pixel) {
      return y.of(valid_taps_y(g, {0, 0, pixel, 0})) >= of / x.count;
    });
    at.x = first_at_least(g.out_width, [&](int64_t pixel) {
      return x.of(valid_taps_x(g, {0, 0, 0, pixel})) >= of % x.count;
    });
    return at;
  }

 private:
  template <class IsAtLeast>
  static constexpr int64_t first_at_least(int64_t size, const IsAtLeast& is_at_least) {
    int64_t low = 0, high = size;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (is_at_least(middle)) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    return low;
  }
};

constexpr Sm90Borders sm90_borders(const Conv2dGeometry& g) {
  const OutputPixel first{}, last{0, 0, g.out_height - 1, g.out_width - 1};
  return {border_classes(valid_taps_y(g, first), valid_taps_y(g, last)),
          border_classes(valid_taps_x(g, first), valid_taps_x(g, last))};
}

// Scale, bias and a line for each class.
constexpr bool sm90_table_fits(const Conv2dGeometry& g, int tile_outputs) {
  const Sm90Borders borders = sm90_borders(g);
  const int64_t classes = int64_t{borders.y.count} * borders.x.count;
  return (2 + classes) * tile_outputs * static_cast<int64_t>(sizeof(int32_t)) <= kSm90TableBytes;
}

// Blocks stay and take every multiprocessors-th tile, so some work in vain in the last round.
constexpr int sm90_tile_outputs(const GemmProblem& p, int multiprocessors) {
  int best = 0;
  int64_t least = 0;
  for (const int outputs : {64, 128, 256}) {
    if (!sm90_table_fits(p, outputs)) continue;
    const int64_t tiles = gemm_tiles(p, kSm90TileRows, outputs).count();
    const int64_t loaded = divided_up(tiles, multiprocessors) * (kSm90TileRows + outputs);
    if (best == 0 || loaded < least) {
      best = outputs;
      least = loaded;
    }
  }
  return best;
}

constexpr int64_t input_pixel_bytes(const GemmProblem& p) {
  return p.shape.groups * p.channel_bytes;
}

// What a stage holds of A's 128 bytes of k lies in 128 / span parts, each [128 rows][span bytes] with
// the swizzle of that span.
constexpr int im2col_span(const GemmProblem& p) {
  for (const int span : {128, 64, 32}) {
    if (p.channel_bytes % span == 0) return span;
  }
  return 0;
}

constexpr bool tma_reaches(const GemmProblem& p) {
  return p.input % 16 == 0 && input_pixel_bytes(p) % 16 == 0;
}

// Output pixel m reads input pixel m alone. With several groups the last bytes of a stage are the next
// group's, whose bits must not be counted: a step of wgmma is 32 bytes.
constexpr bool is_matrix(const GemmProblem& p) {
  return p.kernel_h == 1 && p.kernel_w == 1 && p.stride_h == 1 && p.stride_w == 1 &&
         p.padding_h == 0 && p.padding_w == 0 && p.out_height == p.height &&
         p.out_width == p.width && (p.shape.groups == 1 || p.channel_bytes % 32 == 0);
}

inline TiledMap input_matrix(const GemmProblem& p) {
  const auto pixel = static_cast<uint64_t>(input_pixel_bytes(p));
  return {reinterpret_cast<const void*>(p.input),
          pixel,
          static_cast<uint64_t>(p.rows()),
          pixel,
          kSm90TileBytes,
          kSm90TileRows,
          kSm90TileBytes};
}

// In the upper corner the output's size counts, which the map must make of its box and its steps.
constexpr int64_t upper_corner(int64_t out, int64_t stride, int64_t padding, int64_t size) {
  return (out - 1) * stride - padding + 1 - size;
}

// The bounds of a map of images: 8 bits for corners, 8 for a tap's offset, steps up to 8.
constexpr bool im2col_reaches(int64_t out, int64_t stride, int64_t padding, int64_t size,
                              int64_t kernel, int64_t dilation) {
  const int64_t upper = upper_corner(out, stride, padding, size);
  return padding <= 128 && -128 <= upper && upper <= 127 && stride <= 8 &&
         (kernel - 1) * dilation <= 255;
}

constexpr bool are_images(const GemmProblem& p) {
  return im2col_span(p) != 0 &&
         im2col_reaches(p.out_height, p.stride_h, p.padding_h, p.height, p.kernel_h,
                        p.dilation_h) &&
         im2col_reaches(p.out_width, p.stride_w, p.padding_w, p.width, p.kernel_w, p.dilation_w);
}

inline Im2colMap input_images(const GemmProblem& p) {
  const auto span = static_cast<uint32_t>(im2col_span(p));
  const auto pixel = static_cast<uint64_t>(input_pixel_bytes(p));
  const auto width = static_cast<uint64_t>(p.width), height = static_cast<uint64_t>(p.height);
  return {reinterpret_cast<const void*>(p.input),
          pixel,
          width,
          height,
          static_cast<uint64_t>(p.batch),
          pixel,
          pixel * width,
          pixel * width * height,
          static_cast<int>(-p.padding_w),
          static_cast<int>(-p.padding_h),
          static_cast<int>(upper_corner(p.out_width, p.stride_w, p.padding_w, p.width)),
          static_cast<int>(upper_corner(p.out_height, p.stride_h, p.padding_h, p.height)),
          span,
          kSm90TileRows,
          static_cast<uint32_t>(p.stride_w),
          static_cast<uint32_t>(p.stride_h),
          span};
}

inline TiledMap weight_matrix(const GemmWeight& weight, const uint8_t* rows, int tile_outputs) {
  const auto bytes = static_cast<uint64_t>(weight.row_bytes());
  return {rows,          bytes,          static_cast<uint64_t>(weight.rows),
          bytes,         kSm90TileBytes, static_cast<uint32_t>(tile_outputs),
          kSm90TileBytes};
}

constexpr InputLoader sm90_loader(const GemmProblem& p) {
  if (!tma_reaches(p)) return InputLoader::gather;
  if (is_matrix(p)) return InputLoader::tma;
  return are_images(p) ? InputLoader::im2col : InputLoader::gather;
}

// Whether the kernel can: it needs pieces of 4 bytes, something to add up, few kinds of
// borders, and counts in 32 bits.
constexpr bool sm90_supports(const GemmProblem& p) {
  constexpr int64_t kMost = (int64_t{1} << 31) - 1024;
  return p.channel_bytes % 4 == 0 && p.input % 4 == 0 && p.k_bytes() > 0 && p.k_bytes() < kMost &&
         p.rows() < kMost && input_pixel_bytes(p) < kMost &&
         p.shape.groups * p.shape.out_channels < kMost && p.out_height < kMost &&
         p.out_width < kMost && sm90_table_fits(p, 64) &&
         gemm_tiles(p, kSm90TileRows, 64).count() < kMost;
}

}  // namespace nncx::cuda
