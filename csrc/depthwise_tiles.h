// How the vector paths run depthwise_conv2d; a path brings its vectors.
//
//   filters   weights and biases as floats, [block of 16 outputs][bias, tap 0, tap 1, ...][16]
//   patch     a rectangle of output pixels, of one block where channels are innermost, else of one
//             channel. What it reads is first expanded into scratch that stays in the L1 cache: as
//             floats, with the padding written out, a channel repeated for each of its outputs. So
//             the loops below know neither formats nor borders.
//                 channels innermost   [line][column][16], a vector is 8 or 16 channels
//                 pixels innermost     [line][phase][column], a vector is 8 or 16 pixels of a line;
//                                      phase i has the columns i, i + stride_w, i + 2 * stride_w ...,
//                                      so that a tap reads neighbours
//   direct    Expanding costs as much as a third of a 3 x 3 kernel's products. float32 images with
//             channels innermost are read where they lie, all but the pixels at the borders, all
//             channels of a few pixels at a time. Unless a pixel has a multiple of 1 KB: then its
//             neighbours are in the same sets of the L1 cache, and expanding is faster.
//
// Products of a 3 x 3 kernel are limited by the FMA units: its 9 weights stay in registers, and each
// input is loaded once for all of a rectangle of kRows x kColumns sums. Other kernels load an input
// for each product, which the load units just manage.
//
// V, a path's vectors:
//   Floats, kLanes, load, broadcast, fma, clamp(y, low, high) that keeps NaN
//   store(y, out), store(y, out, count)     in any format
//   kRows, kColumns                         of sums, with channels innermost
//   kLines                                  of sums, with pixels innermost
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>
#include <type_traits>

#include "avx2/lanes.h"
#include "avx2/transpose.h"
#include "depthwise_conv2d.h"
#include "unroll.h"

namespace nncx {
namespace {

constexpr int64_t kPatchFloats = 5 << 10;  // 20 KB of the L1 cache, if one line is not larger
constexpr int64_t kPatchSlack = 64;        // so many floats may be read beyond a patch
constexpr int64_t kChunk = 6;              // columns whose inputs stay in the L1 cache for all channels

// Output pixels of one image.
struct Rectangle {
  int64_t y, y_end, x, x_end;

  bool empty() const { return y >= y_end || x >= x_end; }
};

// How many positions the taps of `outputs` neighbours span.
constexpr int64_t span(int64_t outputs, int64_t stride, int64_t taps, int64_t dilation) {
  return (outputs - 1) * stride + (taps - 1) * dilation + 1;
}

// The largest patch.
struct PatchSize {
  int64_t lines, columns;        // of outputs
  int64_t line_floats, floats;   // of what it reads
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
    return (columns + (p.kernel_w - 1) * p.dilation_w / p.stride_w + 1) * p.stride_w;
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

// Where the scratch of a call has what.
struct Scratch {
  float* filters;
  int64_t* offsets;  // of a tap, in a patch
  float* patch;
  int64_t bytes;

  static Scratch carve(const DepthwiseConv2dParams& p, const PatchSize& size, uint8_t* memory) {
    const int64_t taps = p.kernel_h * p.kernel_w;
    const int64_t blocks = (depthwise_outputs(p) + kDepthwiseBlock - 1) / kDepthwiseBlock;
    int64_t used = 0;
    const auto take = [&](int64_t bytes) {
      const int64_t at = used;
      used += (bytes + 63) / 64 * 64;
      return memory ? memory + at : nullptr;
    };
    Scratch s;
    s.filters = reinterpret_cast<float*>(take(blocks * (1 + taps) * kDepthwiseBlock * 4));
    s.offsets = reinterpret_cast<int64_t*>(take(taps * 8));
    s.patch = reinterpret_cast<float*>(take(size.floats * 4));
    s.bytes = used;
    return s;
  }
};

// ---------------------------------------------------------------------------------------------
// Formats

template <class T>
inline void to_floats(const T* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store_lanes(load_lanes(from + i), to + i);
  for (; i < count; ++i) to[i] = load_float(from[i]);
}

// One of `blocks` is written: [bias, taps...][16] of outputs from `first` on.
template <class T>
void expand_filters(const DepthwiseConv2dParams& p, int64_t first, float* out) {
  const int64_t taps = p.kernel_h * p.kernel_w;
  const int64_t count = std::min(kDepthwiseBlock, depthwise_outputs(p) - first);
  const T* weight = static_cast<const T*>(p.weight) + first * taps;
  const T* bias = static_cast<const T*>(p.bias);
  for (int64_t o = 0; o < count; ++o) {
    out[o] = bias ? load_float(bias[first + o]) : 0.0f;
    for (int64_t tap = 0; tap < taps; ++tap) {
      out[(1 + tap) * kDepthwiseBlock + o] = load_float(weight[o * taps + tap]);
    }
  }
  for (int64_t row = 0; row <= taps; ++row) {
    for (int64_t o = count; o < kDepthwiseBlock; ++o) out[row * kDepthwiseBlock + o] = 0;
  }
}

// The 16 inputs, or `count` and zeros, of a pixel for the outputs from `first` on.
template <class T>
NNCX_INLINE inline void expand_pixel(const DepthwiseConv2dParams& p, const T* pixel, int64_t first,
                                     int64_t count, float* out) {
  if (p.multiplier == 1 && count == kDepthwiseBlock) {
    store_lanes(load_lanes(pixel + first), out);
    store_lanes(load_lanes(pixel + first + kLanes), out + kLanes);
    return;
  }
  for (int64_t o = 0; o < count; ++o) out[o] = load_float(pixel[(first + o) / p.multiplier]);
  for (int64_t o = count; o < kDepthwiseBlock; ++o) out[o] = 0;
}

inline void zero(float* out, int64_t floats) { std::memset(out, 0, floats * sizeof(float)); }

// ---------------------------------------------------------------------------------------------
// Sums

// Columns of a patch or an image: `step` floats apart.
struct Evenly {
  int64_t step;
  NNCX_INLINE int64_t operator()(int i) const { return i * step; }
};

// Columns of a line in phases: of 3 taps, the first two and one more of phase 0.
struct InPhases {
  int64_t phase;
  NNCX_INLINE int64_t operator()(int i) const { return i % 2 * phase + i / 2; }
};

// f(row, column, sum) for Rows x Columns sums of 3 x 3 products each, `Stride` inputs apart.
template <class V, int Stride, int Rows, int Columns, class Place, class F>
NNCX_INLINE inline void sum_3x3(const float* from, int64_t line, const Place& place,
                                const typename V::Floats (&weights)[9], typename V::Floats bias,
                                const F& f) {
  typename V::Floats sums[Rows][Columns];
  for_each<Rows * Columns>([&](auto i) NNCX_INLINE { sums[i / Columns][i % Columns] = bias; });
  for_each<(Rows - 1) * Stride + 3>([&](auto h) NNCX_INLINE {
    for_each<(Columns - 1) * Stride + 3>([&](auto w) NNCX_INLINE {
      const typename V::Floats x = V::load(from + h * line + place(w));
      for_each<Rows * Columns>([&](auto sum) NNCX_INLINE {
        constexpr int kRow = sum / Columns, kColumn = sum % Columns;
        constexpr int kI = h - kRow * Stride, kJ = w - kColumn * Stride;
        if constexpr (kI >= 0 && kI < 3 && kJ >= 0 && kJ < 3) {
          sums[kRow][kColumn] = V::fma(x, weights[kI * 3 + kJ], sums[kRow][kColumn]);
        }
      });
    });
  });
  for_each<Rows * Columns>([&](auto i) NNCX_INLINE {
    f(i / Columns, i % Columns, sums[i / Columns][i % Columns]);
  });
}

// f(i, sum) for Count sums of any kernel, `step` floats apart.
template <class V, int Count, class Weight, class F>
NNCX_INLINE inline void sum_taps(const float* from, int64_t step, const int64_t* offsets,
                                 int64_t taps, const Weight& weight, typename V::Floats bias,
                                 const F& f) {
  typename V::Floats sums[Count];
  for_each<Count>([&](auto i) NNCX_INLINE { sums[i] = bias; });
  for (int64_t tap = 0; tap < taps; ++tap) {
    const typename V::Floats w = weight(tap);
    const float* x = from + offsets[tap];
    for_each<Count>(
        [&](auto i) NNCX_INLINE { sums[i] = V::fma(V::load(x + i * step), w, sums[i]); });
  }
  for_each<Count>([&](auto i) NNCX_INLINE { f(i, sums[i]); });
}

// f(Index<count>, first) with counts from Most down to 1 that add up to `end - first`.
template <int Most, class F>
NNCX_INLINE inline void in_steps(int64_t first, int64_t end, const F& f) {
  for (; first + Most <= end; first += Most) f(Index<Most>{}, first);
  if constexpr (Most > 1) in_steps<Most - 1 - (Most > 4) * (Most / 2 - 1)>(first, end, f);
}

// ---------------------------------------------------------------------------------------------

template <class V, class T>
class Depthwise {
  using Floats = typename V::Floats;

 public:
  Depthwise(const DepthwiseConv2dParams& params, uint8_t* memory)
      : p(params),
        size(params, V::kLanes),
        scratch(Scratch::carve(params, size, memory)),
        taps(params.kernel_h * params.kernel_w),
        low(params.activation == Activation::none ? -kInfinity : 0),
        high(params.activation == Activation::relu6 ? 6 : kInfinity),
        stride(fast_stride(params)) {}

  void run(const Conv2dTile& tile) const {
    for (int64_t block = tile.block_begin; block < tile.block_end; ++block) {
      expand_filters<T>(p, block * kDepthwiseBlock, filters_of(block));
    }
    place_taps();
    const int64_t end = tile.pixel_end / p.out_width;
    for (int64_t line = tile.pixel_begin / p.out_width; line < end;) {
      const int64_t n = line / p.out_height, y = line % p.out_height;
      const int64_t count = std::min(end - line, p.out_height - y);
      run_image(n, {y, y + count, 0, p.out_width}, tile.block_begin, tile.block_end);
      line += count;
    }
  }

 private:
  static constexpr float kInfinity = std::numeric_limits<float>::infinity();

  const DepthwiseConv2dParams& p;
  const PatchSize size;
  const Scratch scratch;
  const int64_t taps;
  const float low, high;
  const int stride;  // of a 3 x 3 kernel that sum_3x3 takes, else 0

  static int fast_stride(const DepthwiseConv2dParams& p) {
    const bool fast = p.kernel_h == 3 && p.kernel_w == 3 && p.dilation_h == 1 &&
                      p.dilation_w == 1 && p.stride_h == p.stride_w && p.stride_h <= 2;
    return fast ? static_cast<int>(p.stride_h) : 0;
  }

  float* filters_of(int64_t block) const {
    return scratch.filters + block * (1 + taps) * kDepthwiseBlock;
  }

  void place_taps() const {
    for (int64_t i = 0; i < p.kernel_h; ++i) {
      for (int64_t j = 0; j < p.kernel_w; ++j) {
        const int64_t column = j * p.dilation_w;
        const int64_t place = p.channels_last ? column * kDepthwiseBlock
                                              : column % p.stride_w * size.phase_floats +
                                                    column / p.stride_w;
        scratch.offsets[i * p.kernel_w + j] = i * p.dilation_h * size.line_floats + place;
      }
    }
  }

  void run_image(int64_t n, const Rectangle& all, int64_t block, int64_t block_end) const {
    if (!p.channels_last) {
      const int64_t end = std::min(block_end * kDepthwiseBlock, depthwise_outputs(p));
      for (int64_t o = block * kDepthwiseBlock; o < end; ++o) run_patches(n, o, all);
      return;
    }
    if constexpr (std::is_same_v<T, float>) {
      const int64_t direct_end = std::min(block_end, p.channels / kDepthwiseBlock);
      const Rectangle inner = inside(all);
      if (stride && p.multiplier == 1 && p.channels % 256 != 0 && block < direct_end &&
          !inner.empty()) {
        if (stride == 1) run_direct<1>(n, inner, block, direct_end);
        if (stride == 2) run_direct<2>(n, inner, block, direct_end);
        for (; block < direct_end; ++block) {
          run_patches(n, block, {all.y, inner.y, all.x, all.x_end});
          run_patches(n, block, {inner.y, inner.y_end, all.x, inner.x});
          run_patches(n, block, {inner.y, inner.y_end, inner.x_end, all.x_end});
          run_patches(n, block, {inner.y_end, all.y_end, all.x, all.x_end});
        }
      }
    }
    for (; block < block_end; ++block) run_patches(n, block, all);
  }

  // Those of the outputs whose taps all fall into the image.
  Rectangle inside(const Rectangle& all) const {
    const auto begin = [](int64_t padding, int64_t stride) {
      return (padding + stride - 1) / stride;
    };
    const auto end = [](int64_t size, int64_t padding, int64_t stride) {
      return size + padding < 3 ? 0 : (size + padding - 3) / stride + 1;
    };
    Rectangle r;
    r.y = std::clamp(begin(p.padding_h, p.stride_h), all.y, all.y_end);
    r.x = std::clamp(begin(p.padding_w, p.stride_w), all.x, all.x_end);
    r.y_end = std::clamp(end(p.height, p.padding_h, p.stride_h), r.y, all.y_end);
    r.x_end = std::clamp(end(p.width, p.padding_w, p.stride_w), r.x, all.x_end);
    return r;
  }

  NNCX_INLINE Floats finish(Floats y) const { return V::clamp(y, low, high); }

  T* output(int64_t n, int64_t y, int64_t x) const {
    const int64_t pixel = (n * p.out_height + y) * p.out_width + x;
    return static_cast<T*>(p.output) + pixel * depthwise_outputs(p);
  }

  // -------------------------------------------------------------------------------------------
  // Channels innermost

  // Rows x Columns pixels of a block of 3 x 3 filters. Both halves of a cache line are used at
  // once, before neighbours in the same set of the cache take its place.
  template <int Stride, int Rows, int Columns>
  NNCX_INLINE void sum_block(const float* from, int64_t line, int64_t column, const float* filters,
                             int64_t count, T* out) const {
    const int64_t step = depthwise_outputs(p), out_line = p.out_width * step;
    for (int64_t c = 0; c < kDepthwiseBlock; c += V::kLanes) {
      Floats weights[9];
      for_each<9>([&](auto tap) NNCX_INLINE {
        weights[tap] = V::load(filters + (1 + tap) * kDepthwiseBlock + c);
      });
      sum_3x3<V, Stride, Rows, Columns>(
          from + c, line, Evenly{column}, weights, V::load(filters + c),
          [&](int row, int x, Floats sum) NNCX_INLINE {
            store(sum, out + row * out_line + x * step + c, count - c);
          });
    }
  }

  NNCX_INLINE void store(Floats sum, T* out, int64_t count) const {
    if (count >= V::kLanes) return V::store(finish(sum), out);
    if (count > 0) V::store(finish(sum), out, count);
  }

  template <int Stride>
  void run_direct(int64_t n, const Rectangle& r, int64_t block_begin, int64_t block_end) const {
    const int64_t column = p.channels, line = p.width * column;
    in_steps<V::kRows>(r.y, r.y_end, [&](auto rows, int64_t y) {
      for (int64_t x = r.x; x < r.x_end; x += kChunk) {
        const int64_t x_end = std::min(x + kChunk, r.x_end);
        const float* from = static_cast<const float*>(p.input) +
                            (n * p.height + y * Stride - p.padding_h) * line +
                            (x * Stride - p.padding_w) * column;
        for (int64_t block = block_begin; block < block_end; ++block) {
          const int64_t first = block * kDepthwiseBlock;
          in_steps<V::kColumns>(0, x_end - x, [&](auto columns, int64_t at) NNCX_INLINE {
            sum_block<Stride, rows.value, columns.value>(
                from + at * Stride * column + first, line, column, filters_of(block),
                kDepthwiseBlock, output(n, y, x + at) + first);
          });
        }
      }
    });
  }

  template <int Stride>
  void run_3x3(int64_t n, int64_t block, const Rectangle& r) const {
    const int64_t first = block * kDepthwiseBlock;
    const int64_t count = depthwise_outputs(p) - first;
    in_steps<V::kRows>(r.y, r.y_end, [&](auto rows, int64_t y) {
      in_steps<V::kColumns>(r.x, r.x_end, [&](auto columns, int64_t x) NNCX_INLINE {
        const float* from = scratch.patch + (y - r.y) * Stride * size.line_floats +
                            (x - r.x) * Stride * kDepthwiseBlock;
        sum_block<Stride, rows.value, columns.value>(from, size.line_floats, kDepthwiseBlock,
                                                     filters_of(block), count,
                                                     output(n, y, x) + first);
      });
    });
  }

  void run_taps(int64_t n, int64_t block, const Rectangle& r) const {
    const int64_t first = block * kDepthwiseBlock, step = depthwise_outputs(p);
    for (int64_t y = r.y; y < r.y_end; ++y) {
      const float* line = scratch.patch + (y - r.y) * p.stride_h * size.line_floats;
      in_steps<8>(r.x, r.x_end, [&](auto columns, int64_t x) NNCX_INLINE {
        for (int64_t c = 0; c < kDepthwiseBlock; c += V::kLanes) {
          const float* filters = filters_of(block) + c;
          const int64_t column = p.stride_w * kDepthwiseBlock;
          sum_taps<V, columns.value>(
              line + (x - r.x) * column + c, column, scratch.offsets, taps,
              [&](int64_t tap) NNCX_INLINE {
                return V::load(filters + (1 + tap) * kDepthwiseBlock);
              },
              V::load(filters), [&](int i, Floats sum) NNCX_INLINE {
                store(sum, output(n, y, x + i) + first + c, step - first - c);
              });
        }
      });
    }
  }

  // -------------------------------------------------------------------------------------------
  // Pixels innermost

  // Vectors of a line that is at least one wide end with it: the last may overlap the one before.
  template <class F>
  NNCX_INLINE void along_line(int64_t columns, const F& f) const {
    for (int64_t x = 0; x < columns; x += V::kLanes) {
      f(columns < V::kLanes ? 0 : std::min<int64_t>(x, columns - V::kLanes));
    }
  }

  T* plane(int64_t n, int64_t o, int64_t y, int64_t x) const {
    return static_cast<T*>(p.output) +
           ((n * depthwise_outputs(p) + o) * p.out_height + y) * p.out_width + x;
  }

  template <int Stride, class Place>
  void run_plane_3x3(int64_t n, int64_t o, const Rectangle& r, const Place& place) const {
    const float* filter = filters_of(o / kDepthwiseBlock) + o % kDepthwiseBlock;
    Floats weights[9];
    for_each<9>([&](auto tap) NNCX_INLINE {
      weights[tap] = V::broadcast(filter + (1 + tap) * kDepthwiseBlock);
    });
    const Floats bias = V::broadcast(filter);
    const int64_t columns = r.x_end - r.x;
    in_steps<V::kLines>(r.y, r.y_end, [&](auto rows, int64_t y) NNCX_INLINE {
      const float* line = scratch.patch + (y - r.y) * Stride * size.line_floats;
      T* out = plane(n, o, y, r.x);
      along_line(columns, [&](int64_t x) NNCX_INLINE {
        sum_3x3<V, Stride, rows.value, 1>(line + x, size.line_floats, place, weights, bias,
                                          [&](int row, int, Floats sum) NNCX_INLINE {
                                            store(sum, out + row * p.out_width + x, columns - x);
                                          });
      });
    });
  }

  void run_plane_taps(int64_t n, int64_t o, const Rectangle& r) const {
    const float* filter = filters_of(o / kDepthwiseBlock) + o % kDepthwiseBlock;
    const int64_t columns = r.x_end - r.x, line = p.stride_h * size.line_floats;
    in_steps<8>(r.y, r.y_end, [&](auto rows, int64_t y) NNCX_INLINE {
      T* out = plane(n, o, y, r.x);
      along_line(columns, [&](int64_t x) NNCX_INLINE {
        sum_taps<V, rows.value>(
            scratch.patch + (y - r.y) * line + x, line, scratch.offsets, taps,
            [&](int64_t tap) NNCX_INLINE {
              return V::broadcast(filter + (1 + tap) * kDepthwiseBlock);
            },
            V::broadcast(filter), [&](int row, Floats sum) NNCX_INLINE {
              store(sum, out + row * p.out_width + x, columns - x);
            });
      });
    });
  }

  // -------------------------------------------------------------------------------------------
  // Patches

  // `unit`: a block where channels are innermost, else an output channel.
  void run_patches(int64_t n, int64_t unit, const Rectangle& all) const {
    for (int64_t y = all.y; y < all.y_end; y += size.lines) {
      for (int64_t x = all.x; x < all.x_end; x += size.columns) {
        const Rectangle r = {y, std::min(y + size.lines, all.y_end), x,
                             std::min(x + size.columns, all.x_end)};
        expand(n, unit, r);
        if (p.channels_last) {
          if (stride == 1) {
            run_3x3<1>(n, unit, r);
          } else if (stride == 2) {
            run_3x3<2>(n, unit, r);
          } else {
            run_taps(n, unit, r);
          }
        } else if (stride == 1) {
          run_plane_3x3<1>(n, unit, r, Evenly{1});
        } else if (stride == 2) {
          run_plane_3x3<2>(n, unit, r, InPhases{size.phase_floats});
        } else {
          run_plane_taps(n, unit, r);
        }
      }
    }
  }

  void expand(int64_t n, int64_t unit, const Rectangle& r) const {
    const int64_t lines = span(r.y_end - r.y, p.stride_h, p.kernel_h, p.dilation_h);
    const int64_t first_line = r.y * p.stride_h - p.padding_h;
    const int64_t first = r.x * p.stride_w - p.padding_w;
    const int64_t columns = span(r.x_end - r.x, p.stride_w, p.kernel_w, p.dilation_w);
    for (int64_t i = 0; i < lines; ++i) {
      const int64_t h = first_line + i;
      float* out = scratch.patch + i * size.line_floats;
      if (h < 0 || h >= p.height) {
        zero(out, size.line_floats);
      } else if (p.channels_last) {
        expand_pixels(n * p.height + h, unit * kDepthwiseBlock, first, columns, out);
      } else {
        expand_line((n * p.channels + unit / p.multiplier) * p.height + h, first, columns, out);
      }
    }
  }

  // Columns [first, first + columns), which may reach out of the image, of a line of all.
  void expand_pixels(int64_t line, int64_t output, int64_t first, int64_t columns,
                     float* out) const {
    const T* from = static_cast<const T*>(p.input) + line * p.width * p.channels;
    const int64_t count = std::min(kDepthwiseBlock, depthwise_outputs(p) - output);
    const int64_t begin = std::clamp(-first, int64_t{0}, columns);
    const int64_t end = std::clamp(p.width - first, begin, columns);
    zero(out, begin * kDepthwiseBlock);
    for (int64_t w = begin; w < end; ++w) {
      expand_pixel(p, from + (first + w) * p.channels, output, count, out + w * kDepthwiseBlock);
    }
    zero(out + end * kDepthwiseBlock, (columns - end) * kDepthwiseBlock);
  }

  void expand_line(int64_t line, int64_t first, int64_t columns, float* out) const {
    const T* from = static_cast<const T*>(p.input) + line * p.width;
    const int64_t begin = std::clamp(-first, int64_t{0}, columns);
    const int64_t end = std::clamp(p.width - first, begin, columns);
    if (p.stride_w == 1) {
      zero(out, begin);
      to_floats(from + first + begin, end - begin, out + begin);
      return zero(out + end, size.line_floats - end);
    }
    zero(out, size.line_floats);
    for (int64_t w = begin; w < end; ++w) {
      out[w % p.stride_w * size.phase_floats + w / p.stride_w] = load_float(from[first + w]);
    }
  }
};

template <class V>
int64_t scratch_bytes(const DepthwiseConv2dParams& p) {
  return Scratch::carve(p, PatchSize(p, V::kLanes), nullptr).bytes;
}

template <class V>
void run_depthwise(const DepthwiseConv2dParams& p, const Conv2dTile& tile, uint8_t* scratch) {
  switch (p.dtype) {
    case Dtype::float32:
      return Depthwise<V, float>(p, scratch).run(tile);
    case Dtype::float16:
      return Depthwise<V, Half>(p, scratch).run(tile);
    case Dtype::bfloat16:
      return Depthwise<V, BFloat16>(p, scratch).run(tile);
    case Dtype::float64:
      return;  // the op refuses it
  }
}

}  // namespace
}  // namespace nncx
