// How the vector paths run grouped_conv2d: a product of the weight, as torch has it, and of panels
// that the input is gathered into. Nothing of the weight is packed, so that a network with large
// weights and small images pays nothing for each call.
//
//   panel   kWidth output pixels of one group and image, float32: panel[term][pixel], the terms in
//           the weight's order [channel][tap], padding written out as zeros
//   strip   neighbouring panels that stay in the L2 cache while the group's blocks of outputs pass
//   tile    up to kRows outputs x 2 vectors of pixels, or 2 * kRows x 1 vector where a panel has no
//           more: sums that live in registers
//
// Sums of float32 with pixels innermost go straight into the output. All others pass through a tile
// in memory, where they are turned or rounded.
//
// A 1 x 1 kernel over many float32 pixels with channels innermost changes the roles: the weight is
// turned into panels of outputs, panel[channel][output], and the sums are those of pixels, read where
// they are, x vectors of outputs. The terms have the same order, and the sums the same bits.
//
// A `V` gives Floats, kLanes, kRows and load, store, broadcast, set, fma, at_least, at_most, and its
// path's channel_shuffle.
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>
#include <type_traits>

#include "avx2/lanes.h"
#include "avx2/transpose.h"
#include "grouped_conv2d.h"
#include "unroll.h"

namespace nncx {
namespace {

constexpr int64_t kStripBytes = 1 << 18;  // of panels, if one is not larger

template <class V>
constexpr int64_t kWidth = 2 * V::kLanes;

inline int64_t terms(const Conv2dWeightShape& s) { return s.channels * s.taps; }

template <class V>
int64_t strip_panels(const GroupedConv2dParams& p) {
  const int64_t panel_bytes = terms(p.shape) * kWidth<V> * static_cast<int64_t>(sizeof(float));
  const int64_t image = (p.out_height * p.out_width + kWidth<V> - 1) / kWidth<V>;
  return std::clamp<int64_t>(kStripBytes / std::max<int64_t>(panel_bytes, 1), 1, image);
}

// Pixels that pass through memory before their channels are shuffled, if their weight is turned.
constexpr int64_t kTurnedPixels = 40;  // of a tile at least, for a turned weight to pay

inline int64_t shuffled_pixels(const GroupedConv2dParams& p) {
  const int64_t pixel = p.shape.groups * p.shape.out_channels * static_cast<int64_t>(sizeof(float));
  return std::min(std::max(kStripBytes / pixel, kTurnedPixels),
                  p.batch * p.out_height * p.out_width);
}

// The scratch of a call.
template <class V>
struct Scratch {
  float* panels;
  uint8_t* zeros;  // the channels of a group at a pixel outside the image
  float* sums;     // of the shuffled_pixels

  Scratch(const GroupedConv2dParams& p, uint8_t* memory)
      : panels(reinterpret_cast<float*>(memory)),
        zeros(memory + panel_bytes(p)),
        sums(reinterpret_cast<float*>(zeros + zero_bytes(p))) {
    std::memset(zeros, 0, zero_bytes(p));
  }

  static int64_t bytes(const GroupedConv2dParams& p) {
    return panel_bytes(p) + zero_bytes(p) + sum_bytes(p);
  }

 private:
  static int64_t panel_bytes(const GroupedConv2dParams& p) {
    return strip_panels<V>(p) * terms(p.shape) * kWidth<V> * static_cast<int64_t>(sizeof(float));
  }
  static int64_t zero_bytes(const GroupedConv2dParams& p) {
    return (p.shape.channels * static_cast<int64_t>(sizeof(float)) + 63) / 64 * 64;
  }
  static int64_t sum_bytes(const GroupedConv2dParams& p) {
    if (p.shuffle == 1 || p.shape.taps > 1 || !p.channels_last) return 0;
    return shuffled_pixels(p) * p.shape.groups * p.shape.out_channels *
           static_cast<int64_t>(sizeof(float));
  }
};

// Neighbouring output pixels of one image that fill a panel.
struct Pixels {
  int64_t n, first, count;
};

// ---------------------------------------------------------------------------------------------
// Panels

// For each pixel of a panel, the pixel of the input image that a tap reads, or -1 for padding.
template <class V>
struct Sources {
  int64_t at[kWidth<V>];

  Sources(const GroupedConv2dParams& p, const Pixels& pixels, int64_t i, int64_t j) {
    int64_t y = pixels.first / p.out_width, x = pixels.first % p.out_width;
    for (int64_t l = 0; l < kWidth<V>; ++l) {
      const int64_t h = tap_position(y, p.stride_h, p.padding_h, i, p.dilation_h);
      const int64_t w = tap_position(x, p.stride_w, p.padding_w, j, p.dilation_w);
      const bool inside = l < pixels.count && h >= 0 && h < p.height && w >= 0 && w < p.width;
      at[l] = inside ? h * p.width + w : -1;
      if (++x == p.out_width) {
        x = 0;
        ++y;
      }
    }
  }

  bool are_neighbours() const {
    for (int64_t l = 0; l < kWidth<V>; ++l) {
      if (at[l] < 0 || at[l] != at[0] + l) return false;
    }
    return true;
  }
};

// One tap of all channels, pixels innermost.
template <class V, class T>
void pack_planes(const GroupedConv2dParams& p, const T* planes, const Sources<V>& sources,
                 float* panel) {
  const int64_t image = p.height * p.width, step = p.shape.taps * kWidth<V>;
  if (sources.are_neighbours()) {
    planes += sources.at[0];
    for (int64_t c = 0; c < p.shape.channels; ++c, planes += image, panel += step) {
      for_each<kWidth<V> / kLanes>([&](auto v) NNCX_INLINE {
        store_lanes(load_lanes(planes + v * kLanes), panel + v * kLanes);
      });
    }
    return;
  }
  for (int64_t c = 0; c < p.shape.channels; ++c, planes += image, panel += step) {
    for (int64_t l = 0; l < kWidth<V>; ++l) {
      panel[l] = sources.at[l] < 0 ? 0.0f : load_float(planes[sources.at[l]]);
    }
  }
}

// panel[c][i] = rows[i][c] of 8 rows: squares of 8 x 8, transposed. `step` from c to c + 1.
template <class T>
void turn_rows(const T* const* rows, int64_t channels, int64_t step, float* panel) {
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) {
    __m256 y[kLanes];
    for_each<kLanes>([&](auto i) NNCX_INLINE { y[i] = load_lanes(rows[i] + c); });
    transpose_8x8(y);
    for_each<kLanes>([&](auto i) NNCX_INLINE { store_lanes(y[i], panel + (c + i) * step); });
  }
  for (; c < channels; ++c) {
    for (int64_t i = 0; i < kLanes; ++i) panel[c * step + i] = load_float(rows[i][c]);
  }
}

// One tap of all channels, channels innermost.
template <class V, class T>
void pack_pixels(const GroupedConv2dParams& p, const T* image, const T* zeros,
                 const Sources<V>& sources, float* panel) {
  const int64_t channels = p.shape.channels, all = p.shape.groups * channels;
  for (int64_t l = 0; l < kWidth<V>; l += kLanes) {
    const T* pixels[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) {
      const int64_t at = sources.at[l + i];
      pixels[i] = at < 0 ? zeros : image + at * all;
    }
    turn_rows(pixels, channels, p.shape.taps * kWidth<V>, panel + l);
  }
}

template <class V, class T>
void pack(const GroupedConv2dParams& p, int64_t group, const Pixels& pixels, const uint8_t* zeros,
          float* panel) {
  const int64_t first = group * p.shape.channels;
  const int64_t all = p.shape.groups * p.shape.channels, image = p.height * p.width;
  const T* input = static_cast<const T*>(p.input) + pixels.n * all * image;
  for (int64_t i = 0; i < p.kernel_h; ++i) {
    for (int64_t j = 0; j < p.kernel_w; ++j, panel += kWidth<V>) {
      const Sources<V> sources(p, pixels, i, j);
      if (p.channels_last) {
        pack_pixels<V, T>(p, input + first, reinterpret_cast<const T*>(zeros), sources, panel);
      } else {
        pack_planes<V, T>(p, input + first * image, sources, panel);
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------
// Tiles

struct Limits {
  float lowest, highest;

  explicit Limits(Activation activation)
      : lowest(activation == Activation::none ? -std::numeric_limits<float>::infinity() : 0),
        highest(activation == Activation::relu6 ? 6 : std::numeric_limits<float>::infinity()) {}
};

// One factor of a product: rows of terms, `step` apart.
struct Rows {
  const float* terms;
  int64_t step;

  Rows from(int64_t row) const { return {terms + row * step, step}; }
};

// out[r][lane] = bias(r, vector) + the sum of rows[r][k] * panel[k][lane] of Count rows and Vectors
// of the panel.
template <class V, int Count, int Vectors, class Bias>
void multiply(Rows rows, const Bias& bias, int64_t terms, const float* panel, Limits limits,
              float* const* out) {
  typename V::Floats acc[Count * Vectors];
  for_each<Count>([&](auto r) NNCX_INLINE {
    for_each<Vectors>([&](auto v) NNCX_INLINE { acc[r * Vectors + v] = bias(r, v); });
  });
  constexpr int kBases = (Count + 2) / 3;  // pointers, each of three rows: all would not fit
  const float* bases[kBases];
  for_each<kBases>([&](auto i) NNCX_INLINE { bases[i] = rows.from(3 * i).terms; });
  for (int64_t k = 0; k < terms; ++k, panel += kWidth<V>) {
    typename V::Floats x[Vectors];
    for_each<Vectors>([&](auto v) NNCX_INLINE { x[v] = V::load(panel + v * V::kLanes); });
    for_each<Count>([&](auto r) NNCX_INLINE {
      const auto w = V::broadcast(bases[r / 3] + r % 3 * rows.step);
      for_each<Vectors>([&](auto v) NNCX_INLINE {
        acc[r * Vectors + v] = V::fma(w, x[v], acc[r * Vectors + v]);
      });
    });
    for_each<kBases>([&](auto i) NNCX_INLINE { ++bases[i]; });
  }
  const auto lowest = V::set(limits.lowest), highest = V::set(limits.highest);
  for_each<Count>([&](auto r) NNCX_INLINE {
    for_each<Vectors>([&](auto v) NNCX_INLINE {
      V::store(out[r] + v * V::kLanes,
               V::at_most(highest, V::at_least(lowest, acc[r * Vectors + v])));
    });
  });
}

template <class V, int Vectors, int Count = V::kRows * 2 / Vectors, class Bias>
void multiply_rows(int64_t count, Rows rows, const Bias& bias, int64_t terms, const float* panel,
                   Limits limits, float* const* out) {
  if constexpr (Count > 0) {
    if (count < Count) {
      return multiply_rows<V, Vectors, Count - 1>(count, rows, bias, terms, panel, limits, out);
    }
    multiply<V, Count, Vectors>(rows, bias, terms, panel, limits, out);
  }
}

// Calls tile(first, end) for equal tiles of `count` rows.
template <class V, int Vectors, class Tile>
void for_tiles(int64_t count, const Tile& tile) {
  constexpr int64_t kRows = V::kRows * 2 / Vectors;
  const int64_t tiles = (count + kRows - 1) / kRows;
  for (int64_t i = 0; i < tiles; ++i) tile(count * i / tiles, count * (i + 1) / tiles);
}

template <class V, int Vectors>
void multiply_block(const GroupedConv2dParams& p, int64_t o, int64_t outputs, const float* panel,
                    float* const* out) {
  const int64_t all = terms(p.shape);
  for_tiles<V, Vectors>(outputs, [&](int64_t first, int64_t end) {
    const float* biases = p.bias ? p.bias + o + first : nullptr;
    const auto bias = [&](int r, int) NNCX_INLINE { return V::set(biases ? biases[r] : 0.0f); };
    multiply_rows<V, Vectors>(end - first, {p.weight + (o + first) * all, all}, bias, all, panel,
                              Limits(p.activation), out + first);
  });
}

// ---------------------------------------------------------------------------------------------
// Output

template <class T>
NNCX_INLINE inline void store_some(__m256 y, T* out, int64_t count) {
  if (count >= kLanes) return store_lanes(y, out);
  T all[kLanes];
  store_lanes(y, all);
  std::memcpy(out, all, count * sizeof(T));
}

// A block of sums, sums[output][pixel], into planes of the output.
template <class V, class T>
void store_planes(const float* sums, int64_t outputs, int64_t pixels, T* const* out) {
  for (int64_t o = 0; o < outputs; ++o, sums += kWidth<V>) {
    for (int64_t l = 0; l < pixels; l += kLanes) {
      store_some(_mm256_loadu_ps(sums + l), out[o] + l, pixels - l);
    }
  }
}

// The same with channels innermost: pixel after pixel, `channels` apart, `step` between outputs.
template <class V, class T>
void store_pixels(const float* sums, int64_t outputs, int64_t pixels, int64_t channels,
                  int64_t step, T* out) {
  for (int64_t l = 0; l < pixels; l += kLanes) {
    for (int64_t o = 0; o < outputs; o += kLanes) {
      __m256 y[kLanes];
      for_each<kLanes>([&](auto i) NNCX_INLINE {
        const int64_t row = std::min<int64_t>(o + i, outputs - 1);
        y[i] = _mm256_loadu_ps(sums + row * kWidth<V> + l);
      });
      transpose_8x8(y);
      const int64_t rest = outputs - o;
      for_each<kLanes>([&](auto i) NNCX_INLINE {
        if (l + i >= pixels) return;
        T* to = out + (l + i) * channels + o * step;
        if (step == 1) return store_some(y[i], to, rest);
        T all[kLanes];
        store_lanes(y[i], all);
        for (int64_t c = 0; c < std::min(rest, kLanes); ++c) to[c * step] = all[c];
      });
    }
  }
}

// ---------------------------------------------------------------------------------------------

// Neighbouring output channels, counted over all groups, and where each is stored.
struct Outputs {
  int64_t first, count;
  int64_t stored[kGroupedBlock];

  Outputs(const GroupedConv2dParams& p, int64_t first, int64_t count) : first(first), count(count) {
    for (int64_t i = 0; i < count; ++i) stored[i] = stored_channel(p, first + i);
  }
};

template <class V, class T>
void run_panel(const GroupedConv2dParams& p, const Pixels& pixels, const Outputs& outputs,
               const float* panel) {
  const int64_t all = p.shape.groups * p.shape.out_channels, image = p.out_height * p.out_width;
  T* output = static_cast<T*>(p.output) + pixels.n * all * image;
  alignas(64) float sums[kGroupedBlock * kWidth<V>];
  T* planes[kGroupedBlock];
  float* rows[kGroupedBlock];
  bool direct = false;
  if constexpr (std::is_same_v<T, float>) direct = !p.channels_last && pixels.count == kWidth<V>;
  for (int64_t i = 0; i < outputs.count; ++i) {
    planes[i] = output + outputs.stored[i] * image + pixels.first;
    rows[i] = direct ? reinterpret_cast<float*>(planes[i]) : sums + i * kWidth<V>;
  }
  if (pixels.count > V::kLanes) {
    multiply_block<V, 2>(p, outputs.first, outputs.count, panel, rows);
  } else {
    multiply_block<V, 1>(p, outputs.first, outputs.count, panel, rows);
  }
  if (direct) return;
  if (!p.channels_last) return store_planes<V>(sums, outputs.count, pixels.count, planes);
  T* pixel = output + pixels.first * all;
  for (int64_t i = 0, end; i < outputs.count; i = end) {
    end = i + 1;
    while (end < outputs.count && outputs.stored[end] == outputs.stored[end - 1] + p.shuffle) ++end;
    store_pixels<V>(sums + i * kWidth<V>, end - i, pixels.count, all, p.shuffle,
                    pixel + outputs.stored[i]);
  }
}

template <class V, class T>
void run_strip(const GroupedConv2dParams& p, int64_t group, const Pixels& strip,
               int64_t block_begin, int64_t block_end, const Scratch<V>& scratch) {
  const int64_t panel_size = terms(p.shape) * kWidth<V>;
  const auto panel_pixels = [&](int64_t done) {
    return Pixels{strip.n, strip.first + done, std::min(strip.count - done, kWidth<V>)};
  };
  for (int64_t done = 0; done < strip.count; done += kWidth<V>) {
    pack<V, T>(p, group, panel_pixels(done), scratch.zeros,
               scratch.panels + done / kWidth<V> * panel_size);
  }
  for (int64_t block = block_begin; block < block_end; ++block) {
    const int64_t first = block * kGroupedBlock;
    const Outputs outputs(p, group * p.shape.out_channels + first,
                          std::min(kGroupedBlock, p.shape.out_channels - first));
    for (int64_t done = 0; done < strip.count; done += kWidth<V>) {
      run_panel<V, T>(p, panel_pixels(done), outputs,
                      scratch.panels + done / kWidth<V> * panel_size);
    }
  }
}

template <class V, class T>
void run(const GroupedConv2dParams& p, const Conv2dTile& tile, uint8_t* memory) {
  const Scratch<V> scratch(p, memory);
  const int64_t blocks = grouped_blocks(p.shape), image = p.out_height * p.out_width;
  const int64_t most = strip_panels<V>(p) * kWidth<V>;
  for (int64_t group = tile.block_begin / blocks; group * blocks < tile.block_end; ++group) {
    const int64_t block_begin = std::max(tile.block_begin - group * blocks, int64_t{0});
    const int64_t block_end = std::min(tile.block_end - group * blocks, blocks);
    for (int64_t pixel = tile.pixel_begin; pixel < tile.pixel_end;) {
      const int64_t first = pixel % image;
      const Pixels strip = {pixel / image, first,
                            std::min({most, image - first, tile.pixel_end - pixel})};
      run_strip<V, T>(p, group, strip, block_begin, block_end, scratch);
      pixel += strip.count;
    }
  }
}

// ---------------------------------------------------------------------------------------------
// Turned weights

// Whether neighbouring output pixels of the tile read neighbouring pixels of the input.
inline bool reads_neighbours(const GroupedConv2dParams& p, const Conv2dTile& tile) {
  const int64_t image = p.height * p.width, shift = p.padding_h * p.width;
  return p.shape.taps == 1 && p.stride_h == 1 && p.stride_w == 1 && p.padding_w == 0 &&
         (p.batch == 1 ? tile.pixel_begin >= shift && tile.pixel_end - shift <= image
                       : p.padding_h == 0);
}

template <class V>
bool turns_weight(const GroupedConv2dParams& p, const Conv2dTile& tile) {
  const Conv2dWeightShape& s = p.shape;
  const int64_t lanes = (s.out_channels + V::kLanes - 1) / V::kLanes * V::kLanes;
  const bool whole = tile.block_begin == 0 && tile.block_end == s.groups * grouped_blocks(s);
  return p.channels_last && p.dtype == Dtype::float32 && reads_neighbours(p, tile) &&
         tile.pixel_end - tile.pixel_begin >= kTurnedPixels && 4 * s.out_channels >= 3 * lanes &&
         (p.shuffle == 1 || whole);
}

// `outputs` sums of each of `pixels`.
template <class V, int Vectors>
void multiply_pixels(const GroupedConv2dParams& p, Rows pixels, int64_t count, const float* panel,
                     const float* biases, int64_t outputs, float* out, int64_t out_step) {
  const auto bias = [&](int, int v) NNCX_INLINE { return V::load(biases + v * V::kLanes); };
  const bool whole = outputs == Vectors * V::kLanes;
  for_tiles<V, Vectors>(count, [&](int64_t first, int64_t end) {
    alignas(64) float sums[2 * V::kRows * V::kLanes];
    float* rows[2 * V::kRows];
    for (int64_t r = 0; r < end - first; ++r) {
      rows[r] = whole ? out + (first + r) * out_step : sums + r * Vectors * V::kLanes;
    }
    multiply_rows<V, Vectors>(end - first, pixels.from(first), bias, p.shape.channels, panel,
                              Limits(p.activation), rows);
    if (whole) return;
    for (int64_t r = 0; r < end - first; ++r) {
      std::memcpy(out + (first + r) * out_step, rows[r], outputs * sizeof(float));
    }
  });
}

// Outputs [o, end) of all, of one group, turned panel by panel, of neighbouring pixels.
template <class V>
void run_turned(const GroupedConv2dParams& p, int64_t o, int64_t end, Rows pixels, int64_t count,
                float* panel, float* out, int64_t out_step) {
  const int64_t channels = p.shape.channels;
  for (; o < end; o += kWidth<V>) {
    const int64_t outputs = std::min(end - o, kWidth<V>);
    float biases[kWidth<V>] = {};
    if (p.bias) std::memcpy(biases, p.bias + o, outputs * sizeof(float));
    for (int64_t l = 0; l < outputs; l += kLanes) {
      const float* rows[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        rows[i] = p.weight + std::min(o + l + i, end - 1) * channels;
      }
      turn_rows(rows, channels, kWidth<V>, panel + l);
    }
    if (outputs > V::kLanes) {
      multiply_pixels<V, 2>(p, pixels, count, panel, biases, outputs, out + o, out_step);
    } else {
      multiply_pixels<V, 1>(p, pixels, count, panel, biases, outputs, out + o, out_step);
    }
  }
}

template <class V>
void run_turned(const GroupedConv2dParams& p, const Conv2dTile& tile, const Scratch<V>& scratch) {
  const Conv2dWeightShape& s = p.shape;
  const int64_t all = s.groups * s.out_channels, step = s.groups * s.channels;
  const int64_t blocks = grouped_blocks(s);
  const int64_t most = p.shuffle == 1 ? tile.pixel_end : shuffled_pixels(p);
  const float* input = static_cast<const float*>(p.input) - p.padding_h * p.width * step;
  for (int64_t pixel = tile.pixel_begin; pixel < tile.pixel_end; pixel += most) {
    const int64_t count = std::min(most, tile.pixel_end - pixel);
    float* output = static_cast<float*>(p.output) + pixel * all;
    float* sums = p.shuffle == 1 ? output : scratch.sums;
    for (int64_t group = tile.block_begin / blocks; group * blocks < tile.block_end; ++group) {
      const int64_t first = group * s.out_channels;
      const int64_t begin = std::max<int64_t>(tile.block_begin - group * blocks, 0) * kGroupedBlock;
      const int64_t end =
          std::min((tile.block_end - group * blocks) * kGroupedBlock, s.out_channels);
      run_turned<V>(p, first + begin, first + end,
                    {input + pixel * step + group * s.channels, step}, count, scratch.panels, sums,
                    all);
    }
    if (p.shuffle == 1) continue;
    V::shuffle({.input = sums,
                .output = output,
                .element_bytes = sizeof(float),
                .batch = 1,
                .groups = p.shuffle,
                .channels = all / p.shuffle,
                .pixels = count,
                .channels_last = true},
               0, count);
  }
}

template <class V>
void run(const GroupedConv2dParams& p, const Conv2dTile& tile, uint8_t* memory) {
  if (turns_weight<V>(p, tile)) return run_turned<V>(p, tile, Scratch<V>(p, memory));
  switch (p.dtype) {
    case Dtype::float32:
      return run<V, float>(p, tile, memory);
    case Dtype::float16:
      return run<V, Half>(p, tile, memory);
    case Dtype::bfloat16:
      return run<V, BFloat16>(p, tile, memory);
    case Dtype::float64:
      return;  // the op refuses it
  }
}

}  // namespace
}  // namespace nncx
