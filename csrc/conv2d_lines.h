// How the vector paths walk a convolution of small integers; each op and path brings its own GEMM.
//
//   lines   The input as the GEMM likes it, with the padding written out: width + 2 * padding_w
//           pixels of one group. Lines are numbered through the batch, those of the padding
//           included: line n * padded_height + h is row h - padding_h of image n. Only the lines
//           that the output pixels at hand read are expanded, into scratch that stays in the L2
//           cache; each pixel of them once, however many taps read it.
//   tile    kTileRows output pixels (rows of the GEMM) x kTileBlocks blocks of kBlock outputs. A row
//           is a pointer into the lines, and nothing is gathered. The tile's weights stay in the
//           cache while its rows pass; its sums are stored together, so that an output with pixels
//           innermost is written in runs.
//
// A `Path` gives kTileRows, kTileBlocks, kBlock, the types Params and Rows, and
//   group_bytes(p)                                 of one group of a pixel of the input
//   pixel_bytes(p)                                 of a pixel in a line
//   expand_pixels(p, from, count, step, out)       `count` pixels, `step` bytes apart
//   expand_padding(p, count, out)                  pixels outside the image; both return the end
//   block_bytes(shape)                             of the prepacked weights of a block of outputs
//   contiguous(p)                                  whether it reads neighbouring pixels as one
//   by_image(p)                                    whether the rows of a tile must be of one image
//   describe(p, at, group, r, rows)                what its Rows know of row r, the pixel `at`
//   tile(p, rows, pointers, taps, weights, blocks, o, outputs)
//       multiplies the rows by `blocks` blocks of weights, and lets `outputs` of the sums, from output
//       channel o on, out through the epilogue
// A path whose sums pass through memory has, for multiply_then_store,
//   gemm(p, rows, pointers, taps, weights, blocks, sums)       sums[row][blocks * kBlock]
//   store(p.epilogue, rows, o, outputs, sums, width)           the first `outputs` of sums[row][width]
// A Rows has `first` and `count`: neighbouring output pixels.
#pragma once

#include <algorithm>

#include "conv2d.h"

namespace nncx {
namespace {

constexpr int64_t kLinesBytes = 1 << 16;  // of scratch, if the kernel's span is not larger
constexpr int64_t kLinesSlack = 64;       // so much may be read or written beyond the lines

// How the taps of an output pixel lie in the lines: runs of pixels, in the weights' order.
struct Taps {
  int64_t lines, line_step;  // kernel_h times this far apart, in bytes
  int64_t runs, run_step;    // within a line
  int64_t run_pixels;

  // `contiguous`: the path may read the pixels of a run as one.
  Taps(const Conv2dGeometry& p, int64_t pixel_bytes, int64_t line_bytes, bool contiguous)
      : lines(p.kernel_h),
        line_step(p.dilation_h * line_bytes),
        runs(contiguous && p.dilation_w == 1 ? 1 : p.kernel_w),
        run_step(p.dilation_w * pixel_bytes),
        run_pixels(p.kernel_w / runs) {}
};

// An output pixel, counted up without divisions.
class Position {
 public:
  int64_t n, y, x;

  Position(const Conv2dGeometry& p, int64_t pixel)
      : n(pixel / (p.out_height * p.out_width)),
        y(pixel / p.out_width % p.out_height),
        x(pixel % p.out_width) {}

  void next(const Conv2dGeometry& p) {
    if (++x == p.out_width) next_line(p);
  }

  void next_line(const Conv2dGeometry& p) {
    x = 0;
    if (++y == p.out_height) {
      y = 0;
      ++n;
    }
  }

  // The first of the lines that its taps read.
  int64_t line(const Conv2dGeometry& p) const {
    return n * (p.height + 2 * p.padding_h) + y * p.stride_h;
  }
};

// ---------------------------------------------------------------------------------------------

template <class Path>
void multiply_then_store(const typename Path::Params& p, const typename Path::Rows& rows,
                         const uint8_t* const* pointers, const Taps& taps, const uint8_t* weights,
                         int64_t blocks, int64_t o, int64_t outputs) {
  alignas(64) int32_t sums[Path::kTileRows * Path::kTileBlocks * Path::kBlock];
  Path::gemm(p, rows, pointers, taps, weights, blocks, sums);
  Path::store(p.epilogue, rows, o, outputs, sums, blocks * Path::kBlock);
}

template <class Path>
class Conv2dLines {
 public:
  using Params = typename Path::Params;

  explicit Conv2dLines(const Params& params)
      : p(params),
        pixel_bytes(Path::pixel_bytes(params)),
        line_bytes((params.width + 2 * params.padding_w) * pixel_bytes),
        taps(params, pixel_bytes, line_bytes, Path::contiguous(params)) {}

  int64_t scratch_bytes() const { return lines_held() * line_bytes + kLinesSlack; }

  void run(const Conv2dTile& tile, uint8_t* scratch) const {
    const int64_t blocks = blocks_of_group();
    for (int64_t group = tile.block_begin / blocks; group * blocks < tile.block_end; ++group) {
      Conv2dTile part = tile;
      part.block_begin = std::max(tile.block_begin - group * blocks, int64_t{0});
      part.block_end = std::min(tile.block_end - group * blocks, blocks);
      run_group(group, part, scratch);
    }
  }

 private:
  static constexpr int64_t kRows = Path::kTileRows;

  const Params& p;
  const int64_t pixel_bytes, line_bytes;
  const Taps taps;

  int64_t blocks_of_group() const {
    return (p.shape.out_channels + Path::kBlock - 1) / Path::kBlock;
  }

  // How many lines the taps of one output pixel span, and how many are held at a time.
  int64_t lines_spanned() const { return (p.kernel_h - 1) * p.dilation_h + 1; }
  int64_t lines_held() const {
    return std::max(lines_spanned(), kLinesBytes / std::max<int64_t>(line_bytes, 1));
  }

  // The tile's pixels and blocks of one group, as many lines at a time as scratch holds.
  void run_group(int64_t group, const Conv2dTile& tile, uint8_t* scratch) const {
    for (int64_t begin = tile.pixel_begin; begin < tile.pixel_end;) {
      const Position at(p, begin);
      const int64_t line_end = at.line(p) + lines_held();
      Position last = at;
      int64_t end = begin, lines_used;
      do {
        lines_used = last.line(p) + lines_spanned();
        end += p.out_width - last.x;
        last.next_line(p);
      } while (end < tile.pixel_end && last.line(p) + lines_spanned() <= line_end);
      end = std::min(end, tile.pixel_end);
      expand_lines(group, at.line(p), lines_used, scratch);
      run_pixels(group, tile, at, begin, end, scratch);
      begin = end;
    }
  }

  // Lines [first, end) of one group.
  void expand_lines(int64_t group, int64_t first, int64_t end, uint8_t* out) const {
    const int64_t group_bytes = Path::group_bytes(p);
    const int64_t step = p.shape.groups * group_bytes;
    const auto* input = reinterpret_cast<const uint8_t*>(p.input);
    const int64_t padded_height = p.height + 2 * p.padding_h;
    int64_t n = first / padded_height;
    int64_t h = first % padded_height - p.padding_h;
    for (int64_t line = first; line < end; ++line, ++h) {
      if (h == p.height + p.padding_h) {
        h = -p.padding_h;
        ++n;
      }
      if (h < 0 || h >= p.height) {
        out = Path::expand_padding(p, p.width + 2 * p.padding_w, out);
        continue;
      }
      const uint8_t* row = input + (n * p.height + h) * p.width * step + group * group_bytes;
      out = Path::expand_padding(p, p.padding_w, out);
      out = Path::expand_pixels(p, row, p.width, step, out);
      out = Path::expand_padding(p, p.padding_w, out);
    }
  }

  // Output pixels [begin, end), whose lines from that of `at` on are expanded.
  void run_pixels(int64_t group, const Conv2dTile& tile, Position at, int64_t begin, int64_t end,
                  const uint8_t* lines) const {
    const int64_t block_bytes = Path::block_bytes(p.shape);
    const uint8_t* weights = p.weight + group * blocks_of_group() * block_bytes;
    const int64_t first_line = at.line(p);
    const uint8_t* pointers[kRows];
    typename Path::Rows rows;
    for (rows.first = begin; rows.first < end; rows.first += rows.count) {
      locate(group, first_line, lines, end, at, rows, pointers);
      int64_t blocks;
      for (int64_t block = tile.block_begin; block < tile.block_end; block += blocks) {
        blocks = std::min(Path::kTileBlocks, tile.block_end - block);
        const int64_t first = block * Path::kBlock;
        const int64_t outputs = std::min(blocks * Path::kBlock, p.shape.out_channels - first);
        Path::tile(p, rows, pointers, taps, weights + block * block_bytes, blocks,
                   group * p.shape.out_channels + first, outputs);
      }
    }
  }

  // The rows of the next tile. Where an output has pixels innermost they are of one image, so that
  // they are neighbours there.
  void locate(int64_t group, int64_t first_line, const uint8_t* lines, int64_t end, Position& at,
              typename Path::Rows& rows, const uint8_t** pointers) const {
    const int64_t left_in_image = p.out_height * p.out_width - (at.y * p.out_width + at.x);
    rows.count = std::min(kRows, end - rows.first);
    if (Path::by_image(p)) rows.count = std::min(rows.count, left_in_image);
    for (int64_t r = 0; r < rows.count; ++r, at.next(p)) {
      pointers[r] =
          lines + (at.line(p) - first_line) * line_bytes + at.x * p.stride_w * pixel_bytes;
      Path::describe(p, at, group, r, rows);
    }
  }
};

}  // namespace
}  // namespace nncx
