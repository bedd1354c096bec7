// How the vector paths walk a depthwise convolution of int8; the AVX-512 path uses it too.
//
// Lanes are output channels, 16 to a block, and two taps of a line meet in one lane, as 16-bit
// numbers, so that `vpmaddwd` (or VNNI's `vpdpwssd`) makes two products and adds them. Nothing
// saturates, and activations of any sign cost the same.
//
//   weights  prepacked [block][tap][16]; here, while a strip of blocks is at work, [line of the
//            kernel][pair of taps][16][2], of an odd number of taps with a 0 behind the last.
//   lines    [place][16][2], the input less the zero point, hence 0 on the padding: at each place
//            that an output may need, the pixel there and the one dilation_w to its right. Each
//            block has a ring of as many lines as the kernel spans, so that each line is expanded
//            once, and what is read stays in the L1 cache.
//   sums     [output pixel][16] of up to kColumns pixels of one line, which then leave through the
//            epilogue. They are computed by eights and fours: what lies beyond the last pixel is
//            computed from whatever is there, and dropped.
//
// A `Path` gives
//   multiply<Pixels>(taps, at, sums)   the sums of so many pixels, the first of which is at byte `at`
//   store(e, rows, o, outputs, sums, width)                            as conv2d_lines.h has it
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "int8_rows.h"
#include "unroll.h"

namespace nncx {
namespace {

constexpr int64_t kColumns = kInt8TileRows;
constexpr int64_t kStripBlocks = 2;  // whose lines fit the L1 cache together
constexpr int64_t kPairBytes = 64;   // of a block: two taps as 16-bit numbers
constexpr int64_t kPixelsAtOnce = 8;

// What a kernel reads.
struct DepthwiseTaps {
  const uint8_t* weights;
  const uint8_t* lines;
  int64_t line_bytes;
  int64_t first, ring;  // the line of the first tap, of so many
  int64_t kernel_h, dilation_h;
  int64_t pairs, pair_step;  // of taps, in a line; steps in bytes
  int64_t pixel_step;
};

NNCX_INLINE inline __m128i load_16(const void* from) {
  return _mm_loadu_si128(static_cast<const __m128i*>(from));
}

// The input channels of a block of outputs, in its order.
class ChannelsOfBlock {
 public:
  ChannelsOfBlock(const Conv2dWeightShape& s, int64_t block) {
    const int64_t last = s.groups - 1;
    first_ = std::max<int64_t>(std::min(block * kInt8Block / s.out_channels, s.groups - 16), 0);
    few_ = s.groups < 16 ? s.groups : 0;
    alignas(16) uint8_t order[kInt8Block];
    for (int64_t i = 0; i < kInt8Block; ++i) {
      const int64_t channel = std::min((block * kInt8Block + i) / s.out_channels, last);
      order[i] = static_cast<uint8_t>(channel - first_);
    }
    order_ = _mm_load_si128(reinterpret_cast<const __m128i*>(order));
  }

  // No byte beyond the pixel is read.
  NNCX_INLINE __m128i load(const int8_t* pixel) const {
    if (few_ == 0) return _mm_shuffle_epi8(load_16(pixel + first_), order_);
    alignas(16) int8_t all[16] = {};
    for (int64_t i = 0; i < few_; ++i) all[i] = pixel[i];
    return _mm_shuffle_epi8(load_16(all), order_);
  }

 private:
  int64_t first_;
  int64_t few_;  // channels, if they are fewer than 16
  __m128i order_;
};

template <class Path>
class Int8Depthwise {
 public:
  explicit Int8Depthwise(const Int8Conv2dParams& params)
      : p(params),
        pairs((params.kernel_w + 1) / 2),
        stride_w(params.out_width > 1 ? params.stride_w : 1),  // where it steps beyond the image
        place_step(stride_w % 2 ? 1 : 2),
        places(((std::min(params.out_width, kColumns) - 1) * stride_w +
                2 * (pairs - 1) * params.dilation_w) /
                   place_step +
               1),
        ring((params.kernel_h - 1) * params.dilation_h + 1) {}

  int64_t scratch_bytes() const {
    const int64_t dropped = kPixelsAtOnce * pixel_step();  // may be read beyond the lines
    return kPairBytes + kStripBlocks * (weight_bytes() + lines_bytes()) + dropped;
  }

  void run(const Conv2dTile& tile, uint8_t* scratch) const {
    scratch += -reinterpret_cast<uintptr_t>(scratch) % kPairBytes;
    Conv2dTile strip = tile;
    for (; strip.block_begin < tile.block_end; strip.block_begin = strip.block_end) {
      strip.block_end = std::min(strip.block_begin + kStripBlocks, tile.block_end);
      for (int64_t block = strip.block_begin; block < strip.block_end; ++block) {
        pair_weights(block, scratch + (block - strip.block_begin) * weight_bytes());
      }
      for (int64_t x = 0; x < p.out_width; x += kColumns) run_columns(strip, x, scratch);
    }
  }

 private:
  const Int8Conv2dParams& p;
  const int64_t pairs, stride_w;
  const int64_t place_step;  // in pixels
  const int64_t places, ring;

  int64_t weight_bytes() const { return p.kernel_h * pairs * kPairBytes; }
  int64_t line_bytes() const { return places * kPairBytes; }
  int64_t pixel_step() const { return stride_w / place_step * kPairBytes; }
  int64_t lines_bytes() const { return ring * line_bytes(); }

  // Two times 16 numbers, in pairs.
  NNCX_INLINE static void store_pairs(__m128i even, __m128i odd, __m256i less, uint8_t* out) {
    const __m256i low = _mm256_cvtepi8_epi16(_mm_unpacklo_epi8(even, odd));
    const __m256i high = _mm256_cvtepi8_epi16(_mm_unpackhi_epi8(even, odd));
    auto* to = reinterpret_cast<__m256i*>(out);
    _mm256_store_si256(to, _mm256_sub_epi16(low, less));
    _mm256_store_si256(to + 1, _mm256_sub_epi16(high, less));
  }

  void pair_weights(int64_t block, uint8_t* out) const {
    const uint8_t* w = p.weight + block * p.shape.taps * kInt8Block;
    const __m128i none = _mm_setzero_si128();
    for (int64_t i = 0; i < p.kernel_h; ++i) {
      for (int64_t j = 0; j < p.kernel_w; j += 2, out += kPairBytes) {
        const bool two = j + 1 < p.kernel_w;
        store_pairs(load_16(w), two ? load_16(w + kInt8Block) : none, _mm256_setzero_si256(), out);
        w += two ? 2 * kInt8Block : kInt8Block;
      }
    }
  }

  // The pixels of the tile in columns [first, first + kColumns).
  void run_columns(const Conv2dTile& tile, int64_t first, uint8_t* scratch) const {
    Int8Rows rows;
    Position at(p, tile.pixel_begin);
    int64_t image = -1, line = 0;
    for (int64_t pixel = tile.pixel_begin; pixel < tile.pixel_end;) {
      const int64_t count = std::min(p.out_width - at.x, tile.pixel_end - pixel);
      const int64_t begin = std::max(at.x, first);
      const int64_t end = std::min(at.x + count, first + kColumns);
      if (begin < end) {
        if (at.n != image) {
          image = at.n, line = 0;
          const float scale = p.epilogue.input_scale ? p.epilogue.input_scale[image] : 1;
          for (float& of_row : rows.input_scale) of_row = scale;
        }
        const int64_t top = at.y * p.stride_h;
        for (line = std::max(line, top); line < top + ring; ++line) {
          expand_line(tile, image, line, first, scratch);
        }
        rows.first = pixel + begin - at.x;
        rows.count = end - begin;
        run_line(tile, top, begin - first, rows, scratch);
      }
      pixel += count;
      at.next_line(p);
    }
  }

  // Line `line` of the padded image, of each block.
  void expand_line(const Conv2dTile& tile, int64_t n, int64_t line, int64_t column,
                   uint8_t* scratch) const {
    const int64_t h = line - p.padding_h;
    uint8_t* out = scratch + kStripBlocks * weight_bytes() + line % ring * line_bytes();
    for (int64_t block = tile.block_begin; block < tile.block_end; ++block, out += lines_bytes()) {
      if (h < 0 || h >= p.height) {
        std::memset(out, 0, line_bytes());
        continue;
      }
      expand_pixels(ChannelsOfBlock(p.shape, block),
                    p.input + (n * p.height + h) * p.width * p.shape.groups, zero_point_of(p, n),
                    column * stride_w - p.padding_w, out);
    }
  }

  void expand_pixels(const ChannelsOfBlock channels, const int8_t* row, int32_t zero_point,
                     int64_t w, uint8_t* out) const {
    const __m128i padding = _mm_set1_epi8(static_cast<char>(zero_point));
    const __m256i less = _mm256_set1_epi16(static_cast<int16_t>(zero_point));
    const auto pixel = [&](int64_t x) NNCX_INLINE {
      return x >= 0 && x < p.width ? channels.load(row + x * p.shape.groups) : padding;
    };
    for (int64_t i = 0; i < places; ++i, w += place_step, out += kPairBytes) {
      store_pairs(pixel(w), pixel(w + p.dilation_w), less, out);
    }
  }

  // The pixels `rows`, the first of which is the strip's column `column`.
  void run_line(const Conv2dTile& tile, int64_t top, int64_t column, const Int8Rows& rows,
                const uint8_t* scratch) const {
    alignas(64) int32_t sums[kColumns * kInt8Block];
    const int64_t outputs = p.shape.groups * p.shape.out_channels;
    DepthwiseTaps taps = {.weights = scratch,
                          .lines = scratch + kStripBlocks * weight_bytes(),
                          .line_bytes = line_bytes(),
                          .first = top % ring,
                          .ring = ring,
                          .kernel_h = p.kernel_h,
                          .dilation_h = p.dilation_h,
                          .pairs = pairs,
                          .pair_step = 2 * p.dilation_w / place_step * kPairBytes,
                          .pixel_step = pixel_step()};
    for (int64_t block = tile.block_begin; block < tile.block_end; ++block) {
      int64_t r = 0;
      for (; rows.count - r > kPixelsAtOnce / 2; r += kPixelsAtOnce) {
        Path::template multiply<kPixelsAtOnce>(taps, (column + r) * taps.pixel_step,
                                               sums + r * kInt8Block);
      }
      if (r < rows.count) {
        Path::template multiply<kPixelsAtOnce / 2>(taps, (column + r) * taps.pixel_step,
                                                   sums + r * kInt8Block);
      }
      const int64_t o = block * kInt8Block;
      Path::store(p.epilogue, rows, o, std::min(kInt8Block, outputs - o), sums, kInt8Block);
      taps.weights += weight_bytes();
      taps.lines += lines_bytes();
    }
  }
};

constexpr int64_t depthwise_prepacked_bytes(const Conv2dWeightShape& s) {
  return int8_blocks(s) * s.taps * kInt8Block;
}

// [block][tap][16 outputs]
inline void depthwise_prepack(const Conv2dWeightShape& s, const int8_t* weight,
                              uint8_t* prepacked) {
  std::memset(prepacked, 0, depthwise_prepacked_bytes(s));
  for (int64_t o = 0; o < s.groups * s.out_channels; ++o) {
    for (int64_t tap = 0; tap < s.taps; ++tap) {
      const int64_t line = o / kInt8Block * s.taps + tap;
      prepacked[line * kInt8Block + o % kInt8Block] = static_cast<uint8_t>(*weight++);
    }
  }
}

}  // namespace
}  // namespace nncx
