// How the vector paths walk a depthwise convolution of int8; the AVX-512 path uses it too.
//
// Lanes are output channels, 16 to a block, and two taps of a line meet in one lane, as 16-bit
// numbers, so that `vpmaddwd` (or VNNI's `vpdpwssd`) makes two products and adds them. Nothing
// saturates, and activations of any sign cost the same.
//
//   weights  prepacked [block][tap][16]; here, while a strip of blocks is at work, [line of the
//            kernel][pair of taps][16][2], of an odd number of taps with a 0 behind the last.
//   lines    [place][16][2], the input less the zero point, hence 0 on the padding: a place has the
//            pixel that one tap of a pair reads, and that of the other tap beside it. The places of
//            neighbouring output pixels are neighbours. Each block has a ring of as many lines as
//            the kernel spans, so that each line is expanded once, and what is read stays in the L1
//            cache.
//   sums     [output pixel][16] of up to kColumns pixels, of one line or of several short ones, which
//            then leave through the epilogue. They are computed by eights and fours: what lies beyond the last pixel is
//            computed from whatever is there, and dropped.
//
// A `Path` gives
//   multiply<Pixels, PairStep>(taps, at, sums)   add_line() of each line of the kernel, for pixels
//                                                the first of which has its places at byte `at`
//   store(e, rows, o, outputs, sums, width)                            as conv2d_lines.h has it
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "int8_rows.h"
#include "unroll.h"

namespace nncx {
namespace {

constexpr int64_t kColumns = 32;     // at most kInt8TileRows
constexpr int64_t kStripBlocks = 2;  // whose lines fit the L1 cache together
constexpr int64_t kPlaceBytes = 4 * kInt8Block;
constexpr int kPixelsAtOnce = 8;

// What a kernel reads.
struct DepthwiseTaps {
  const uint8_t* weights;
  const uint8_t* lines;
  int64_t line_bytes;
  int64_t first, ring;  // the line of the first tap, of so many
  int64_t kernel_h, dilation_h;
  int64_t pairs, pair_step;  // of taps, in a line; bytes

  // Calls step(weights, places) for each line of the kernel.
  template <class Step>
  NNCX_INLINE void for_each_line(int64_t at, const Step& step) const {
    const uint8_t* w = weights;
    for (int64_t i = 0, line = first; i < kernel_h; ++i, w += pairs * kPlaceBytes) {
      step(w, lines + line * line_bytes + at);
      line += dilation_h;
      if (line >= ring) line -= ring;
    }
  }
};

// sum[pixel] += weights x places, over the pairs of a line. `madd(sum, w, place)` adds one product;
// where two pairs are PairStep places apart, as in a kernel three wide, each place is loaded once.
template <int Pixels, int PairStep, class Vector, class Load, class Madd>
NNCX_INLINE inline void add_line(const DepthwiseTaps& taps, const uint8_t* weights,
                                 const uint8_t* places, Vector (&sum)[Pixels], const Load& load,
                                 const Madd& madd) {
  if constexpr (PairStep > 0) {
    const Vector first = load(weights), second = load(weights + kPlaceBytes);
    for_each<Pixels + PairStep>([&](auto i) NNCX_INLINE {
      Vector place = load(places + i * kPlaceBytes);
      asm("" : "+v"(place));  // else gcc loads it twice
      if constexpr (i < Pixels) madd(sum[i], first, place);
      if constexpr (i >= PairStep) madd(sum[i - PairStep], second, place);
    });
  } else {
    for (int64_t j = 0; j < taps.pairs; ++j, weights += kPlaceBytes, places += taps.pair_step) {
      const Vector w = load(weights);
      for_each<Pixels>([&](auto i)
                           NNCX_INLINE { madd(sum[i], w, load(places + i * kPlaceBytes)); });
    }
  }
}

NNCX_INLINE inline __m128i load_16(const void* from) {
  return _mm_loadu_si128(static_cast<const __m128i*>(from));
}

// The input channels of a block of outputs, in its order.
struct ChannelsOfBlock {
  int64_t first, count;  // of a pixel: 16 bytes, or all that it has
  __m128i order;

  ChannelsOfBlock() = default;

  ChannelsOfBlock(const Conv2dWeightShape& s, int64_t block)
      : first(std::max<int64_t>(
            std::min(block * kInt8Block / s.out_channels, s.groups - kInt8Block), 0)),
        count(std::min(s.groups, kInt8Block)) {
    alignas(16) uint8_t at[kInt8Block];
    for (int64_t i = 0; i < kInt8Block; ++i) {
      const int64_t channel = (block * kInt8Block + i) / s.out_channels;
      at[i] = static_cast<uint8_t>(std::min(channel, s.groups - 1) - first);
    }
    order = load_16(at);
  }

  NNCX_INLINE __m128i load(const int8_t* pixel) const {
    if (count == kInt8Block) return _mm_shuffle_epi8(load_16(pixel + first), order);
    alignas(16) int8_t all[kInt8Block] = {};
    for (int64_t i = 0; i < count; ++i) all[i] = pixel[i];
    return _mm_shuffle_epi8(load_16(all), order);
  }
};

// Two times 16 numbers less another, in pairs.
NNCX_INLINE inline void store_pairs(__m128i first, __m128i second, __m256i less, uint8_t* out) {
  const __m256i low = _mm256_cvtepi8_epi16(_mm_unpacklo_epi8(first, second));
  const __m256i high = _mm256_cvtepi8_epi16(_mm_unpackhi_epi8(first, second));
  auto* to = reinterpret_cast<__m256i*>(out);
  _mm256_storeu_si256(to, _mm256_sub_epi16(low, less));
  _mm256_storeu_si256(to + 1, _mm256_sub_epi16(high, less));
}

template <class Path>
class Int8Depthwise {
 public:
  explicit Int8Depthwise(const Int8Conv2dParams& params)
      : p(params),
        columns(std::min(params.out_width, kColumns)),
        pairs((params.kernel_w + 1) / 2),
        pair_width(2 * params.dilation_w),
        shared(pair_width % params.stride_w == 0 && pair_width / params.stride_w < columns),
        pair_step(shared ? pair_width / params.stride_w : columns),
        places(columns + (pairs - 1) * pair_step),
        ring((params.kernel_h - 1) * params.dilation_h + 1) {}

  int64_t scratch_bytes() const {
    return kStripBlocks * (weight_bytes() + lines_bytes()) + kPixelsAtOnce * kPlaceBytes;
  }

  void run(const Conv2dTile& tile, uint8_t* scratch) const {
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
  // Blocks of outputs, and the sums of neighbouring pixels that are not stored yet.
  struct Strip {
    const int64_t first_output, blocks;
    ChannelsOfBlock channels[kStripBlocks];
    Int8Rows rows;
    alignas(64) int32_t sums[kStripBlocks][(kColumns + kPixelsAtOnce) * kInt8Block];

    Strip(const Int8Conv2dParams& p, const Conv2dTile& tile)
        : first_output(tile.block_begin * kInt8Block), blocks(tile.block_end - tile.block_begin) {
      for (int64_t i = 0; i < blocks; ++i) channels[i] = {p.shape, tile.block_begin + i};
      rows.first = rows.count = 0;
    }

    void next_image(const Int8Conv2dParams& p, int64_t n) {
      const float scale = p.epilogue.input_scale ? p.epilogue.input_scale[n] : 1;
      for (float& of_row : rows.input_scale) of_row = scale;
    }

    // For pixels that follow those it has.
    bool has_room(int64_t pixel, int64_t count) const {
      return rows.count + count <= kColumns && rows.first + rows.count == pixel;
    }
  };

  const Int8Conv2dParams& p;
  const int64_t columns, pairs, pair_width;
  const bool shared;  // whether a place serves several pixels, each with another pair of taps
  const int64_t pair_step, places, ring;

  int64_t weight_bytes() const { return p.kernel_h * pairs * kPlaceBytes; }
  int64_t line_bytes() const { return places * kPlaceBytes; }
  int64_t lines_bytes() const { return ring * line_bytes(); }

  void pair_weights(int64_t block, uint8_t* out) const {
    const uint8_t* w = p.weight + block * p.shape.taps * kInt8Block;
    for (int64_t i = 0; i < p.kernel_h; ++i) {
      for (int64_t j = 0; j < p.kernel_w; j += 2, out += kPlaceBytes) {
        const bool two = j + 1 < p.kernel_w;
        store_pairs(load_16(w), two ? load_16(w + kInt8Block) : _mm_setzero_si128(),
                    _mm256_setzero_si256(), out);
        w += two ? 2 * kInt8Block : kInt8Block;
      }
    }
  }

  // The pixels of the tile in columns [first, first + kColumns).
  void run_columns(const Conv2dTile& tile, int64_t first, uint8_t* scratch) const {
    Strip strip(p, tile);
    Position at(p, tile.pixel_begin);
    int64_t image = -1, line = 0;
    for (int64_t pixel = tile.pixel_begin; pixel < tile.pixel_end; at.next_line(p)) {
      const int64_t end = std::min(at.x + tile.pixel_end - pixel, p.out_width);
      const int64_t begin = std::max(at.x, first);
      const int64_t count = std::min(end, first + kColumns) - begin;
      if (count > 0) {
        if (at.n != image) {
          store(strip);
          strip.next_image(p, image = at.n);
          line = 0;
        }
        const int64_t top = at.y * p.stride_h;
        for (line = std::max(line, top); line < top + ring; ++line) {
          expand_line(strip, image, line, first, scratch);
        }
        if (!strip.has_room(pixel + begin - at.x, count)) store(strip);
        multiply_line(strip, pixel + begin - at.x, count, top % ring, begin - first, scratch);
      }
      pixel += end - at.x;
    }
    store(strip);
  }

  // Line `line` of the padded image, as the output's columns from `column` on read it.
  void expand_line(const Strip& strip, int64_t n, int64_t line, int64_t column,
                   uint8_t* scratch) const {
    const int64_t h = line - p.padding_h;
    uint8_t* out = scratch + kStripBlocks * weight_bytes() + line % ring * line_bytes();
    for (int64_t i = 0; i < strip.blocks; ++i, out += lines_bytes()) {
      if (h < 0 || h >= p.height) {
        std::memset(out, 0, line_bytes());
        continue;
      }
      const int8_t* row = p.input + (n * p.height + h) * p.width * p.shape.groups;
      int64_t w = column * p.stride_w - p.padding_w;
      const int64_t together = shared ? places : columns;
      for (int64_t done = 0; done < places; done += together, w += pair_width) {
        expand_pixels(strip.channels[i], row, zero_point_of(p, n), w, together,
                      out + done * kPlaceBytes);
      }
    }
  }

  // From column w of the input on, stride_w apart.
  void expand_pixels(const ChannelsOfBlock channels, const int8_t* row, int32_t zero_point,
                     int64_t w, int64_t count, uint8_t* out) const {
    const int64_t width = p.width, step = p.stride_w, second = p.dilation_w, bytes = p.shape.groups;
    const __m128i padding = _mm_set1_epi8(static_cast<char>(zero_point));
    const __m256i less = _mm256_set1_epi16(static_cast<int16_t>(zero_point));
    const auto pixel = [&](int64_t x) NNCX_INLINE {
      return x >= 0 && x < width ? channels.load(row + x * bytes) : padding;
    };
    for (const uint8_t* end = out + count * kPlaceBytes; out < end; out += kPlaceBytes, w += step) {
      if (w >= 0 && w + second < width) break;
      store_pairs(pixel(w), pixel(w + second), less, out);
      --count;
    }
    if (channels.count == kInt8Block && count > 0 && w + second < width) {
      const int8_t* from = row + w * bytes + channels.first;
      const int64_t whole = std::min(count, (width - second - w + step - 1) / step);
      const uint8_t* end = out + whole * kPlaceBytes;
      const auto load = [&](const int8_t* at)
                            NNCX_INLINE { return _mm_shuffle_epi8(load_16(at), channels.order); };
      if (second == step) {
        __m128i here = load(from);
        for (; out < end; out += kPlaceBytes) {
          const __m128i next = load(from += step * bytes);
          store_pairs(here, next, less, out);
          here = next;
        }
      } else {
        for (; out < end; out += kPlaceBytes, from += step * bytes) {
          store_pairs(load(from), load(from + second * bytes), less, out);
        }
      }
      count -= whole, w += whole * step;
    }
    for (; count > 0; --count, out += kPlaceBytes, w += step) {
      store_pairs(pixel(w), pixel(w + second), less, out);
    }
  }

  template <int Pixels>
  auto multiply_of() const {
    if (pairs == 2 && pair_step == 1) return Path::template multiply<Pixels, 1>;
    if (pairs == 2 && pair_step == 2) return Path::template multiply<Pixels, 2>;
    return Path::template multiply<Pixels, 0>;
  }

  // `count` pixels of one line, from the columns' `column` on; the first tap reads the ring's `line`.
  void multiply_line(Strip& strip, int64_t pixel, int64_t count, int64_t line, int64_t column,
                     const uint8_t* scratch) const {
    const auto eight = multiply_of<kPixelsAtOnce>(), four = multiply_of<kPixelsAtOnce / 2>();
    DepthwiseTaps taps = {.weights = scratch,
                          .lines = scratch + kStripBlocks * weight_bytes(),
                          .line_bytes = line_bytes(),
                          .first = line,
                          .ring = ring,
                          .kernel_h = p.kernel_h,
                          .dilation_h = p.dilation_h,
                          .pairs = pairs,
                          .pair_step = pair_step * kPlaceBytes};
    for (int64_t i = 0; i < strip.blocks; ++i) {
      int32_t* sums = strip.sums[i] + strip.rows.count * kInt8Block;
      for (int64_t r = 0; r < count; r += kPixelsAtOnce) {
        const auto multiply = count - r > kPixelsAtOnce / 2 ? eight : four;
        multiply(taps, (column + r) * kPlaceBytes, sums + r * kInt8Block);
      }
      taps.weights += weight_bytes();
      taps.lines += lines_bytes();
    }
    if (strip.rows.count == 0) strip.rows.first = pixel;
    strip.rows.count += count;
  }

  void store(Strip& strip) const {
    const int64_t outputs = p.shape.groups * p.shape.out_channels;
    for (int64_t i = 0; i < strip.blocks && strip.rows.count > 0; ++i) {
      const int64_t o = strip.first_output + i * kInt8Block;
      Path::store(p.epilogue, strip.rows, o, std::min(kInt8Block, outputs - o), strip.sums[i],
                  kInt8Block);
    }
    strip.rows.count = 0;
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
