// Three GEMMs, all exact. `vpmaddubsw` multiplies bytes, unsigned by signed, but adds two products in
// 16 bits, where they saturate; `vpmaddwd` multiplies 16-bit numbers and is safe with any.
//
//   paired   No activation is negative, hence none above 127: two `vpmaddubsw` are added in 16 bits
//            before `vpmaddwd` widens them, 64 products in 5 instructions. That is safe if of the
//            four weights that meet in a lane the positive ones add up to at most 258, and the
//            negative ones to -258. What few fours have beyond is kept apart, as outliers, and added
//            one by one.
//   single   No activation is negative, but there are too many outliers to keep apart, or a tap has
//            an odd number of steps: each `vpmaddubsw` is widened on its own.
//   wide     Activations of any sign as 16-bit numbers; the weights are widened a cache-sized part
//            at a time, for all rows of the tile (for few rows in registers).
//
//   lines    (conv2d_lines.h) bytes as they are, or 16-bit numbers; channels padded with zeros to a
//            multiple of 4.
//   weights  prepacked [group][block of 16 outputs], each a BlockHeader, then [tap][4 channels][16
//            outputs][4], then the outliers.
//
// Which one runs depends on the activations at hand, so the speed does too, but no bit of the result.
#include "int8_conv2d.h"

#include <immintrin.h>

#include <algorithm>

#include "int8_depthwise.h"
#include "int8_rows.h"
#include "int8_tile.h"
#include "unroll.h"

namespace nncx::avx2 {
namespace {

constexpr int kMaxRows = 4;
constexpr int kVectors = kInt8Block / 8;
constexpr int32_t kSafeSum = 258;        // 127 * 258 < 2^15
constexpr int64_t kStepsPerOutlier = 8;  // with more, `single` is faster
constexpr int64_t kFewRows = 16;         // for which widening in registers pays
constexpr int64_t kWideSteps = 128;      // widened at a time: 16 KB

struct BlockHeader {
  int32_t weight_sums[kInt8Block];
  int32_t paired;      // whether the weights are safe for it
  int32_t outliers;    // how many were kept apart
  int32_t unused[14];  // up to a whole cache line, at which the weights begin
};

// What a weight lacks.
struct Outlier {
  uint32_t at;  // its activation among those of a filter, taps padded to whole steps
  uint16_t output;
  int16_t excess;
};

int64_t most_outliers(const Conv2dWeightShape& s) {
  return (steps_of_filter(s) + kStepsPerOutlier - 1) / kStepsPerOutlier;
}

int64_t block_bytes(const Conv2dWeightShape& s) {
  const int64_t outliers = most_outliers(s) * static_cast<int64_t>(sizeof(Outlier));
  return static_cast<int64_t>(sizeof(BlockHeader)) + steps_of_filter(s) * kStepBytes +
         (outliers + 63) / 64 * 64;
}

const BlockHeader& header_of(const uint8_t* block) {
  return *reinterpret_cast<const BlockHeader*>(block);
}

const uint8_t* weights_of(const uint8_t* block) { return block + sizeof(BlockHeader); }

const Outlier* outliers_of(const Conv2dWeightShape& s, const uint8_t* block) {
  return reinterpret_cast<const Outlier*>(weights_of(block) + steps_of_filter(s) * kStepBytes);
}

NNCX_INLINE inline __m256i load(const uint8_t* from) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}

NNCX_INLINE inline __m256i broadcast4(const uint8_t* from) {
  int32_t value;
  std::memcpy(&value, from, 4);
  return _mm256_set1_epi32(value);
}

// The empty asm keeps gcc from gathering the products of a step first, which spills sums to memory.
NNCX_INLINE inline void add(__m256i& sum, __m256i x) {
  sum = _mm256_add_epi32(sum, x);
  asm("" : "+x"(sum));
}

NNCX_INLINE inline void add_to(int32_t* sums, __m256i x) {
  auto* to = reinterpret_cast<__m256i*>(sums);
  _mm256_store_si256(to, _mm256_add_epi32(_mm256_load_si256(to), x));
}

// ---------------------------------------------------------------------------------------------
// GEMM: sums[row][width], of which 16, += row x weights, over the steps of some runs of pixels

// Steps of a run at a time: 2 if they are paired.
template <int Rows, int Steps>
void gemm_bytes(const uint8_t* const* rows_in_memory, const Taps& taps, int64_t run_steps,
                const uint8_t* weights, int32_t* sums, int64_t width) {
  const uint8_t* rows[Rows];
  for_each<Rows>([&](auto r) NNCX_INLINE { rows[r] = rows_in_memory[r]; });
  const __m256i ones = _mm256_set1_epi16(1);
  __m256i sum[Rows * kVectors];
  for_each<Rows * kVectors>([&](auto i) NNCX_INLINE { sum[i] = _mm256_setzero_si256(); });
  for (int64_t line = 0; line < taps.lines; ++line) {
    for (int64_t run = 0; run < taps.runs; ++run) {
      int64_t at = line * taps.line_step + run * taps.run_step;
      const int64_t end = at + run_steps * kStepChannels;
      for (; at < end; at += Steps * kStepChannels, weights += Steps * kStepBytes) {
        __m256i w[Steps * kVectors];
        for_each<Steps * kVectors>([&](auto i) NNCX_INLINE { w[i] = load(weights + i * 32); });
        for_each<Rows>([&](auto r) NNCX_INLINE {
          __m256i a[Steps];
          for_each<Steps>([&](auto k)
                              NNCX_INLINE { a[k] = broadcast4(rows[r] + at + k * kStepChannels); });
          for_each<kVectors>([&](auto v) NNCX_INLINE {
            __m256i products = _mm256_maddubs_epi16(a[0], w[v]);
            if constexpr (Steps == 2) {
              const __m256i next = _mm256_maddubs_epi16(a[Steps - 1], w[kVectors + v]);
              products = _mm256_add_epi16(products, next);
            }
            add(sum[r * kVectors + v], _mm256_madd_epi16(products, ones));
          });
        });
      }
    }
  }
  for_each<Rows * kVectors>(
      [&](auto i) NNCX_INLINE { add_to(sums + i / kVectors * width + i % kVectors * 8, sum[i]); });
}

using BytesGemm = void (*)(const uint8_t* const*, const Taps&, int64_t, const uint8_t*, int32_t*,
                           int64_t);
constexpr BytesGemm kSingle[kMaxRows + 1] = {nullptr, gemm_bytes<1, 1>, gemm_bytes<2, 1>,
                                             gemm_bytes<3, 1>, gemm_bytes<4, 1>};
constexpr BytesGemm kPaired[kMaxRows + 1] = {nullptr, gemm_bytes<1, 2>, gemm_bytes<2, 2>,
                                             gemm_bytes<3, 2>, gemm_bytes<4, 2>};

// Of each four channels of a line of 16-bit numbers the order is 0, 2, 1, 3: the even bytes of the
// weights and the odd ones are widened with two shifts.
constexpr int64_t kWideStep = 2 * kStepChannels;  // bytes of a step in a line

struct WideWeights {
  __m256i even, odd;

  NNCX_INLINE explicit WideWeights(__m256i bytes)
      : even(_mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8)), odd(_mm256_srai_epi16(bytes, 8)) {}
};

void widen(const uint8_t* weights, int64_t steps, uint8_t* wide) {
  for (int64_t i = 0; i < steps * kVectors; ++i, weights += 32, wide += 64) {
    const WideWeights w(load(weights));
    _mm256_store_si256(reinterpret_cast<__m256i*>(wide), w.even);
    _mm256_store_si256(reinterpret_cast<__m256i*>(wide + 32), w.odd);
  }
}

// Part of one run, from byte `at` of the rows on; `weights` widened already or, for so few rows that
// it would not pay, as they are.
template <int Rows, bool Widened>
void gemm_words(const uint8_t* const* rows_in_memory, int64_t at, int64_t steps,
                const uint8_t* weights, int32_t* sums, int64_t width) {
  constexpr int64_t kBytes = Widened ? 2 * kStepBytes : kStepBytes;
  const uint8_t* rows[Rows];
  for_each<Rows>([&](auto r) NNCX_INLINE { rows[r] = rows_in_memory[r]; });
  __m256i sum[Rows * kVectors];
  for_each<Rows * kVectors>([&](auto i) NNCX_INLINE { sum[i] = _mm256_setzero_si256(); });
  const auto load_wide = [&](int v, bool odd) NNCX_INLINE {
    if constexpr (Widened) return load(weights + 64 * v + 32 * odd);
    const WideWeights w(load(weights + 32 * v));
    return odd ? w.odd : w.even;
  };
  for (const int64_t end = at + steps * kWideStep; at < end; at += kWideStep, weights += kBytes) {
    for_each<2>([&](auto odd) NNCX_INLINE {
      __m256i w[kVectors];
      for_each<kVectors>([&](auto v) NNCX_INLINE { w[v] = load_wide(v, odd); });
      for_each<Rows>([&](auto r) NNCX_INLINE {
        const __m256i a = broadcast4(rows[r] + at + 4 * odd);
        for_each<kVectors>(
            [&](auto v) NNCX_INLINE { add(sum[r * kVectors + v], _mm256_madd_epi16(a, w[v])); });
      });
    });
  }
  for_each<Rows * kVectors>(
      [&](auto i) NNCX_INLINE { add_to(sums + i / kVectors * width + i % kVectors * 8, sum[i]); });
}

using WordsGemm = void (*)(const uint8_t* const*, int64_t, int64_t, const uint8_t*, int32_t*,
                           int64_t);
constexpr WordsGemm kWidened[kMaxRows + 1] = {nullptr, gemm_words<1, true>, gemm_words<2, true>,
                                              gemm_words<3, true>, gemm_words<4, true>};
constexpr WordsGemm kAsTheyAre[kMaxRows + 1] = {nullptr, gemm_words<1, false>, gemm_words<2, false>,
                                                gemm_words<3, false>, gemm_words<4, false>};

// ---------------------------------------------------------------------------------------------

// Fewer than four bytes, zeros behind them.
NNCX_INLINE inline uint32_t few_bytes(const uint8_t* from, int64_t count) {
  uint32_t word = 0;
  for (int64_t i = 0; i < count; ++i) word |= uint32_t{from[i]} << 8 * i;
  return word;
}

// What both kinds of lines share; `Line` says where channel c of a pixel lies, and loads it.
template <class Line>
struct Gemm : Int8Path {
  static constexpr int64_t kTileBlocks = 4;

  static int64_t block_bytes(const Conv2dWeightShape& s) { return avx2::block_bytes(s); }

  static int64_t pixel_bytes(const Params& p) { return steps_of_tap(p.shape) * Line::kStep; }

  static void gemm(const Params& p, const Rows& rows, const uint8_t* const* pointers,
                   const Taps& taps, const uint8_t* weights, int64_t blocks, int32_t* sums) {
    for (int64_t i = 0; i < blocks; ++i) {
      const uint8_t* block = weights + i * block_bytes(p.shape);
      int32_t* block_sums = sums + i * kBlock;
      start(rows, header_of(block), block_sums, blocks * kBlock);
      Line::multiply(p, rows.count, pointers, taps, block, block_sums, blocks * kBlock);
      add_outliers(p, rows.count, pointers, taps, block, block_sums, blocks * kBlock);
    }
  }

  // What the zero point makes of the weights, subtracted.
  static void start(const Rows& rows, const BlockHeader& header, int32_t* sums, int64_t width) {
    const auto* weight_sums = reinterpret_cast<const __m256i*>(header.weight_sums);
    __m256i w[kVectors];
    for_each<kVectors>([&](auto v) NNCX_INLINE { w[v] = _mm256_loadu_si256(weight_sums + v); });
    for (int64_t r = 0; r < rows.count; ++r, sums += width) {
      const __m256i zero_point = _mm256_set1_epi32(-rows.zero_point[r]);
      for_each<kVectors>([&](auto v) NNCX_INLINE {
        _mm256_store_si256(reinterpret_cast<__m256i*>(sums) + v,
                           _mm256_mullo_epi32(zero_point, w[v]));
      });
    }
  }

  static void add_outliers(const Params& p, int64_t rows, const uint8_t* const* pointers,
                           const Taps& taps, const uint8_t* block, int32_t* sums, int64_t width) {
    const Outlier* outliers = outliers_of(p.shape, block);
    const int64_t padded = steps_of_tap(p.shape) * kStepChannels;
    const int64_t count = std::min<int64_t>(header_of(block).outliers, most_outliers(p.shape));
    for (int64_t i = 0; i < count; ++i) {
      // Of a weight that was tampered with no index may lead elsewhere.
      const int64_t in_filter = outliers[i].at % (p.shape.taps * padded);
      int32_t* sum = sums + outliers[i].output % kBlock;
      const int64_t tap = in_filter / padded;
      const int64_t at = tap / p.kernel_w * taps.line_step +
                         tap % p.kernel_w * p.dilation_w * pixel_bytes(p) +
                         Line::place(in_filter % padded);
      for (int64_t r = 0; r < rows; ++r) {
        sum[r * width] += Line::value(pointers[r] + at) * outliers[i].excess;
      }
    }
  }

  static constexpr auto store = store_int8_tile;
  static constexpr auto tile = multiply_then_store<Gemm>;
};

struct Bytes {
  static constexpr int64_t kStep = kStepChannels;

  static int64_t place(int64_t channel) { return channel; }
  static int32_t value(const uint8_t* at) { return *at; }

  static void multiply(const Int8Conv2dParams& p, int64_t rows, const uint8_t* const* pointers,
                       const Taps& taps, const uint8_t* block, int32_t* sums, int64_t width) {
    const bool paired = header_of(block).paired && steps_of_tap(p.shape) % 2 == 0;
    const BytesGemm* kernels = paired ? kPaired : kSingle;
    const int64_t run_steps = taps.run_pixels * steps_of_tap(p.shape);
    for (int64_t r = 0; r < rows; r += kMaxRows) {
      kernels[std::min<int64_t>(kMaxRows, rows - r)](pointers + r, taps, run_steps,
                                                     weights_of(block), sums + r * width, width);
    }
  }
};

struct BytesGemmOfLines : Gemm<Bytes> {
  // Without calls: a pixel may have but three channels.
  NNCX_INLINE static void copy_channels(const uint8_t* from, int64_t channels, uint8_t* out) {
    int64_t c = 0;
    for (; c + 32 <= channels; c += 32) std::memcpy(out + c, from + c, 32);
    for (; c + 4 <= channels; c += 4) std::memcpy(out + c, from + c, 4);
    if (c == channels) return;
    const uint32_t rest = few_bytes(from + c, channels - c);
    std::memcpy(out + c, &rest, 4);
  }

  static uint8_t* expand_pixels(const Params& p, const uint8_t* from, int64_t count, int64_t step,
                                uint8_t* out) {
    const int64_t bytes = pixel_bytes(p), channels = p.shape.channels;
    if (count * bytes == 0) return out;       // an empty input has no address
    if (channels == step && bytes == step) {  // one group, no channels to pad
      std::memcpy(out, from, count * bytes);
      return out + count * bytes;
    }
    for (int64_t i = 0; i < count; ++i, from += step, out += bytes) {
      copy_channels(from, channels, out);
    }
    return out;
  }

  static uint8_t* expand_padding(const Params& p, int64_t count, uint8_t* out) {
    std::memset(out, zero_point_of(p, 0), count * pixel_bytes(p));
    return out + count * pixel_bytes(p);
  }
};

struct Words {
  static constexpr int64_t kStep = kWideStep;

  static int64_t place(int64_t channel) {
    return (channel & ~3) * 2 + (channel & 1) * 4 + (channel & 2);
  }

  static int32_t value(const uint8_t* at) {
    int16_t word;
    std::memcpy(&word, at, 2);
    return word;
  }

  static void multiply(const Int8Conv2dParams& p, int64_t rows, const uint8_t* const* pointers,
                       const Taps& taps, const uint8_t* block, int32_t* sums, int64_t width) {
    const uint8_t* weights = weights_of(block);
    const int64_t run_steps = taps.run_pixels * steps_of_tap(p.shape);
    for (int64_t line = 0; line < taps.lines; ++line) {
      for (int64_t run = 0; run < taps.runs; ++run) {
        const int64_t at = line * taps.line_step + run * taps.run_step;
        multiply_run(rows, pointers, at, run_steps, weights, sums, width);
        weights += run_steps * kStepBytes;
      }
    }
  }

  static void multiply_run(int64_t rows, const uint8_t* const* pointers, int64_t at, int64_t steps,
                           const uint8_t* weights, int32_t* sums, int64_t width) {
    alignas(64) uint8_t wide[kWideSteps * 2 * kStepBytes];
    const bool widened = rows > kFewRows;
    const WordsGemm* kernels = widened ? kWidened : kAsTheyAre;
    for (int64_t first = 0; first < steps; first += kWideSteps) {
      const int64_t count = std::min(kWideSteps, steps - first);
      const uint8_t* part = weights + first * kStepBytes;
      if (widened) widen(part, count, wide);
      for (int64_t r = 0; r < rows; r += kMaxRows) {
        kernels[std::min<int64_t>(kMaxRows, rows - r)](pointers + r, at + first * kWideStep, count,
                                                       widened ? wide : part, sums + r * width,
                                                       width);
      }
    }
  }
};

struct WordsGemmOfLines : Gemm<Words> {
  // 16 channels -> 32 bytes.
  NNCX_INLINE static void expand_16(__m128i bytes, uint8_t* out) {
    const __m128i order = _mm_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15);
    const __m256i words = _mm256_cvtepi8_epi16(_mm_shuffle_epi8(bytes, order));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), words);
  }

  static uint8_t* expand_pixels(const Params& p, const uint8_t* from, int64_t count, int64_t step,
                                uint8_t* out) {
    const int64_t bytes = pixel_bytes(p), channels = p.shape.channels;
    const int64_t whole = channels / 16 * 16;
    for (int64_t i = 0; i < count; ++i, from += step, out += bytes) {
      for (int64_t c = 0; c < whole; c += 16) {
        expand_16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + c)), out + 2 * c);
      }
      if (whole == channels) continue;
      alignas(16) uint32_t rest[4] = {};
      int64_t c = whole;
      for (; c + 4 <= channels; c += 4) std::memcpy(rest + (c - whole) / 4, from + c, 4);
      rest[(c - whole) / 4 % 4] |= few_bytes(from + c, channels - c);
      expand_16(_mm_load_si128(reinterpret_cast<const __m128i*>(rest)), out + 2 * whole);
    }
    return out;
  }

  static uint8_t* expand_padding(const Params& p, int64_t count, uint8_t* out) {
    const int64_t bytes = count * pixel_bytes(p);
    const auto word = static_cast<int16_t>(zero_point_of(p, 0));
    for (int64_t i = 0; i < bytes; i += 2) std::memcpy(out + i, &word, 2);
    return out + bytes;
  }
};

// Whether no activation that the tile reads is negative.
bool never_negative(const Int8Conv2dParams& p, const Conv2dTile& tile) {
  if ((p.padding_h || p.padding_w) && zero_point_of(p, 0) < 0) return false;
  const Position first(p, tile.pixel_begin), last(p, tile.pixel_end - 1);
  const auto row = [&](const Position& at, int64_t tap) {
    const int64_t h = tap_position(at.y, p.stride_h, p.padding_h, tap, p.dilation_h);
    return at.n * p.height + std::clamp<int64_t>(h, 0, p.height);
  };
  const int64_t row_bytes = p.width * p.shape.groups * p.shape.channels;
  const int8_t* at = p.input + row(first, 0) * row_bytes;
  const int8_t* end =
      p.input + std::min((last.n + 1) * p.height, row(last, p.kernel_h - 1) + 1) * row_bytes;
  __m256i all = _mm256_setzero_si256();
  for (; at + 32 <= end; at += 32) {
    all = _mm256_or_si256(all, load(reinterpret_cast<const uint8_t*>(at)));
  }
  bool negative = _mm256_movemask_epi8(all) != 0;
  for (; at < end; ++at) negative |= *at < 0;
  return !negative;
}

// ---------------------------------------------------------------------------------------------
// Depthwise

struct MaddDepthwise {
  // 8 channels after the other 8, so that the sums stay in registers.
  template <int Pixels, int PairStep>
  static void multiply(const DepthwiseTaps& taps, int64_t at, int32_t* sums) {
    constexpr int64_t kHalf = kPlaceBytes / 2;
    for (int64_t half = 0; half < 2; ++half, sums += kInt8Block / 2) {
      __m256i sum[Pixels];
      for_each<Pixels>([&](auto i) NNCX_INLINE { sum[i] = _mm256_setzero_si256(); });
      taps.for_each_line(
          at + half * kHalf, [&](const uint8_t* weights, const uint8_t* places) NNCX_INLINE {
            add_line<Pixels, PairStep>(taps, weights + half * kHalf, places, sum, load,
                                       [](__m256i& s, __m256i w, __m256i place)
                                           NNCX_INLINE { add(s, _mm256_madd_epi16(w, place)); });
          });
      for_each<Pixels>([&](auto i) NNCX_INLINE {
        _mm256_store_si256(reinterpret_cast<__m256i*>(sums + i * kInt8Block), sum[i]);
      });
    }
  }

  static void store(const Int8Epilogue& e, const Int8Rows& rows, int64_t o, int64_t outputs,
                    const int32_t* sums, int64_t width) {
    if (outputs == kInt8Block && is_plain_int8(e)) return store_16_bytes(e, rows, o, sums, width);
    store_int8_tile(e, rows, o, outputs, sums, width);
  }
};

// ---------------------------------------------------------------------------------------------
// Prepacking

// The four weights that meet in one lane: output `o` of two steps, half `half` of each.
struct Four {
  int8_t* w[4];

  Four(int8_t* steps, int64_t o, int64_t half) {
    for (int64_t i = 0; i < 4; ++i) {
      w[i] = steps + i / 2 * kStepBytes + o * kStepChannels + half * 2 + i % 2;
    }
  }

  // By how much those of one sign are too large together.
  int32_t excess(int32_t sign) const {
    int32_t size = 0;
    for (const int8_t* x : w) size += std::max(sign * *x, 0);
    return std::max(size - kSafeSum, 0);
  }

  int8_t* largest(int32_t sign) const {
    int8_t* best = w[0];
    for (int8_t* x : w) {
      if (sign * *x > sign * *best) best = x;
    }
    return best;
  }
};

// Takes from each four what it has beyond kSafeSum; false if there are too many.
bool take_outliers(const Conv2dWeightShape& s, int8_t* weights, BlockHeader& header,
                   Outlier* outliers) {
  for (int64_t step = 0; step < steps_of_filter(s); step += 2) {
    int8_t* steps = weights + step * kStepBytes;
    for (int64_t i = 0; i < 4 * kInt8Block; ++i) {
      const int32_t sign = i % 2 ? 1 : -1;
      const int64_t o = i / 4;
      const Four four(steps, o, i / 2 % 2);
      for (int32_t excess; (excess = four.excess(sign)) > 0;) {
        if (header.outliers == most_outliers(s)) return false;
        int8_t* w = four.largest(sign);
        const int32_t taken = sign * std::min(excess, sign * *w);
        *w = static_cast<int8_t>(*w - taken);
        const int64_t at = w - steps;
        outliers[header.outliers++] = {
            .at = static_cast<uint32_t>((step + at / kStepBytes) * kStepChannels +
                                        at % kStepChannels),
            .output = static_cast<uint16_t>(o),
            .excess = static_cast<int16_t>(taken)};
      }
    }
  }
  return true;
}

void put_back(int8_t* weights, BlockHeader& header, const Outlier* outliers) {
  for (; header.outliers; ++outliers, --header.outliers) {
    int8_t& w = weights[outliers->at / kStepChannels * kStepBytes +
                        outliers->output * kStepChannels + outliers->at % kStepChannels];
    w = static_cast<int8_t>(w + outliers->excess);
  }
}

}  // namespace

int64_t int8_conv2d_prepacked_bytes(const Conv2dWeightShape& s) {
  if (is_depthwise(s)) return depthwise_prepacked_bytes(s);
  return int8_blocks(s) * block_bytes(join_groups(s));
}

void int8_conv2d_prepack(const Conv2dWeightShape& s, const int8_t* weight, uint8_t* prepacked) {
  if (is_depthwise(s)) return depthwise_prepack(s, weight, prepacked);
  std::memset(prepacked, 0, int8_conv2d_prepacked_bytes(s));
  const Conv2dWeightShape joint = join_groups(s);
  const auto header = [&](int64_t block) -> BlockHeader& {
    return *reinterpret_cast<BlockHeader*>(prepacked + block * block_bytes(joint));
  };
  for_each_step(s, weight, [&](int64_t block, int64_t step, int64_t o, const int8_t* w) {
    uint8_t* weights = prepacked + block * block_bytes(joint) + sizeof(BlockHeader);
    std::memcpy(weights + step * kStepBytes + o * kStepChannels, w, kStepChannels);
    for (int64_t i = 0; i < kStepChannels; ++i) header(block).weight_sums[o] += w[i];
  });
  if (steps_of_tap(joint) % 2) return;
  for (int64_t block = 0; block < int8_blocks(s); ++block) {
    uint8_t* bytes = prepacked + block * block_bytes(joint);
    auto* weights = reinterpret_cast<int8_t*>(bytes + sizeof(BlockHeader));
    auto* outliers = reinterpret_cast<Outlier*>(weights + steps_of_filter(joint) * kStepBytes);
    header(block).paired = take_outliers(joint, weights, header(block), outliers);
    if (!header(block).paired) put_back(weights, header(block), outliers);
  }
}

int64_t int8_conv2d_scratch_bytes(const Int8Conv2dParams& p) {
  if (is_depthwise(p.shape)) return Int8Depthwise<MaddDepthwise>(p).scratch_bytes();
  const Int8Conv2dParams joint = join_groups(p);
  return std::max(Conv2dLines<BytesGemmOfLines>(joint).scratch_bytes(),
                  Conv2dLines<WordsGemmOfLines>(joint).scratch_bytes());
}

void int8_conv2d(const Int8Conv2dParams& p, const Conv2dTile& tile, uint8_t* scratch) {
  if (tile.pixel_begin == tile.pixel_end) return;
  if (is_depthwise(p.shape)) return Int8Depthwise<MaddDepthwise>(p).run(tile, scratch);
  const Int8Conv2dParams joint = join_groups(p);
  if (never_negative(joint, tile)) return Conv2dLines<BytesGemmOfLines>(joint).run(tile, scratch);
  Conv2dLines<WordsGemmOfLines>(joint).run(tile, scratch);
}

}  // namespace nncx::avx2
