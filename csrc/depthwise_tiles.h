// How the vector paths run depthwise_conv2d; a path brings its vectors.
//
//   filters   weights and biases as floats, [vector of outputs][bias, tap 0, tap 1, ...][lanes]
//   patch     a rectangle of output pixels, of one block where channels are innermost, else of one
//             channel. What it reads is first expanded into scratch that stays in the L1 cache: as
//             floats, with the padding written out, a channel repeated for each of its outputs. So
//             the loops below know neither formats nor borders.
//                 channels innermost   [line][column][16], a vector is 8 or 16 channels
//                 pixels innermost     [line][phase][column], a vector is 8 or 16 pixels of a line;
//                                      phase i has the columns i, i + stride_w, i + 2 * stride_w ...,
//                                      so that a tap reads neighbours
//   direct    Expanding costs as much as a third of a 3 x 3 kernel's products. float32 images with
//             channels innermost are read where they lie, all channels of a few pixels at a time,
//             and what would be read of a padding of 1 is left out. Unless a pixel has a multiple
//             of 2 KB: then its neighbours are in the same sets of the L1 cache, and expanding is
//             faster.
//
// Products of a 3 x 3 kernel are limited by the FMA units: its 9 weights stay in registers, and each
// input is loaded once for all of a rectangle of kRows x kColumns sums. Other kernels load an input
// for each product, which the load units just manage.
//
// V, a path's vectors:
//   Floats, kLanes, load, broadcast, fill, fma, clamp(y, low, high) that keeps NaN
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

// And up to kLanes - 1 floats more: patches are filled in the order of their addresses.
inline void zero(float* out, int64_t floats) {
  for (int64_t i = 0; i < floats; i += kLanes) store_lanes(_mm256_setzero_ps(), out + i);
}

template <class T>
inline void to_floats(const T* from, int64_t count, float* to) {
  if (count < kLanes) {
    for (int64_t i = 0; i < count; ++i) to[i] = load_float(from[i]);
    return;
  }
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t at = std::min(i, count - kLanes);  // the last may overlap the one before
    store_lanes(load_lanes(from + at), to + at);
  }
}

// [bias, taps...][kVector] of the outputs from `first` on; those that are not there are zeros.
template <int64_t kVector, class T>
void expand_filters(const DepthwiseConv2dParams& p, int64_t first, float* out) {
  const int64_t taps = p.kernel_h * p.kernel_w;
  const int64_t count = std::clamp(depthwise_outputs(p) - first, int64_t{0}, kVector);
  const T* weight = static_cast<const T*>(p.weight) + first * taps;
  const T* bias = static_cast<const T*>(p.bias);
  if (count < kVector) zero(out, (1 + taps) * kVector);
  int64_t transposed = 0;
  if constexpr (std::is_same_v<T, float>) {
    for (; count == kVector && transposed + kLanes <= taps; transposed += kLanes) {
      for (int64_t o = 0; o < kVector; o += kLanes) {
        transpose_8x8(weight + o * taps + transposed, taps, out + (1 + transposed) * kVector + o,
                      kVector);
      }
    }
  }
  for (int64_t o = 0; o < count; ++o) {
    out[o] = bias ? load_float(bias[first + o]) : 0.0f;
    for (int64_t tap = transposed; tap < taps; ++tap) {
      out[(1 + tap) * kVector + o] = load_float(weight[o * taps + tap]);
    }
  }
}

// `count` numbers that are `step` apart.
template <class T>
void take_each(const T* from, int64_t step, int64_t count, float* to) {
  int64_t i = 0;
  if (step == 2) {  // of two vectors, the first half of each 128 bits and the second
    for (; i + kLanes < count; i += kLanes) {
      const __m256 even =
          _mm256_shuffle_ps(load_lanes(from + 2 * i), load_lanes(from + 2 * i + kLanes), 0x88);
      const __m256i order = _mm256_permute4x64_epi64(_mm256_castps_si256(even), 0xD8);
      store_lanes(_mm256_castsi256_ps(order), to + i);
    }
  }
  for (; i < count; ++i) to[i] = load_float(from[step * i]);
}

// ---------------------------------------------------------------------------------------------
// Sums

// Columns of an image.
struct Evenly {
  int64_t step;
  NNCX_INLINE int64_t operator()(int i) const { return i * step; }
};

// Columns of a patch.
template <int64_t kStep>
struct Fixed {
  NNCX_INLINE int64_t operator()(int i) const { return i * kStep; }
};

// Columns of a line in phases: of 3 taps, the first two and one more of phase 0.
struct InPhases {
  int64_t phase;
  NNCX_INLINE int64_t operator()(int i) const { return i % 2 * phase + i / 2; }
};

// Which of the inputs of a rectangle of sums are padding: its first or last line or column.
struct Edges {
  bool top, bottom, left, right;
  NNCX_INLINE bool any() const { return top || bottom || left || right; }
};

struct NoEdges {
  static constexpr bool top = false, bottom = false, left = false, right = false;
};

// f(row, column, sum) for Rows x Columns sums of 3 x 3 products each, `Stride` inputs apart.
template <class V, int Stride, int Rows, int Columns, class Place, class E, class F>
NNCX_INLINE inline void sum_3x3(const float* from, int64_t line, const Place& place, const E& edges,
                                const typename V::Floats (&weights)[9], typename V::Floats bias,
                                const F& f) {
  constexpr int kLastLine = (Rows - 1) * Stride + 2, kLastColumn = (Columns - 1) * Stride + 2;
  typename V::Floats sums[Rows][Columns];
  for_each<Rows * Columns>([&](auto i) NNCX_INLINE { sums[i / Columns][i % Columns] = bias; });
  for_each<kLastLine + 1>([&](auto h) NNCX_INLINE {
    if ((h == 0 && edges.top) || (h == kLastLine && edges.bottom)) return;
    for_each<kLastColumn + 1>([&](auto w) NNCX_INLINE {
      if ((w == 0 && edges.left) || (w == kLastColumn && edges.right)) return;
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
  for_each<Rows * Columns>(
      [&](auto i) NNCX_INLINE { f(i / Columns, i % Columns, sums[i / Columns][i % Columns]); });
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
    for_each<Count>([&](auto i)
                        NNCX_INLINE { sums[i] = V::fma(V::load(x + i * step), w, sums[i]); });
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
        low(V::fill(params.activation == Activation::none ? -kInfinity : 0)),
        high(V::fill(params.activation == Activation::relu6 ? 6 : kInfinity)),
        stride(fast_stride(params)) {}

  void run(const Conv2dTile& tile) const {
    for (int64_t block = tile.block_begin; block < tile.block_end; ++block) {
      for (int64_t c = 0; c < kDepthwiseBlock; c += V::kLanes) {
        const int64_t first = block * kDepthwiseBlock + c;
        expand_filters<V::kLanes, T>(p, first, filters_of(first));
      }
    }
    place_taps();
    const int64_t end = tile.pixel_end / p.out_width;
    for (int64_t line = tile.pixel_begin / p.out_width; line < end;) {
      const int64_t n = line / p.out_height, y = line % p.out_height;
      const int64_t count = std::min(end - line, p.out_height - y);
      run_image(n, {y, y + count, 0, p.out_width}, tile.block_begin * kDepthwiseBlock,
                std::min(tile.block_end * kDepthwiseBlock, depthwise_outputs(p)));
      line += count;
    }
  }

 private:
  static constexpr float kInfinity = std::numeric_limits<float>::infinity();

  const DepthwiseConv2dParams& p;
  const PatchSize size;
  const Scratch scratch;
  const int64_t taps;
  const Floats low, high;
  const int stride;  // of a 3 x 3 kernel that sum_3x3 takes, else 0

  static int fast_stride(const DepthwiseConv2dParams& p) {
    const bool fast = p.kernel_h == 3 && p.kernel_w == 3 && p.dilation_h == 1 &&
                      p.dilation_w == 1 && p.stride_h == p.stride_w && p.stride_h <= 2;
    return fast ? static_cast<int>(p.stride_h) : 0;
  }

  // Of the vector that begins with `output`.
  float* filters_of(int64_t output) const { return scratch.filters + output * (1 + taps); }

  void place_taps() const {
    for (int64_t i = 0; i < p.kernel_h; ++i) {
      for (int64_t j = 0; j < p.kernel_w; ++j) {
        const int64_t column = j * p.dilation_w;
        const int64_t place = p.channels_last
                                  ? column * kDepthwiseBlock
                                  : column % p.stride_w * size.phase_floats + column / p.stride_w;
        scratch.offsets[i * p.kernel_w + j] = i * p.dilation_h * size.line_floats + place;
      }
    }
  }

  // Outputs [first, end) of one image.
  void run_image(int64_t n, const Rectangle& all, int64_t first, int64_t end) const {
    if constexpr (std::is_same_v<T, float>) {
      if (reads_directly()) {
        if (stride == 1) return run_direct<1>(n, all, first, end - first);
        return run_direct<2>(n, all, first, end - first);
      }
    }
    run_patches(n, first, end, all);
  }

  bool reads_directly() const {
    return stride && p.padding_h <= 1 && p.padding_w <= 1 && p.channels_last && p.multiplier == 1 &&
           p.channels % V::kLanes == 0 && p.channels % 512 != 0;
  }

  NNCX_INLINE Floats finish(Floats y) const { return V::clamp(y, low, high); }

  T* output(int64_t n, int64_t y, int64_t x) const {
    const int64_t pixel = (n * p.out_height + y) * p.out_width + x;
    return static_cast<T*>(p.output) + pixel * depthwise_outputs(p);
  }

  // -------------------------------------------------------------------------------------------
  // Channels innermost

  // Rows x Columns pixels of `channels` channels: all of a cache line are used at once, before
  // neighbours in the same set of the cache take its place.
  template <int Stride, int Rows, int Columns, class Place, class E>
  NNCX_INLINE void sum_channels(const float* from, int64_t line, Place place, E edges,
                                const float* filters, int64_t channels, T* out) const {
    const int64_t step = depthwise_outputs(p), out_line = p.out_width * step;
    for (; channels > 0; channels -= V::kLanes) {
      Floats weights[9];
      for_each<9>([&](auto tap)
                      NNCX_INLINE { weights[tap] = V::load(filters + (1 + tap) * V::kLanes); });
      sum_3x3<V, Stride, Rows, Columns>(from, line, place, edges, weights, V::load(filters),
                                        [&](int row, int x, Floats sum) NNCX_INLINE {
                                          store(sum, out + row * out_line + x * step, channels);
                                        });
      from += V::kLanes;
      filters += 10 * V::kLanes;
      out += V::kLanes;
    }
  }

  NNCX_INLINE void store(Floats sum, T* out, int64_t count) const {
    if (count >= V::kLanes) return V::store(finish(sum), out);
    V::store(finish(sum), out, count);
  }

  template <int Stride>
  void run_direct(int64_t n, const Rectangle& r, int64_t first, int64_t channels) const {
    const int64_t column = p.channels, line = p.width * column;
    const float* image = static_cast<const float*>(p.input) + n * p.height * line + first;
    const float* filters = filters_of(first);
    in_steps<V::kRows>(r.y, r.y_end, [&](auto rows, int64_t y) {
      const int64_t h = y * Stride - p.padding_h;
      const float* from = image + h * line;
      T* out = output(n, y, 0) + first;
      Edges edges;
      edges.top = h < 0, edges.bottom = h + (rows - 1) * Stride + 2 >= p.height;
      in_steps<V::kColumns>(r.x, r.x_end, [&](auto columns, int64_t x) {
        const int64_t w = x * Stride - p.padding_w;
        edges.left = w < 0, edges.right = w + (columns - 1) * Stride + 2 >= p.width;
        const auto sum = [&](auto e) {
          sum_channels<Stride, rows.value, columns.value>(from + w * column, line, Evenly{column},
                                                          e, filters, channels, out + x * column);
        };
        if (edges.any()) {
          sum(edges);
        } else {
          sum(NoEdges{});
        }
      });
    });
  }

  template <int Stride>
  void run_3x3(int64_t n, int64_t first, const Rectangle& r) const {
    const int64_t channels = std::min(kDepthwiseBlock, depthwise_outputs(p) - first);
    in_steps<V::kRows>(r.y, r.y_end, [&](auto rows, int64_t y) {
      const float* line = scratch.patch + (y - r.y) * Stride * size.line_floats;
      in_steps<V::kColumns>(r.x, r.x_end, [&](auto columns, int64_t x) NNCX_INLINE {
        sum_channels<Stride, rows.value, columns.value>(
            line + (x - r.x) * Stride * kDepthwiseBlock, size.line_floats, Fixed<kDepthwiseBlock>{},
            NoEdges{}, filters_of(first), channels, output(n, y, x) + first);
      });
    });
  }

  void run_taps(int64_t n, int64_t first, const Rectangle& r) const {
    const int64_t outputs = depthwise_outputs(p), column = p.stride_w * kDepthwiseBlock;
    const int64_t channels = std::min(kDepthwiseBlock, outputs - first);
    for (int64_t y = r.y; y < r.y_end; ++y) {
      const float* line = scratch.patch + (y - r.y) * p.stride_h * size.line_floats;
      in_steps<8>(r.x, r.x_end, [&](auto columns, int64_t x) NNCX_INLINE {
        T* out = output(n, y, x) + first;
        for (int64_t c = 0; c < channels; c += V::kLanes) {
          const float* filters = filters_of(first + c);
          sum_taps<V, columns.value>(
              line + (x - r.x) * column + c, column, scratch.offsets, taps,
              [&](int64_t tap) NNCX_INLINE { return V::load(filters + (1 + tap) * V::kLanes); },
              V::load(filters),
              [&](int i, Floats sum)
                  NNCX_INLINE { store(sum, out + i * outputs + c, channels - c); });
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
    const float* filter = filters_of(o / V::kLanes * V::kLanes) + o % V::kLanes;
    Floats weights[9];
    for_each<9>([&](auto tap)
                    NNCX_INLINE { weights[tap] = V::broadcast(filter + (1 + tap) * V::kLanes); });
    const Floats bias = V::broadcast(filter);
    const int64_t columns = r.x_end - r.x;
    in_steps<V::kLines>(r.y, r.y_end, [&](auto rows, int64_t y) NNCX_INLINE {
      const float* line = scratch.patch + (y - r.y) * Stride * size.line_floats;
      T* out = plane(n, o, y, r.x);
      along_line(columns, [&](int64_t x) NNCX_INLINE {
        sum_3x3<V, Stride, rows.value, 1>(line + x, size.line_floats, place, NoEdges{}, weights,
                                          bias, [&](int row, int, Floats sum) NNCX_INLINE {
                                            store(sum, out + row * p.out_width + x, columns - x);
                                          });
      });
    });
  }

  void run_plane_taps(int64_t n, int64_t o, const Rectangle& r) const {
    const float* filter = filters_of(o / V::kLanes * V::kLanes) + o % V::kLanes;
    const int64_t columns = r.x_end - r.x, line = p.stride_h * size.line_floats;
    in_steps<8>(r.y, r.y_end, [&](auto rows, int64_t y) NNCX_INLINE {
      T* out = plane(n, o, y, r.x);
      along_line(columns, [&](int64_t x) NNCX_INLINE {
        sum_taps<V, rows.value>(
            scratch.patch + (y - r.y) * line + x, line, scratch.offsets, taps,
            [&](int64_t tap) NNCX_INLINE { return V::broadcast(filter + (1 + tap) * V::kLanes); },
            V::broadcast(filter),
            [&](int row, Floats sum)
                NNCX_INLINE { store(sum, out + row * p.out_width + x, columns - x); });
      });
    });
  }

  // -------------------------------------------------------------------------------------------
  // Patches

  void run_patches(int64_t n, int64_t first, int64_t end, const Rectangle& all) const {
    for (int64_t o = first; o < end; o += p.channels_last ? kDepthwiseBlock : 1) {
      for (int64_t y = all.y; y < all.y_end; y += size.lines) {
        for (int64_t x = all.x; x < all.x_end; x += size.columns) {
          const Rectangle r = {y, std::min(y + size.lines, all.y_end), x,
                               std::min(x + size.columns, all.x_end)};
          expand(n, o, r);
          if (p.channels_last) {
            run_pixels(n, o, r);
          } else {
            run_plane(n, o, r);
          }
        }
      }
    }
  }

  void run_pixels(int64_t n, int64_t first, const Rectangle& r) const {
    if (stride == 1) return run_3x3<1>(n, first, r);
    if (stride == 2) return run_3x3<2>(n, first, r);
    run_taps(n, first, r);
  }

  void run_plane(int64_t n, int64_t o, const Rectangle& r) const {
    if (stride == 1) return run_plane_3x3<1>(n, o, r, Fixed<1>{});
    if (stride == 2) return run_plane_3x3<2>(n, o, r, InPhases{size.phase_floats});
    run_plane_taps(n, o, r);
  }

  // Columns [begin, end) of a patch are in the image, its column 0 is the image's `first`.
  struct Columns {
    int64_t first, begin, end, count;
    int64_t whole_begin, rest_begin, whole_end, rest_end;  // times stride_w, and the rest

    // How many columns of a phase are before `begin` and `end`.
    int64_t begin_of(int64_t phase) const { return whole_begin + (phase < rest_begin); }
    int64_t end_of(int64_t phase) const { return whole_end + (phase < rest_end); }
  };

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
      float* out = scratch.patch + i * size.line_floats;
      if (h < 0 || h >= p.height) {
        zero(out, size.line_floats);
      } else if (p.channels_last) {
        expand_pixels(image + (n * p.height + h) * p.width * p.channels, o, columns, out);
      } else {
        expand_line(image + (plane * p.height + h) * p.width, columns, out);
      }
    }
  }

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
