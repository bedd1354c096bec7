// VNNI: `vpdpbusd` multiplies 64 bytes, unsigned by signed, and adds fours of products in 32 bits,
// where nothing saturates.
//
//   lines    (conv2d_lines.h) a + 128, which is unsigned; channels padded to a multiple of 4.
//   weights  prepacked [group][block of 16 outputs], each the sums of its weights over a filter, then
//            [tap][4 channels][16 outputs][4]. The sums times zero_point + 128 are subtracted.
//   sums     6 rows x 4 blocks in 24 of the 32 registers. From there they go to the output at once
//            where the epilogue is a common one (channels innermost, no residual, float32 or int8),
//            which makes a 1 x 1 convolution of 64 channels 1.3 times as fast; else through a tile.
#include "int8_conv2d.h"

#include <immintrin.h>

#include <algorithm>

#include "avx2/int8_depthwise.h"
#include "avx512/int8_tile.h"
#include "int8_rows.h"
#include "unroll.h"

namespace nncx::avx512 {
namespace {

constexpr int kMaxRows = 6;
constexpr int kMaxBlocks = 4;
constexpr int64_t kSumsBytes = kInt8Block * sizeof(int32_t);

NNCX_INLINE inline __m512i broadcast4(const uint8_t* from) {
  int32_t value;
  std::memcpy(&value, from, 4);
  return _mm512_set1_epi32(value);
}

// Where the sums of a row start: what the weights make of zero point + 128, subtracted.
void start(int32_t zero_point, const uint8_t* weights, int64_t block_bytes, int64_t blocks,
           int32_t* sums) {
  const __m512i offset = _mm512_set1_epi32(-128 - zero_point);
  for (int64_t b = 0; b < blocks; ++b) {
    const __m512i weight_sums = _mm512_loadu_si512(weights + b * block_bytes);
    _mm512_store_si512(sums + b * kInt8Block, _mm512_mullo_epi32(offset, weight_sums));
  }
}

// sum[row][block] = starts[row][block] + row x weights; `start_step` is 0 where all rows start alike.
// The empty asm keeps gcc from preparing for the epilogue in the loop, with copies and spills that
// take half its speed.
template <int Rows, int Blocks>
NNCX_INLINE inline void multiply(const uint8_t* const* rows_in_memory, const int32_t* starts,
                                 int64_t start_step, const Taps& taps, int64_t run_steps,
                                 const uint8_t* weights, int64_t block_bytes,
                                 __m512i (&sum)[Rows * Blocks]) {
  const uint8_t* rows[Rows];
  for_each<Rows>([&](auto r) NNCX_INLINE { rows[r] = rows_in_memory[r]; });
  for_each<Rows * Blocks>([&](auto i) NNCX_INLINE {
    sum[i] = _mm512_load_si512(starts + i / Blocks * start_step + i % Blocks * kInt8Block);
  });
  weights += kSumsBytes;
  for (int64_t line = 0; line < taps.lines; ++line) {
    for (int64_t run = 0; run < taps.runs; ++run) {
      int64_t at = line * taps.line_step + run * taps.run_step;
      const int64_t end = at + run_steps * kStepChannels;
      for (; at < end; at += kStepChannels, weights += kStepBytes) {
        __m512i w[Blocks];
        for_each<Blocks>([&](auto b)
                             NNCX_INLINE { w[b] = _mm512_loadu_si512(weights + b * block_bytes); });
        for_each<Rows>([&](auto r) NNCX_INLINE {
          const __m512i a = broadcast4(rows[r] + at);
          for_each<Blocks>([&](auto b) NNCX_INLINE {
            sum[r * Blocks + b] = _mm512_dpbusd_epi32(sum[r * Blocks + b], a, w[b]);
            asm("" : "+v"(sum[r * Blocks + b]));
          });
        });
      }
    }
  }
}

// The sums to memory, [row][Blocks * 16].
template <int Rows, int Blocks>
void gemm(const uint8_t* const* rows, const int32_t* starts, int64_t start_step, const Taps& taps,
          int64_t run_steps, const uint8_t* weights, int64_t block_bytes, int32_t* sums) {
  __m512i sum[Rows * Blocks];
  multiply<Rows, Blocks>(rows, starts, start_step, taps, run_steps, weights, block_bytes, sum);
  for_each<Rows * Blocks>([&](auto i)
                              NNCX_INLINE { _mm512_store_si512(sums + i * kInt8Block, sum[i]); });
}

// Whether sums of whole blocks can go from registers to the output.
bool is_common_epilogue(const Int8Conv2dParams& p) {
  const Int8Epilogue& e = p.epilogue;
  return e.channels_last && e.scale && !e.input_scale && !e.residual && !p.zero_point_per_image &&
         (e.output_is_int8 || e.dtype == Dtype::float32);
}

template <int Rows, class T>
void gemm_to_output(const uint8_t* const* rows, const int32_t* starts, const Taps& taps,
                    int64_t run_steps, const uint8_t* weights, int64_t block_bytes,
                    const Int8Epilogue e, int64_t pixel, int64_t o) {
  constexpr int kBlocks = kMaxBlocks;
  __m512i sum[Rows * kBlocks];
  multiply<Rows, kBlocks>(rows, starts, 0, taps, run_steps, weights, block_bytes, sum);
  T* out = static_cast<T*>(e.output) + pixel * e.channels + o;
  for_each<kBlocks>([&](auto b) NNCX_INLINE {
    const __m512 scale = _mm512_loadu_ps(e.scale + o + b * kInt8Block);
    const __m512 bias = e.bias ? _mm512_loadu_ps(e.bias + o + b * kInt8Block) : _mm512_setzero_ps();
    for_each<Rows>([&](auto r) NNCX_INLINE {
      __m512 y = _mm512_mul_ps(_mm512_cvtepi32_ps(sum[r * kBlocks + b]), scale);
      if (e.bias) y = _mm512_add_ps(y, bias);
      finish_lanes(e, y, out + r * e.channels + b * kInt8Block, 0xFFFF);
    });
  });
}

using GemmToOutput = void (*)(const uint8_t* const*, const int32_t*, const Taps&, int64_t,
                              const uint8_t*, int64_t, const Int8Epilogue, int64_t, int64_t);
template <class T>
constexpr GemmToOutput kToOutput[kMaxRows + 1] = {nullptr,
                                                  gemm_to_output<1, T>,
                                                  gemm_to_output<2, T>,
                                                  gemm_to_output<3, T>,
                                                  gemm_to_output<4, T>,
                                                  gemm_to_output<5, T>,
                                                  gemm_to_output<6, T>};

using Gemm = void (*)(const uint8_t* const*, const int32_t*, int64_t, const Taps&, int64_t,
                      const uint8_t*, int64_t, int32_t*);
template <int Blocks>
constexpr Gemm kGemm[kMaxRows + 1] = {nullptr,         gemm<1, Blocks>, gemm<2, Blocks>,
                                      gemm<3, Blocks>, gemm<4, Blocks>, gemm<5, Blocks>,
                                      gemm<6, Blocks>};
constexpr const Gemm* kGemms[kMaxBlocks + 1] = {nullptr, kGemm<1>, kGemm<2>, kGemm<3>, kGemm<4>};

struct VnniGemm : Int8Path {
  static constexpr int64_t kTileBlocks = kMaxBlocks;

  static int64_t block_bytes(const Conv2dWeightShape& s) {
    return kSumsBytes + steps_of_filter(s) * kStepBytes;
  }

  static int64_t pixel_bytes(const Params& p) { return steps_of_tap(p.shape) * kStepChannels; }

  // Up to 63 bytes behind the pixel are written too.
  NNCX_INLINE static void flip(const uint8_t* from, int64_t count, uint8_t* out) {
    const __m512i sign = _mm512_set1_epi8(-128);
    for (int64_t i = 0; i < count; i += 64) {
      const __mmask64 there = count - i >= 64 ? ~0ULL : (1ULL << (count - i)) - 1;
      _mm512_storeu_si512(out + i,
                          _mm512_xor_si512(_mm512_maskz_loadu_epi8(there, from + i), sign));
    }
  }

  static uint8_t* expand_pixels(const Params& p, const uint8_t* from, int64_t count, int64_t step,
                                uint8_t* out) {
    const int64_t bytes = pixel_bytes(p);
    if (p.shape.channels == step && bytes == step) {  // one group, no channels to pad
      flip(from, count * bytes, out);
      return out + count * bytes;
    }
    for (int64_t i = 0; i < count; ++i, from += step, out += bytes) {
      flip(from, p.shape.channels, out);
    }
    return out;
  }

  static uint8_t* expand_padding(const Params& p, int64_t count, uint8_t* out) {
    std::memset(out, zero_point_of(p, 0) + 128, count * pixel_bytes(p));
    return out + count * pixel_bytes(p);
  }

  static void gemm(const Params& p, const Rows& rows, const uint8_t* const* pointers,
                   const Taps& taps, const uint8_t* weights, int64_t blocks, int32_t* sums) {
    const int64_t run_steps = taps.run_pixels * steps_of_tap(p.shape);
    const int64_t bytes = block_bytes(p.shape), width = blocks * kBlock;
    alignas(64) int32_t alike[kMaxBlocks * kBlock];
    if (!p.zero_point_per_image) start(rows.zero_point[0], weights, bytes, blocks, alike);
    for (int64_t r = 0; r < rows.count; r += kMaxRows) {
      const int64_t count = std::min<int64_t>(kMaxRows, rows.count - r);
      int32_t* to = sums + r * width;
      if (p.zero_point_per_image) {
        for (int64_t i = 0; i < count; ++i) {
          start(rows.zero_point[r + i], weights, bytes, blocks, to + i * width);
        }
      }
      const int32_t* starts = p.zero_point_per_image ? to : alike;
      kGemms[blocks][count](pointers + r, starts, starts == to ? width : 0, taps, run_steps,
                            weights, bytes, to);
    }
  }

  static constexpr auto store = store_int8_tile_of_16;

  static void tile(const Params& p, const Rows& rows, const uint8_t* const* pointers,
                   const Taps& taps, const uint8_t* weights, int64_t blocks, int64_t o,
                   int64_t outputs) {
    const Int8Epilogue& e = p.epilogue;
    if (outputs < kMaxBlocks * kBlock || !is_common_epilogue(p)) {
      return multiply_then_store<VnniGemm>(p, rows, pointers, taps, weights, blocks, o, outputs);
    }
    const int64_t run_steps = taps.run_pixels * steps_of_tap(p.shape);
    const int64_t bytes = block_bytes(p.shape);
    alignas(64) int32_t starts[kMaxBlocks * kBlock];
    start(rows.zero_point[0], weights, bytes, kMaxBlocks, starts);
    const GemmToOutput* kernels = e.output_is_int8 ? kToOutput<int8_t> : kToOutput<float>;
    for (int64_t r = 0; r < rows.count; r += kMaxRows) {
      kernels[std::min<int64_t>(kMaxRows, rows.count - r)](pointers + r, starts, taps, run_steps,
                                                           weights, bytes, e, rows.first + r, o);
    }
  }
};

struct VnniDepthwise {
  template <int Pixels, int PairStep>
  static void multiply(const DepthwiseTaps& taps, int64_t at, int32_t* sums) {
    __m512i sum[Pixels];
    for_each<Pixels>([&](auto i) NNCX_INLINE { sum[i] = _mm512_setzero_si512(); });
    taps.for_each_line(at, [&](const uint8_t* weights, const uint8_t* places) NNCX_INLINE {
      add_line<Pixels, PairStep>(
          taps, weights, places, sum,
          [](const uint8_t* from) NNCX_INLINE { return _mm512_loadu_si512(from); },
          [](__m512i& s, __m512i w, __m512i place)
              NNCX_INLINE { s = _mm512_dpwssd_epi32(s, w, place); });
    });
    for_each<Pixels>([&](auto i)
                         NNCX_INLINE { _mm512_store_si512(sums + i * kInt8Block, sum[i]); });
  }

  static void store(const Int8Epilogue& e, const Int8Rows& rows, int64_t o, int64_t outputs,
                    const int32_t* sums, int64_t width) {
    if (outputs == kInt8Block && is_plain_int8(e)) return store_16_bytes(e, rows, o, sums, width);
    store_int8_tile_of_16(e, rows, o, outputs, sums, width);
  }
};

}  // namespace

int64_t int8_conv2d_prepacked_bytes(const Conv2dWeightShape& s) {
  if (is_depthwise(s)) return depthwise_prepacked_bytes(s);
  return int8_blocks(s) * VnniGemm::block_bytes(join_groups(s));
}

void int8_conv2d_prepack(const Conv2dWeightShape& s, const int8_t* weight, uint8_t* prepacked) {
  if (is_depthwise(s)) return depthwise_prepack(s, weight, prepacked);
  std::memset(prepacked, 0, int8_conv2d_prepacked_bytes(s));
  const int64_t block_bytes = VnniGemm::block_bytes(join_groups(s));
  for_each_step(s, weight, [&](int64_t block, int64_t step, int64_t o, const int8_t* w) {
    uint8_t* bytes = prepacked + block * block_bytes;
    auto* sums = reinterpret_cast<int32_t*>(bytes);
    std::memcpy(bytes + kSumsBytes + step * kStepBytes + o * kStepChannels, w, kStepChannels);
    for (int64_t i = 0; i < kStepChannels; ++i) sums[o] += w[i];
  });
}

int64_t int8_conv2d_scratch_bytes(const Int8Conv2dParams& p) {
  if (is_depthwise(p.shape)) return Int8Depthwise<VnniDepthwise>(p).scratch_bytes();
  return Conv2dLines<VnniGemm>(join_groups(p)).scratch_bytes();
}

void int8_conv2d(const Int8Conv2dParams& p, const Conv2dTile& tile, uint8_t* scratch) {
  if (is_depthwise(p.shape)) return Int8Depthwise<VnniDepthwise>(p).run(tile, scratch);
  Conv2dLines<VnniGemm>(join_groups(p)).run(tile, scratch);
}

}  // namespace nncx::avx512
