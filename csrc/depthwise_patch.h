// A rectangle of output pixels, and what it reads, expanded into scratch that stays in the L1 cache: as
// floats, with the padding written out, a channel repeated for each of its outputs. So the loops over
// it know neither formats nor borders.
//
//   channels innermost   [line][column][16], of one block
//   pixels innermost     [line][phase][column], of one channel; phase i has the columns i,
//                        i + stride_w, i + 2 * stride_w ..., so that a tap reads neighbours
#pragma once

#include <algorithm>

#include "avx2/lanes.h"
#include "depthwise_conv2d.h"
#include "depthwise_formats.h"
#include "unroll.h"

namespace nncx {
namespace {

constexpr int64_t kPatchFloats = 5 << 10;  // 20 KB of the L1 cache, if one line is not larger
constexpr int64_t kPatchSlack = 64;        // so many floats may be read beyond a patch

// Output pixels of one image.
struct Rectangle {
  int64_t y, y_end, x, x_end;
};

// How many positions the taps of `outputs` neighbours span.
constexpr int64_t span(int64_t outputs, int64_t stride, int64_t taps, int64_t dilation) {
  return (outputs - 1) * stride + (taps - 1) * dilation + 1;
}

// The largest patch.
struct PatchSize {
  int64_t lines, columns;       // of outputs
  int64_t line_floats, floats;  // of what it reads
  int64_t phase_floats;

  PatchSize(const DepthwiseConv2dParams& p, int64_t lanes) {
    columns = fit(p.out_width, [&](int64_t n) { return line_of(p, lanes, n) * lines_of(p, 1); });
    line_floats = line_of(p, lanes, columns);
    lines = fit(p.out_height, [&](int64_t n) { return line_floats * lines_of(p, n); });
    floats = line_floats * lines_of(p, lines) + kPatchSlack;
    phase_floats = line_floats / p.stride_w;
  }

 private:
  static int64_t lines_of(const DepthwiseConv2dParams& p, int64_t outputs) {
    return span(outputs, p.stride_h, p.kernel_h, p.dilation_h);
  }

  static int64_t line_of(const DepthwiseConv2dParams& p, int64_t lanes, int64_t outputs) {
    if (p.channels_last) {
      return span(outputs, p.stride_w, p.kernel_w, p.dilation_w) * kDepthwiseBlock;
    }
    const int64_t columns = (outputs + lanes - 1) / lanes * lanes;
    const int64_t phase = columns + (p.kernel_w - 1) * p.dilation_w / p.stride_w + 1;
    return (phase + 15) / 16 * 16 * p.stride_w;  // whole cache lines
  }

  // The largest number up to `most`, at least 1, of which floats(number) are not too many.
  template <class Floats>
  static int64_t fit(int64_t most, const Floats& floats) {
    int64_t low = 1;
    for (int64_t high = most; low < high;) {
      const int64_t middle = low + (high - low + 1) / 2;
      if (floats(middle) <= kPatchFloats) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    return low;
  }
};

// A patch in `memory`, which has `size.floats`.
template <class T>
class Patch {
 public:
  Patch(const DepthwiseConv2dParams& params, const PatchSize& most, float* scratch)
      : p(params), size(most), memory(scratch) {}

  const float* line(int64_t i) const { return memory + i * size.line_floats; }

  // Of image n and output o, or the block that begins with it.
  void expand(int64_t n, int64_t o, const Rectangle& r) const {
    const int64_t lines = span(r.y_end - r.y, p.stride_h, p.kernel_h, p.dilation_h);
    const int64_t first_line = r.y * p.stride_h - p.padding_h;
    Columns columns;
    columns.first = r.x * p.stride_w - p.padding_w;
    columns.count = span(r.x_end - r.x, p.stride_w, p.kernel_w, p.dilation_w);
    columns.begin = std::clamp(-columns.first, int64_t{0}, columns.count);
    columns.end = std::clamp(p.width - columns.first, columns.begin, columns.count);
    columns.whole_begin = columns.begin / p.stride_w;
    columns.rest_begin = columns.begin % p.stride_w;
    columns.whole_end = columns.end / p.stride_w;
    columns.rest_end = columns.end % p.stride_w;
    const T* image = static_cast<const T*>(p.input);
    const int64_t plane = n * p.channels + o / p.multiplier;
    for (int64_t i = 0; i < lines; ++i) {
      const int64_t h = first_line + i;
      float* out = memory + i * size.line_floats;
      if (h < 0 || h >= p.height) {
        zero(out, size.line_floats);
      } else if (p.channels_last) {
        expand_pixels(image + (n * p.height + h) * p.width * p.channels, o, columns, out);
      } else {
        expand_line(image + (plane * p.height + h) * p.width, columns, out);
      }
    }
  }

 private:
  const DepthwiseConv2dParams& p;
  const PatchSize& size;
  float* const memory;

  // Columns [begin, end) of a patch are in the image, its column 0 is the image's `first`.
  struct Columns {
    int64_t first, begin, end, count;
    int64_t whole_begin, rest_begin, whole_end, rest_end;  // times stride_w, and the rest

    // How many columns of a phase are before `begin` and `end`.
    int64_t begin_of(int64_t phase) const { return whole_begin + (phase < rest_begin); }
    int64_t end_of(int64_t phase) const { return whole_end + (phase < rest_end); }
  };

  void expand_pixels(const T* from, int64_t first, const Columns& columns, float* out) const {
    const int64_t count = std::min(kDepthwiseBlock, depthwise_outputs(p) - first);
    const int64_t step = p.channels;
    from += columns.first * step;
    zero(out, columns.begin * kDepthwiseBlock);
    if (p.multiplier == 1 && count == kDepthwiseBlock) {
      for (int64_t w = columns.begin; w < columns.end; ++w) {
        for_each<kDepthwiseBlock / kLanes>([&](auto i) NNCX_INLINE {
          store_lanes(load_lanes(from + w * step + first + i * kLanes),
                      out + w * kDepthwiseBlock + i * kLanes);
        });
      }
    } else {
      for (int64_t w = columns.begin; w < columns.end; ++w) {
        float* pixel = out + w * kDepthwiseBlock;
        for (int64_t o = 0; o < count; ++o) {
          pixel[o] = load_float(from[w * step + (first + o) / p.multiplier]);
        }
        zero(pixel + count, kDepthwiseBlock - count);
      }
    }
    zero(out + columns.end * kDepthwiseBlock, (columns.count - columns.end) * kDepthwiseBlock);
  }

  void expand_line(const T* from, const Columns& columns, float* out) const {
    const int64_t step = p.stride_w;
    for (int64_t phase = 0; phase < step; ++phase, out += size.phase_floats) {
      const int64_t begin = columns.begin_of(phase), end = columns.end_of(phase);
      zero(out, begin);
      if (step == 1) {
        to_floats(from + columns.first + begin, end - begin, out + begin);
      } else {
        take_each(from + columns.first + begin * step + phase, step, end - begin, out + begin);
      }
      zero(out + end, size.phase_floats - end);
    }
  }
};

}  // namespace
}  // namespace nncx
