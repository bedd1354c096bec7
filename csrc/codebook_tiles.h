// How the vector paths run codebook_conv2d; a path brings its vectors and its decoders.
//
//   weights   prepacked [group][block of 16 outputs][step][64 bytes]. A step is a 32-bit word for
//             each output: as many codes as fit in slots of 1, 2, 4 or 8 bits, along k. k counts
//             taps, and channels within them.
//   pixels    are not gathered: a table holds, for every output pixel of a strip and every tap, the
//             address of the channels that it reads, or of zeros outside the image.
//   strip     at most kStrip output pixels. For each block of outputs, kChunk k's of weights are
//             decoded to floats [k][16], which stay in the cache while all pixels of the strip meet
//             them, kRows at a time, in registers. The sums wait in scratch between chunks.
//   few rows  (a linear layer on a small batch, where decoding would cost more than multiplying)
//             skip the panel: weights go from the decoder's registers into the product. With 1 bit
//             and one codebook nothing is multiplied: see build_tables.
//
// At 3 x 3, 128 channels, 28 x 28 this runs at the speed of torch's float convolution. Panels of
// 256 and 2048 k's lost 3 %, strips of 120 and 480 pixels nothing.
//
// V, a path's vectors: what it does with 8 or 16 floats, and how many pixels its registers hold.
// Decoder: built for the codebooks of a block's outputs; decode(v, its part of a step, f) calls
// f(j, the weights of code j) for vector v of the block.
#pragma once

#include <algorithm>
#include <cstring>

#include "avx2/transpose.h"
#include "codebook_conv2d.h"
#include "unroll.h"

namespace nncx {
namespace {

constexpr int64_t kStepBytes = 4 * kCodebookBlock;
constexpr int64_t kChunk = 1024;   // k's in a panel: 32 KB
constexpr int64_t kStrip = 240;    // pixels: 15 KB of sums
constexpr int64_t kFewRows = 2;    // from 3 on the panel is faster (2 bits; 4 bits: as fast at 2)
constexpr int64_t kTableRows = 8;  // the panel catches up at 4 rows of 256 outputs, 13 of 2048
constexpr int64_t kStripPointers = 1 << 13;  // where taps are many, a strip is shorter

inline int64_t terms(const Conv2dWeightShape& s) { return s.taps * s.channels; }

inline int64_t steps(const Conv2dWeightShape& s, int bits) {
  const int64_t codes = 32 >> slot_log2(bits);
  return (terms(s) + codes - 1) / codes;
}

inline int64_t prepacked_bytes(const Conv2dWeightShape& s, int bits) {
  return s.groups * codebook_blocks(s) * steps(s, bits) * kStepBytes;
}

// Where in a step a code lies.
struct Place {
  int64_t byte;
  int shift;
};

// place(slot, output of the block, code of the step) is where the path wants it.
template <class PlaceOf>
void prepack(const Conv2dWeightShape& s, int bits, const uint8_t* codes, uint8_t* prepacked,
             const PlaceOf& place) {
  const int slot = 1 << slot_log2(bits);
  const int64_t per_step = 32 / slot;
  const int64_t block_bytes = steps(s, bits) * kStepBytes;
  std::memset(prepacked, 0, prepacked_bytes(s, bits));
  for (int64_t o = 0; o < s.groups * s.out_channels; ++o) {
    const int64_t in_group = o % s.out_channels;
    const int64_t block = o / s.out_channels * codebook_blocks(s) + in_group / kCodebookBlock;
    for (int64_t c = 0; c < s.channels; ++c) {
      for (int64_t tap = 0; tap < s.taps; ++tap) {
        const int64_t k = tap * s.channels + c;
        const Place at = place(slot, in_group % kCodebookBlock, k % per_step);
        const unsigned code = code_at(codes, o * terms(s) + c * s.taps + tap, bits);
        prepacked[block * block_bytes + k / per_step * kStepBytes + at.byte] |=
            static_cast<uint8_t>(code << at.shift);
      }
    }
  }
}

// `count` in equal parts of at most `most`, in multiples of `unit`; at least one unit.
constexpr int64_t even_part(int64_t count, int64_t most, int64_t unit) {
  const int64_t units = (count + unit - 1) / unit;
  const int64_t parts = (units * unit + most - 1) / most;
  return parts == 0 ? unit : (units + parts - 1) / parts * unit;
}

// ---------------------------------------------------------------------------------------------
// Scratch

struct Scratch {
  float* zeros;        // a pixel outside the image
  float* panel;        // [kChunk][16]
  float* sums;         // [strip][16]
  float* transposed;   // [16][kStrip], where pixels are innermost in the output
  const float** taps;  // [strip / kRows][tap][kRows]
  float* tables;       // of one row, see build_tables
  int64_t bytes;

  // Of null, only `bytes` counts.
  template <class V>
  static Scratch carve(const CodebookConv2dParams& p, uint8_t* memory);
};

template <class V>
int64_t strip_pixels(const CodebookConv2dParams& p) {
  const int64_t fit = kStripPointers / p.shape.taps / V::kRows * V::kRows;
  return std::clamp<int64_t>(fit, V::kRows, kStrip);
}

// Of a step of 32 activations; one table for V::kGroup of them.
template <class V>
constexpr int kTables = (32 + V::kGroup - 1) / V::kGroup;

template <class V>
int64_t table_bytes(const Conv2dWeightShape& s) {
  return 4 * steps(s, 1) * kTables<V> * V::kLanes;
}

template <class V>
Scratch Scratch::carve(const CodebookConv2dParams& p, uint8_t* memory) {
  int64_t used = 0;
  const auto take = [&](int64_t bytes) {
    uint8_t* at = memory ? memory + used : nullptr;
    used += (bytes + 63) / 64 * 64;
    return at;
  };
  const int64_t pixels = strip_pixels<V>(p);
  Scratch s;
  s.zeros = reinterpret_cast<float*>(take(4 * p.shape.channels));
  s.panel = reinterpret_cast<float*>(take(4 * kChunk * kCodebookBlock));
  s.sums = reinterpret_cast<float*>(take(4 * ((pixels + 7) / 8 * 8) * kCodebookBlock));
  s.transposed = reinterpret_cast<float*>(take(4 * kCodebookBlock * kStrip));
  s.taps = reinterpret_cast<const float**>(take(8 * pixels * p.shape.taps));
  s.tables = reinterpret_cast<float*>(take(p.bits == 1 ? table_bytes<V>(p.shape) : 0));
  s.bytes = used;
  return s;
}

// ---------------------------------------------------------------------------------------------
// The work at hand

// Output pixels [begin, end), and blocks of one group, counted over all groups.
struct Strip {
  int64_t group, begin, end;
  int64_t block_begin, block_end;
};

// The output channels of a block, counted over all groups.
struct Outputs {
  int64_t first, count;

  Outputs(const Conv2dWeightShape& s, int64_t group, int64_t block) {
    const int64_t in_group = (block - group * codebook_blocks(s)) * kCodebookBlock;
    first = group * s.out_channels + in_group;
    count = std::min(kCodebookBlock, s.out_channels - in_group);
  }
};

// Entry `code` of each output's codebook; 0 for an output that does not exist.
inline void entries_of(const CodebookConv2dParams& p, const Outputs& outputs, int code,
                       float* entries) {
  std::fill_n(entries, kCodebookBlock, 0.0f);
  for (int64_t i = 0; i < outputs.count; ++i) {
    entries[i] = p.codebook[(outputs.first + i) * p.codebook_stride + code];
  }
}

// Where each output's codebook starts, counted from the first's. One that does not exist reads the
// last one's.
inline void codebook_starts(const CodebookConv2dParams& p, const Outputs& outputs,
                            int32_t* starts) {
  for (int64_t i = 0; i < kCodebookBlock; ++i) {
    starts[i] = static_cast<int32_t>(std::min(i, outputs.count - 1) * p.codebook_stride);
  }
}

// The channels that each tap of the strip's output pixels reads.
template <class V>
void locate(const CodebookConv2dParams& p, const Strip& strip, const Scratch& scratch) {
  const int64_t pixel_floats = p.shape.groups * p.shape.channels;
  const float* input = static_cast<const float*>(p.input) + strip.group * p.shape.channels;
  for (int64_t i = 0; strip.begin + i < strip.end; ++i) {
    const int64_t pixel = strip.begin + i;
    const int64_t n = pixel / (p.out_height * p.out_width);
    const int64_t y = pixel / p.out_width % p.out_height, x = pixel % p.out_width;
    const float** taps = scratch.taps + i / V::kRows * V::kRows * p.shape.taps + i % V::kRows;
    for (int64_t a = 0; a < p.kernel_h; ++a) {
      const int64_t h = tap_position(y, p.stride_h, p.padding_h, a, p.dilation_h);
      for (int64_t b = 0; b < p.kernel_w; ++b, taps += V::kRows) {
        const int64_t w = tap_position(x, p.stride_w, p.padding_w, b, p.dilation_w);
        const bool inside = h >= 0 && h < p.height && w >= 0 && w < p.width;
        *taps = inside ? input + ((n * p.height + h) * p.width + w) * pixel_floats : scratch.zeros;
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------
// Many rows

// panel[k][16] of the steps [begin, end) of a block.
template <class V, class Decoder>
void decode_panel(const Decoder& decoder, const uint8_t* weights, int64_t begin, int64_t end,
                  float* panel) {
  constexpr int kCodes = 32 / Decoder::kSlot;
  for (int64_t step = begin; step < end; ++step, panel += kCodes * kCodebookBlock) {
    for_each<kCodebookBlock / V::kLanes>([&](auto v) NNCX_INLINE {
      decoder.decode(v, weights + step * kStepBytes + v * 4 * V::kLanes,
                     [&](auto j, typename V::Floats w)
                         NNCX_INLINE { V::store(panel + j * kCodebookBlock + v * V::kLanes, w); });
    });
  }
}

// sums[row][16] (+)= the k's [begin, end) of Rows pixels times the panel.
template <class V, int Rows>
void multiply_rows(const float* const* taps, int64_t channels, int64_t begin, int64_t end,
                   const float* panel, float* sums) {
  constexpr int kVectors = kCodebookBlock / V::kLanes;
  typename V::Floats acc[Rows * kVectors];
  for_each<Rows * kVectors>(
      [&](auto i) NNCX_INLINE { acc[i] = begin == 0 ? V::zero() : V::load(sums + i * V::kLanes); });
  int64_t c = begin % std::max<int64_t>(channels, 1);
  taps += begin / std::max<int64_t>(channels, 1) * V::kRows;
  for (int64_t k = begin; k < end; taps += V::kRows, c = 0) {
    const int64_t run = std::min(channels - c, end - k);
    const float* rows[Rows];
    for_each<Rows>([&](auto r) NNCX_INLINE { rows[r] = taps[r] + c; });
    for (int64_t i = 0; i < run; ++i, panel += kCodebookBlock) {
      typename V::Floats w[kVectors];
      for_each<kVectors>([&](auto v) NNCX_INLINE { w[v] = V::load(panel + v * V::kLanes); });
      for_each<Rows>([&](auto r) NNCX_INLINE {
        const auto x = V::broadcast(rows[r] + i);
        for_each<kVectors>([&](auto v) NNCX_INLINE {
          acc[r * kVectors + v] = V::fma(x, w[v], acc[r * kVectors + v]);
        });
      });
    }
    k += run;
  }
  for_each<Rows * kVectors>([&](auto i) NNCX_INLINE { V::store(sums + i * V::kLanes, acc[i]); });
}

template <class V, int Rows = V::kRows>
void multiply(int64_t rows, const float* const* taps, int64_t channels, int64_t begin, int64_t end,
              const float* panel, float* sums) {
  if constexpr (Rows > 0) {
    if (rows < Rows) return multiply<V, Rows - 1>(rows, taps, channels, begin, end, panel, sums);
    multiply_rows<V, Rows>(taps, channels, begin, end, panel, sums);
  }
}

// The sums of one block of outputs for the strip's pixels.
template <class V, class Decoder>
void multiply_block(const CodebookConv2dParams& p, const Decoder& decoder, const uint8_t* weights,
                    int64_t pixels, const Scratch& scratch) {
  constexpr int64_t kCodes = 32 / Decoder::kSlot;
  static_assert(kChunk % kCodes == 0);
  const int64_t all = terms(p.shape);
  const int64_t chunk = even_part(all, kChunk, kCodes);
  int64_t begin = 0;
  do {
    const int64_t end = std::min(begin + chunk, all);
    decode_panel<V>(decoder, weights, begin / kCodes, (end + kCodes - 1) / kCodes, scratch.panel);
    for (int64_t i = 0; i < pixels; i += V::kRows) {
      multiply<V>(std::min<int64_t>(V::kRows, pixels - i), scratch.taps + i * p.shape.taps,
                  p.shape.channels, begin, end, scratch.panel, scratch.sums + i * kCodebookBlock);
    }
    begin = end;
  } while (begin < all);
}

// ---------------------------------------------------------------------------------------------
// One row, of a kernel with a single tap

// The steps that are whole go from the decoder into the product, the rest through the panel.
template <class V, class Decoder>
void multiply_row(const CodebookConv2dParams& p, const Decoder& decoder, const uint8_t* weights,
                  const Scratch& scratch) {
  constexpr int kCodes = 32 / Decoder::kSlot;
  constexpr int kVectors = kCodebookBlock / V::kLanes;
  constexpr int kChains = 8 / kVectors;  // an addition waits for the one before in its chain
  const float* x = scratch.taps[0];
  const int64_t channels = p.shape.channels;
  const int64_t whole = channels / kCodes;
  typename V::Floats acc[kVectors * kChains];
  for_each<kVectors * kChains>([&](auto i) NNCX_INLINE { acc[i] = V::zero(); });
  for (int64_t step = 0; step < whole; ++step, x += kCodes) {
    for_each<kVectors>([&](auto v) NNCX_INLINE {
      decoder.decode(v, weights + step * kStepBytes + v * 4 * V::kLanes,
                     [&](auto j, typename V::Floats w) NNCX_INLINE {
                       auto& sum = acc[v * kChains + j % kChains];
                       sum = V::fma(V::broadcast(x + j), w, sum);
                     });
    });
  }
  for_each<kVectors>([&](auto v) NNCX_INLINE {
    for (int width = kChains / 2; width > 0; width /= 2) {
      for (int i = 0; i < width; ++i) {
        acc[v * kChains + i] = V::add(acc[v * kChains + i], acc[v * kChains + i + width]);
      }
    }
    V::store(scratch.sums + v * V::kLanes, acc[v * kChains]);
  });
  if (whole * kCodes == channels) return;
  decode_panel<V>(decoder, weights, whole, whole + 1, scratch.panel);
  multiply_rows<V, 1>(scratch.taps, channels, whole * kCodes, channels, scratch.panel,
                      scratch.sums);
}

// The same for 1 bit and one codebook. For every V::kGroup activations a register holds the sums of
// their products, one for each combination of weights, and a lookup and an addition do the work of
// V::kGroup multiplications: twice as fast as multiplying (AVX2), three times (AVX-512).
//
// tables[step][table][combination]
template <class V>
void build_tables(const float* codebook, const float* x, int64_t count, float* tables) {
  float weight[V::kGroup][V::kLanes];
  for (int i = 0; i < V::kGroup; ++i) {
    for (int lane = 0; lane < V::kLanes; ++lane) weight[i][lane] = codebook[lane >> i & 1];
  }
  for (int64_t step = 0; step < count; step += 32) {
    for (int64_t first = step; first < step + 32; first += V::kGroup, tables += V::kLanes) {
      const int64_t terms = std::min({int64_t{V::kGroup}, step + 32 - first, count - first});
      std::fill_n(tables, V::kLanes, 0.0f);
      for (int64_t i = 0; i < terms; ++i) {
        for (int lane = 0; lane < V::kLanes; ++lane) {
          tables[lane] += weight[i][lane] * x[first + i];
        }
      }
    }
  }
}

// sums[Blocks][16]. Several blocks at a time, so that an addition need not wait for the one before.
template <class V, int Blocks>
void add_entries(const uint8_t* weights, int64_t steps, const float* tables, float* sums) {
  constexpr int kPerBlock = kCodebookBlock / V::kLanes;
  constexpr int kVectors = Blocks * kPerBlock;
  typename V::Floats acc[kVectors];
  for_each<kVectors>([&](auto v) NNCX_INLINE { acc[v] = V::zero(); });
  for (int64_t step = 0; step < steps; ++step) {
    typename V::Words words[kVectors];
    for_each<kVectors>([&](auto v) NNCX_INLINE {
      words[v] = V::load_words(weights + (v / kPerBlock * steps + step) * kStepBytes +
                               v % kPerBlock * 4 * V::kLanes);
    });
    for_each<kTables<V>>([&](auto i) NNCX_INLINE {
      const auto table = V::load(tables + i * V::kLanes);
      for_each<kVectors>([&](auto v) NNCX_INLINE {
        acc[v] = V::add(acc[v], V::look_up(table, V::shift_right(words[v], i * V::kGroup)));
      });
    });
    tables += kTables<V> * V::kLanes;
  }
  for_each<kVectors>([&](auto v) NNCX_INLINE { V::store(sums + v * V::kLanes, acc[v]); });
}

// ---------------------------------------------------------------------------------------------
// Epilogue

// Rows of a strip: pixels of 16 outputs, or outputs of so many pixels where those are innermost.
template <class T>
void store_rows(const float* rows, int64_t row_stride, int64_t count, int64_t length, T* out,
                int64_t out_stride) {
  for (int64_t row = 0; row < count; ++row, rows += row_stride, out += out_stride) {
    for (int64_t i = 0; i < length; ++i) store_float(rows[i], out + i);
  }
}

template <class T>
void store_block(const CodebookConv2dParams& p, const Strip& strip, const Outputs& outputs,
                 const Scratch& scratch) {
  const int64_t pixels = strip.end - strip.begin;
  const FloatEpilogue& e = p.epilogue;
  const int64_t image = p.out_height * p.out_width;
  const bool outputs_innermost = e.stride_o == 1;
  if (!outputs_innermost) {
    for (int64_t i = 0; i < pixels; i += 8) {
      for (int64_t c = 0; c < kCodebookBlock; c += 8) {
        transpose_8x8(scratch.sums + i * kCodebookBlock + c, kCodebookBlock,
                      scratch.transposed + c * kStrip + i, kStrip);
      }
    }
  }
  int64_t run;  // within an image
  for (int64_t done = 0; done < pixels; done += run) {
    const int64_t n = (strip.begin + done) / image, first = (strip.begin + done) % image;
    run = std::min(pixels - done, image - first);
    T* out = static_cast<T*>(e.output) + n * e.stride_n + first * e.stride_pixel +
             outputs.first * e.stride_o;
    if (outputs_innermost) {
      store_rows(scratch.sums + done * kCodebookBlock, kCodebookBlock, run, outputs.count, out,
                 e.stride_pixel);
    } else {
      store_rows(scratch.transposed + done, kStrip, outputs.count, run, out, e.stride_o);
    }
  }
}

// Bias and activation on the sums of a block, then out with them.
inline void finish_block(const CodebookConv2dParams& p, const Strip& strip, const Outputs& outputs,
                         const Scratch& scratch) {
  const FloatEpilogue& e = p.epilogue;
  const int64_t pixels = strip.end - strip.begin;
  if (e.bias) {
    float bias[kCodebookBlock] = {};
    std::copy_n(e.bias + outputs.first, outputs.count, bias);
    for (int64_t i = 0; i < pixels * kCodebookBlock; i += kCodebookBlock) {
      for (int64_t c = 0; c < kCodebookBlock; ++c) scratch.sums[i + c] += bias[c];
    }
  }
  if (e.activation != Activation::none) {
    for (int64_t i = 0; i < pixels * kCodebookBlock; ++i) {
      scratch.sums[i] = activate(e.activation, scratch.sums[i]);
    }
  }
  switch (e.dtype) {
    case Dtype::float32:
      return store_block<float>(p, strip, outputs, scratch);
    case Dtype::float16:
      return store_block<Half>(p, strip, outputs, scratch);
    case Dtype::bfloat16:
      return store_block<BFloat16>(p, strip, outputs, scratch);
    case Dtype::float64:
      return;  // out_dtype is never that: the op refuses it
  }
}

// ---------------------------------------------------------------------------------------------

template <class V, class Decoder>
void run_blocks(const CodebookConv2dParams& p, const Strip& strip, bool one_row,
                const Scratch& scratch) {
  for (int64_t block = strip.block_begin; block < strip.block_end; ++block) {
    const Outputs outputs(p.shape, strip.group, block);
    const Decoder decoder(p, outputs);
    const uint8_t* weights = p.weight + block * steps(p.shape, p.bits) * kStepBytes;
    if (one_row) {
      multiply_row<V>(p, decoder, weights, scratch);
    } else {
      multiply_block<V>(p, decoder, weights, strip.end - strip.begin, scratch);
    }
    finish_block(p, strip, outputs, scratch);
  }
}

template <class V>
void run_tables(const CodebookConv2dParams& p, const Strip& strip, const Scratch& scratch) {
  constexpr int kBlocks = 4 * V::kLanes / kCodebookBlock;
  build_tables<V>(p.codebook, scratch.taps[0], p.shape.channels, scratch.tables);
  int64_t done;
  for (int64_t block = strip.block_begin; block < strip.block_end; block += done) {
    done = block + kBlocks <= strip.block_end ? kBlocks : 1;
    const int64_t all_steps = steps(p.shape, 1);
    const auto add_up = done == 1 ? add_entries<V, 1> : add_entries<V, kBlocks>;
    add_up(p.weight + block * all_steps * kStepBytes, all_steps, scratch.tables, scratch.sums);
    Scratch one_block = scratch;
    for (int64_t i = 0; i < done; ++i, one_block.sums += kCodebookBlock) {
      finish_block(p, strip, Outputs(p.shape, strip.group, block + i), one_block);
    }
  }
}

template <class V, class Decoder>
void run(const CodebookConv2dParams& p, const Conv2dTile& tile, uint8_t* memory) {
  const Conv2dWeightShape& s = p.shape;
  const int64_t blocks = codebook_blocks(s);
  const Scratch scratch = Scratch::carve<V>(p, memory);
  const bool tables = p.bits == 1 && p.codebook_stride == 0;
  const int64_t rows = p.batch * p.out_height * p.out_width;  // the tile may hold fewer
  const bool one_row = s.taps == 1 && rows <= (tables ? kTableRows : kFewRows);
  const int64_t most = one_row ? 1 : strip_pixels<V>(p);
  std::fill_n(scratch.zeros, s.channels, 0.0f);
  Strip strip;
  for (strip.group = tile.block_begin / blocks; strip.group * blocks < tile.block_end;
       ++strip.group) {
    strip.block_begin = std::max(tile.block_begin, strip.group * blocks);
    strip.block_end = std::min(tile.block_end, (strip.group + 1) * blocks);
    for (strip.begin = tile.pixel_begin; strip.begin < tile.pixel_end; strip.begin = strip.end) {
      strip.end = std::min(strip.begin + most, tile.pixel_end);
      locate<V>(p, strip, scratch);
      if (one_row && tables) {
        run_tables<V>(p, strip, scratch);
      } else {
        run_blocks<V, Decoder>(p, strip, one_row, scratch);
      }
    }
  }
}

}  // namespace
}  // namespace nncx
