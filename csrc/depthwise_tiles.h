// How the vector paths run depthwise_conv2d; a path brings its vectors.
//
//   planes    float32 images with pixels innermost and 3 x 3 kernels are read where they lie:
//             depthwise_planes.h. All others need
//   filters   weights and biases as floats, [vector of outputs][bias, tap 0, tap 1, ...][lanes], and
//   patch     the input, rectangle by rectangle, expanded into scratch: depthwise_patch.h.
//   direct    Expanding costs as much as a third of a 3 x 3 kernel's products. float32 images with
//             channels innermost are read where they lie, all channels of a few pixels at a time,
//             and what would be read of a padding of 1 is left out. Expanding them takes 1.2 times
//             as long (128 channels, 56 x 56), and as long where a pixel has 4 KB, so that its
//             neighbours are in the same sets of the L1 cache.
//
// Products of a 3 x 3 kernel are limited by the FMA units: its 9 weights stay in registers, and each
// input is loaded once for all of a rectangle of kRows x kColumns sums. Other kernels load an input
// for each product, which the load units just manage.
//
// V, a path's vectors, for the headers that this one includes too:
//   Floats, kLanes, load, broadcast, fill, fma, clamp(y, low, high) that keeps NaN
//   store(y, out), store(y, out, count)     in any format
//   kRows, kColumns                         of sums, with channels innermost
//   kLines                                  of sums, with pixels innermost
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "avx2/lanes.h"
#include "depthwise_conv2d.h"
#include "depthwise_formats.h"
#include "depthwise_patch.h"
#include "depthwise_planes.h"
#include "depthwise_sums.h"
#include "unroll.h"

namespace nncx {
namespace {

// The stride of a 3 x 3 kernel that sum_3x3 takes, else 0.
inline int fast_stride(const DepthwiseConv2dParams& p) {
  const bool fast = p.kernel_h == 3 && p.kernel_w == 3 && p.dilation_h == 1 && p.dilation_w == 1 &&
                    p.stride_h == p.stride_w && p.stride_h <= 2;
  return fast ? static_cast<int>(p.stride_h) : 0;
}

inline bool pads_little(const DepthwiseConv2dParams& p) {
  return p.padding_h <= 1 && p.padding_w <= 1;
}

inline bool reads_planes(const DepthwiseConv2dParams& p) {
  return !p.channels_last && p.dtype == Dtype::float32 && fast_stride(p) && pads_little(p);
}

inline int64_t end_of_outputs(const DepthwiseConv2dParams& p, const Conv2dTile& tile) {
  return std::min(tile.block_end * kDepthwiseBlock, depthwise_outputs(p));
}

// f(n, y, y_end) for the images of a tile, and their lines that it has.
template <class F>
void for_each_image(const DepthwiseConv2dParams& p, const Conv2dTile& tile, const F& f) {
  const int64_t end = tile.pixel_end / p.out_width;
  for (int64_t line = tile.pixel_begin / p.out_width; line < end;) {
    const int64_t n = line / p.out_height, y = line % p.out_height;
    const int64_t count = std::min(end - line, p.out_height - y);
    f(n, y, y + count);
    line += count;
  }
}

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

template <class V, class T>
class Depthwise {
  using Floats = typename V::Floats;

 public:
  Depthwise(const DepthwiseConv2dParams& params, uint8_t* memory)
      : p(params),
        size(params, V::kLanes),
        scratch(Scratch::carve(params, size, memory)),
        patch(params, size, scratch.patch),
        taps(params.kernel_h * params.kernel_w),
        activated(params.activation),
        stride(fast_stride(params)) {}

  void run(const Conv2dTile& tile) const {
    for (int64_t block = tile.block_begin; block < tile.block_end; ++block) {
      for (int64_t c = 0; c < kDepthwiseBlock; c += V::kLanes) {
        const int64_t first = block * kDepthwiseBlock + c;
        expand_filters<V::kLanes, T>(p, first, filters_of(first));
      }
    }
    place_taps();
    const int64_t first = tile.block_begin * kDepthwiseBlock;
    for_each_image(p, tile, [&](int64_t n, int64_t y, int64_t y_end) {
      run_image(n, {y, y_end, 0, p.out_width}, first, end_of_outputs(p, tile));
    });
  }

 private:
  const DepthwiseConv2dParams& p;
  const PatchSize size;
  const Scratch scratch;
  const Patch<T> patch;
  const int64_t taps;
  const Activated<V> activated;
  const int stride;  // of a 3 x 3 kernel that sum_3x3 takes, else 0

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
    return stride && pads_little(p) && p.channels_last && p.multiplier == 1 &&
           p.channels % V::kLanes == 0;
  }

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
      sum_3x3<V, Stride, Rows, Columns>(
          Lines<V, Place>{from, line, place}, edges, weights, V::load(filters),
          [&](int row, int x, Floats sum)
              NNCX_INLINE { store(sum, out + row * out_line + x * step, channels); });
      from += V::kLanes;
      filters += 10 * V::kLanes;
      out += V::kLanes;
    }
  }

  NNCX_INLINE void store(Floats sum, T* out, int64_t count) const {
    if (count >= V::kLanes) return V::store(activated(sum), out);
    V::store(activated(sum), out, count);
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
      const float* line = patch.line((y - r.y) * Stride);
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
      const float* line = patch.line((y - r.y) * p.stride_h);
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
      const float* line = patch.line((y - r.y) * Stride);
      T* out = plane(n, o, y, r.x);
      along_line(columns, [&](int64_t x) NNCX_INLINE {
        sum_3x3<V, Stride, rows.value, 1>(
            Lines<V, Place>{line + x, size.line_floats, place}, NoEdges{}, weights, bias,
            [&](int row, int, Floats sum)
                NNCX_INLINE { store(sum, out + row * p.out_width + x, columns - x); });
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
            patch.line((y - r.y) * p.stride_h) + x, line, scratch.offsets, taps,
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
          patch.expand(n, o, r);
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
};

template <class V, int Stride>
void run_planes(const DepthwiseConv2dParams& p, const Conv2dTile& tile) {
  const Planes<V, Stride> planes(p);
  const int64_t first = tile.block_begin * kDepthwiseBlock;
  for_each_image(p, tile, [&](int64_t n, int64_t y, int64_t y_end) {
    planes.run(n, first, end_of_outputs(p, tile), y, y_end);
  });
}

template <class V>
int64_t scratch_bytes(const DepthwiseConv2dParams& p) {
  if (reads_planes(p)) return 0;
  return Scratch::carve(p, PatchSize(p, V::kLanes), nullptr).bytes;
}

template <class V>
void run_depthwise(const DepthwiseConv2dParams& p, const Conv2dTile& tile, uint8_t* scratch) {
  if (reads_planes(p)) {
    return fast_stride(p) == 1 ? run_planes<V, 1>(p, tile) : run_planes<V, 2>(p, tile);
  }
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
