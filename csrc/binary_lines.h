// How the vector paths walk a binary convolution; each brings its own GEMM.
//
//   lines   The input as the path's GEMM likes it, with the padding written out: width + 2 *
//           padding_w pixels of one group. Lines are numbered through the batch, those of the
//           padding included: line n * padded_height + h is row h - padding_h of image n. Only the
//           lines that the output pixels at hand read are expanded, into scratch that stays in the
//           L2 cache; each pixel of them once, however many taps read it.
//   tile    kTileRows output pixels (rows of the GEMM) x kTileBlocks blocks of outputs. A row is a
//           pointer into the lines, and nothing is gathered. The tile's weights stay in the L1
//           cache while its rows pass; its counts are stored together, so that an output with
//           pixels innermost is written in runs.
//
// A `Path` gives
//   pixel_bytes(p)                                    of a pixel in a line
//   expand_pixels(p, signs, count, step, out)         `count` pixels, `step` bytes apart
//   expand_padding(p, count, out)                     pixels of pad_value; both return the end
//   filter_bytes(shape)                               of one output's prepacked weights
//   contiguous(p)                                     whether it reads neighbouring pixels as one
//   gemm(p, rows, count, taps, weights, blocks, counts)
//       counts[row][blocks * kBinaryBlock] = popcount(row xor weights) over the taps that count
//   store(epilogue, rows, o, outputs, counts, width)  counts[row][width], the first `outputs` of it
#pragma once

#include <algorithm>

#include "binary_conv2d.h"
#include "pack_signs.h"

namespace nncx {
namespace {

constexpr int64_t kTileRows = 16;
constexpr int64_t kTileBlocks = 2;
constexpr int64_t kLinesBytes = 1 << 16;  // of scratch, if the kernel's span is not larger
constexpr int64_t kLinesSlack = 64;       // so much may be written beyond the lines

// Neighbouring output pixels: of how many products of signs their dot products are the sum, and the
// input's scale there.
struct BinaryRows {
  int64_t first, count;
  int32_t bits[kTileRows];
  float input_scale[kTileRows];
};

// How the taps of an output pixel lie in the lines: runs of pixels, in the weights' order.
struct Taps {
  int64_t lines, line_step;  // kernel_h times this far apart, in bytes
  int64_t runs, run_step;    // within a line
  int64_t run_pixels;

  // `contiguous`: the path may read the pixels of a run as one.
  Taps(const BinaryConv2dParams& p, int64_t pixel_bytes, int64_t line_bytes, bool contiguous)
      : lines(p.kernel_h),
        line_step(p.dilation_h * line_bytes),
        runs(contiguous && p.dilation_w == 1 ? 1 : p.kernel_w),
        run_step(p.dilation_w * pixel_bytes),
        run_pixels(p.kernel_w / runs) {}
};

// How many of a kernel's taps along one dimension lie inside the image.
inline int64_t taps_inside(int64_t first, int64_t kernel, int64_t dilation, int64_t size) {
  if (first >= 0 && first + (kernel - 1) * dilation < size) return kernel;
  int64_t inside = 0;
  for (int64_t i = 0; i < kernel; ++i) {
    const int64_t at = first + i * dilation;
    inside += at >= 0 && at < size;
  }
  return inside;
}

// An output pixel, counted up without divisions.
class Position {
 public:
  int64_t n, y, x;

  Position(const BinaryConv2dParams& p, int64_t pixel)
      : n(pixel / (p.out_height * p.out_width)),
        y(pixel / p.out_width % p.out_height),
        x(pixel % p.out_width) {
    enter_line(p);
  }

  void next(const BinaryConv2dParams& p) {
    if (++x == p.out_width) next_line(p);
  }

  void next_line(const BinaryConv2dParams& p) {
    x = 0;
    if (++y == p.out_height) {
      y = 0;
      ++n;
    }
    enter_line(p);
  }

  // The first of the lines that its taps read.
  int64_t line(const BinaryConv2dParams& p) const {
    return n * (p.height + 2 * p.padding_h) + y * p.stride_h;
  }

  // How many products of signs make up the dot product.
  int64_t counted_bits(const BinaryConv2dParams& p) const {
    if (p.pad_value) return p.shape.taps * p.shape.channels;
    return p.shape.channels * lines_inside_ *
           taps_inside(x * p.stride_w - p.padding_w, p.kernel_w, p.dilation_w, p.width);
  }

 private:
  int64_t lines_inside_;

  void enter_line(const BinaryConv2dParams& p) {
    lines_inside_ = taps_inside(y * p.stride_h - p.padding_h, p.kernel_h, p.dilation_h, p.height);
  }
};

// ---------------------------------------------------------------------------------------------

template <class Path>
class BinaryLines {
 public:
  explicit BinaryLines(const BinaryConv2dParams& params)
      : p(params),
        pixel_bytes(Path::pixel_bytes(params)),
        line_bytes((params.width + 2 * params.padding_w) * pixel_bytes),
        taps(params, pixel_bytes, line_bytes, Path::contiguous(params)) {}

  int64_t scratch_bytes() const { return lines_held() * line_bytes + kLinesSlack; }

  void run(const BinaryTile& tile, uint8_t* scratch) const {
    const int64_t blocks = binary_blocks(p.shape.out_channels);
    for (int64_t group = tile.block_begin / blocks; group * blocks < tile.block_end; ++group) {
      BinaryTile part = tile;
      part.block_begin = std::max(tile.block_begin - group * blocks, int64_t{0});
      part.block_end = std::min(tile.block_end - group * blocks, blocks);
      run_group(group, part, scratch);
    }
  }

 private:
  const BinaryConv2dParams& p;
  const int64_t pixel_bytes, line_bytes;
  const Taps taps;

  // How many lines the taps of one output pixel span, and how many are held at a time.
  int64_t lines_spanned() const { return (p.kernel_h - 1) * p.dilation_h + 1; }
  int64_t lines_held() const {
    return std::max(lines_spanned(), kLinesBytes / std::max<int64_t>(line_bytes, 1));
  }

  // The tile's pixels and blocks of one group, as many lines at a time as scratch holds.
  void run_group(int64_t group, const BinaryTile& tile, uint8_t* scratch) const {
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
    const int64_t group_bytes = packed_bytes(p.shape.channels);
    const int64_t signs_step = p.shape.groups * group_bytes;
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
      const uint8_t* signs =
          p.input + (n * p.height + h) * p.width * signs_step + group * group_bytes;
      out = Path::expand_padding(p, p.padding_w, out);
      out = Path::expand_pixels(p, signs, p.width, signs_step, out);
      out = Path::expand_padding(p, p.padding_w, out);
    }
  }

  // Output pixels [begin, end), whose lines from that of `at` on are expanded.
  void run_pixels(int64_t group, const BinaryTile& tile, Position at, int64_t begin, int64_t end,
                  const uint8_t* lines) const {
    const int64_t block_stride = Path::filter_bytes(p.shape) * kBinaryBlock;
    const uint8_t* weights = p.weight + group * binary_blocks(p.shape.out_channels) * block_stride;
    const int64_t first_line = at.line(p);
    const uint8_t* pointers[kTileRows];
    BinaryRows rows;
    for (rows.first = begin; rows.first < end; rows.first += rows.count) {
      locate(group, first_line, lines, end, at, rows, pointers);
      int64_t blocks;
      for (int64_t block = tile.block_begin; block < tile.block_end; block += blocks) {
        blocks = std::min(kTileBlocks, tile.block_end - block);
        alignas(64) int32_t counts[kTileRows * kTileBlocks * kBinaryBlock];
        Path::gemm(p, pointers, rows.count, taps, weights + block * block_stride, blocks, counts);
        const int64_t first = block * kBinaryBlock;
        const int64_t width = blocks * kBinaryBlock;
        Path::store(p.epilogue, rows, group * p.shape.out_channels + first,
                    std::min(width, p.shape.out_channels - first), counts, width);
      }
    }
  }

  // The rows of the next tile. Where an output has pixels innermost they are of one image, so that
  // they are neighbours there.
  void locate(int64_t group, int64_t first_line, const uint8_t* lines, int64_t end, Position& at,
              BinaryRows& rows, const uint8_t** pointers) const {
    const BinaryEpilogue& e = p.epilogue;
    const int64_t in_image = at.y * p.out_width + at.x;
    rows.count = std::min(kTileRows, end - rows.first);
    if (!e.threshold && !e.channels_last) rows.count = std::min(rows.count, e.image - in_image);
    for (int64_t r = 0; r < rows.count; ++r, at.next(p)) {
      pointers[r] =
          lines + (at.line(p) - first_line) * line_bytes + at.x * p.stride_w * pixel_bytes;
      rows.bits[r] = static_cast<int32_t>(at.counted_bits(p));
      const int64_t pixel = at.y * p.out_width + at.x;
      rows.input_scale[r] =
          e.input_scale ? e.input_scale[(at.n * p.shape.groups + group) * e.image + pixel] : 1;
    }
  }
};

}  // namespace
}  // namespace nncx
