// The table GEMM. For 4 signs of the activations, a, a 16-byte table holds popcount(a xor w) for
// all 16 values w of the weights: `pshufb` looks up 32 output channels at once and `paddb` adds
// them, 128 products of signs in two instructions. Only the table's address depends on the
// activations.
//
//   rows      the output pixels, up to kMaxRows at a time. What their taps read lies in expanded
//             lines (binary_lines.h), a row is a pointer into them, and nothing is gathered.
//   weights   prepacked [group][block of 32 outputs][tap][byte][32 outputs]: a transposition of
//             bytes, so a weight still takes one bit (outputs are padded to a multiple of 32).
//   sums      8 bits wide for 31 bytes of channels (31 * 8 < 256), then spilled to 32.
//
// 4 rows x 2 blocks keep 8 sums, 2 weights, 1 table and 1 mask in the 16 registers; 5 and 6 rows
// were no faster.
#include "binary_conv2d.h"

#include <immintrin.h>

#include <algorithm>

#include "binary_lines.h"
#include "binary_rows.h"
#include "unroll.h"

namespace nncx::avx2 {
namespace {

constexpr int kMaxRows = 4;
constexpr int kMaxBlocks = 2;
static_assert(kMaxBlocks * kBinaryBlock <= kMaxRowOutputs);
constexpr int64_t kSpillBytes = 31;
// Entry a: popcount(a xor w) for w = 0..15. Entry 16, all zeros, is a pixel that does not count.
struct alignas(64) Tables {
  uint8_t entry[17][16];
  constexpr Tables() : entry{} {
    for (int a = 0; a < 16; ++a) {
      for (int w = 0; w < 16; ++w) {
        const int x = a ^ w;
        entry[a][w] = static_cast<uint8_t>((x & 1) + (x >> 1 & 1) + (x >> 2 & 1) + (x >> 3 & 1));
      }
    }
  }
};
constexpr Tables kTables;
NNCX_INLINE inline __m256i table_of(uint8_t index) {
  const uint8_t* entry = &kTables.entry[0][0] + 8 * static_cast<int64_t>(index);
  return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(entry)));
}

// ---------------------------------------------------------------------------------------------
// GEMM: counts[row][block * 32 + output] = popcount(row xor weights)

// How the taps of an output pixel lie in the expanded lines: runs of bytes, in the weights' order.
struct Taps {
  int64_t lines, line_step;  // kernel_h times this far apart, in indices
  int64_t runs, run_step;    // within a line
  int64_t run_bytes;         // of signs, two indices each

  explicit Taps(const BinaryConv2dParams& p)
      : lines(p.kernel_h),
        line_step(p.dilation_h * line_indices(p)),
        runs(p.dilation_w == 1 ? 1 : p.kernel_w),
        run_step(p.dilation_w * pixel_indices(p)),
        run_bytes(p.kernel_w / runs * channel_bytes(p.shape.channels)) {}
};

// sums[row][block] += popcount(4 signs of the row xor 4 of the weights), 32 outputs a block. The
// empty asm keeps gcc from adding the two halves of a byte before the sum, which needs twice the
// registers.
template <int Rows, int Blocks>
NNCX_INLINE inline void add_half_byte(const uint8_t* const (&rows)[Rows], int64_t at,
                                      const __m256i (&weights)[Blocks],
                                      __m256i (&sums)[Rows * Blocks]) {
  for_each<Rows>([&](auto r) NNCX_INLINE {
    const __m256i table = table_of(rows[r][at]);
    for_each<Blocks>([&](auto b) NNCX_INLINE {
      sums[r * Blocks + b] =
          _mm256_add_epi8(sums[r * Blocks + b], _mm256_shuffle_epi8(table, weights[b]));
      asm("" : "+x"(sums[r * Blocks + b]));
    });
  });
}

template <int Rows, int Blocks>
NNCX_INLINE inline void add_byte(const uint8_t* const (&rows)[Rows], int64_t at,
                                 const uint8_t* weights, int64_t block_stride,
                                 __m256i (&sums)[Rows * Blocks]) {
  const __m256i mask = _mm256_set1_epi8(0x0F);
  const auto load = [&](int b) NNCX_INLINE {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weights + b * block_stride));
  };
  __m256i half[Blocks];
  for_each<Blocks>([&](auto b) NNCX_INLINE { half[b] = _mm256_and_si256(load(b), mask); });
  add_half_byte<Rows, Blocks>(rows, at, half, sums);
  for_each<Blocks>(
      [&](auto b) NNCX_INLINE { half[b] = _mm256_and_si256(_mm256_srli_epi16(load(b), 4), mask); });
  add_half_byte<Rows, Blocks>(rows, at + 1, half, sums);
}

// counts[0..31] += the 32 bytes of sums.
NNCX_INLINE inline void spill(__m256i sums, int32_t* counts) {
  const __m128i half[2] = {_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1)};
  for_each<4>([&](auto i) NNCX_INLINE {
    const __m128i bytes = i % 2 ? _mm_srli_si128(half[i / 2], 8) : half[i / 2];
    __m256i* wide = reinterpret_cast<__m256i*>(counts + 8 * i);
    _mm256_store_si256(wide,
                       _mm256_add_epi32(_mm256_load_si256(wide), _mm256_cvtepu8_epi32(bytes)));
  });
}

template <int Rows, int Blocks>
void gemm(const uint8_t* const* rows_in_memory, const Taps& taps, const uint8_t* weights,
          int64_t block_stride, int32_t* counts) {
  constexpr int kSums = Rows * Blocks;
  std::memset(counts, 0, kSums * kBinaryBlock * sizeof *counts);
  const uint8_t* rows[Rows];
  for_each<Rows>([&](auto r) NNCX_INLINE { rows[r] = rows_in_memory[r]; });
  __m256i sums[kSums];
  const auto clear = [&]() NNCX_INLINE {
    for_each<kSums>([&](auto i) NNCX_INLINE { sums[i] = _mm256_setzero_si256(); });
  };
  const auto spill_all = [&]() NNCX_INLINE {
    for_each<kSums>([&](auto i) NNCX_INLINE { spill(sums[i], counts + i * kBinaryBlock); });
  };
  clear();
  int64_t room = kSpillBytes;  // before a sum could overflow
  for (int64_t line = 0; line < taps.lines; ++line) {
    for (int64_t run = 0; run < taps.runs; ++run) {
      int64_t at = line * taps.line_step + run * taps.run_step;
      for (int64_t left = taps.run_bytes; left > 0;) {
        const int64_t bytes = std::min(room, left);
        for (const int64_t end = at + 2 * bytes; at < end; at += 2, weights += kBinaryBlock) {
          add_byte<Rows, Blocks>(rows, at, weights, block_stride, sums);
        }
        left -= bytes;
        room -= bytes;
        if (room == 0) {
          spill_all();
          clear();
          room = kSpillBytes;
        }
      }
    }
  }
  if (room < kSpillBytes) spill_all();
}

using Gemm = void (*)(const uint8_t* const*, const Taps&, const uint8_t*, int64_t, int32_t*);
constexpr Gemm kGemm[kMaxRows + 1][kMaxBlocks + 1] = {
    {},
    {nullptr, gemm<1, 1>, gemm<1, 2>},
    {nullptr, gemm<2, 1>, gemm<2, 2>},
    {nullptr, gemm<3, 1>, gemm<3, 2>},
    {nullptr, gemm<4, 1>, gemm<4, 2>},
};

// ---------------------------------------------------------------------------------------------

// An output pixel, counted up without divisions.
struct Position {
  int64_t n, y, x;

  Position(const BinaryConv2dParams& p, int64_t pixel)
      : n(pixel / (p.out_height * p.out_width)),
        y(pixel / p.out_width % p.out_height),
        x(pixel % p.out_width) {}

  void next(const BinaryConv2dParams& p) {
    if (++x == p.out_width) next_line(p);
  }

  void next_line(const BinaryConv2dParams& p) {
    x = 0;
    if (++y < p.out_height) return;
    y = 0;
    ++n;
  }

  // The first of the lines that its taps read.
  int64_t line(const BinaryConv2dParams& p) const {
    return n * (p.height + 2 * p.padding_h) + y * p.stride_h;
  }
};

// How many of a kernel's taps along one dimension lie inside the image.
int64_t taps_inside(int64_t first, int64_t kernel, int64_t dilation, int64_t size) {
  int64_t inside = 0;
  for (int64_t i = 0; i < kernel; ++i) {
    const int64_t at = first + i * dilation;
    inside += at >= 0 && at < size;
  }
  return inside;
}

// How many products of signs make up the dot product.
int64_t counted_bits(const BinaryConv2dParams& p, const Position& at) {
  if (p.pad_value || !(p.padding_h || p.padding_w)) return p.shape.taps * p.shape.channels;
  return p.shape.channels *
         taps_inside(at.y * p.stride_h - p.padding_h, p.kernel_h, p.dilation_h, p.height) *
         taps_inside(at.x * p.stride_w - p.padding_w, p.kernel_w, p.dilation_w, p.width);
}

int64_t filter_bytes(const BinaryWeightShape& s) { return s.taps * channel_bytes(s.channels); }

// Output pixels [rows.first, end), whose lines from first_line on are expanded, times the tile's
// blocks of one group.
void run_lines(const BinaryConv2dParams& p, int64_t group, const BinaryTile& tile, Position at,
               int64_t begin, int64_t end, const uint8_t* lines) {
  const Taps taps(p);
  const int64_t first_line = at.line(p);
  const int64_t block_stride = filter_bytes(p.shape) * kBinaryBlock;
  const uint8_t* weights = p.weight + group * binary_blocks(p.shape.out_channels) * block_stride;
  BinaryRows<kMaxRows> rows;
  const uint8_t* indices[kMaxRows];
  for (rows.first = begin; rows.first < end; rows.first += rows.count) {
    rows.count = std::min<int64_t>(kMaxRows, end - rows.first);
    for (int64_t r = 0; r < rows.count; ++r, at.next(p)) {
      indices[r] = lines + (at.line(p) - first_line) * line_indices(p) +
                   at.x * p.stride_w * pixel_indices(p);
      rows.bits[r] = counted_bits(p, at);
    }
    int64_t blocks;
    for (int64_t block = tile.block_begin; block < tile.block_end; block += blocks) {
      blocks = std::min<int64_t>(kMaxBlocks, tile.block_end - block);
      alignas(32) int32_t counts[kMaxRows * kMaxBlocks * kBinaryBlock];
      kGemm[rows.count][blocks](indices, taps, weights + block * block_stride, block_stride,
                                counts);
      store_rows(p, rows, group, block * kBinaryBlock, blocks * kBinaryBlock, counts);
    }
  }
}

// The tile's pixels and blocks of one group, as many lines at a time as scratch holds.
void run_group(const BinaryConv2dParams& p, int64_t group, const BinaryTile& tile,
               uint8_t* scratch) {
  for (int64_t begin = tile.pixel_begin; begin < tile.pixel_end;) {
    const Position at(p, begin);
    const int64_t line_end = at.line(p) + lines_held(p);
    Position last = at;
    int64_t end = begin, lines_used;
    do {
      lines_used = last.line(p) + lines_spanned(p);
      end += p.out_width - last.x;
      last.next_line(p);
    } while (end < tile.pixel_end && last.line(p) + lines_spanned(p) <= line_end);
    end = std::min(end, tile.pixel_end);
    expand_lines(p, group, at.line(p), lines_used, scratch);
    run_lines(p, group, tile, at, begin, end, scratch);
    begin = end;
  }
}

}  // namespace

int64_t binary_conv2d_prepacked_bytes(const BinaryWeightShape& s) {
  return s.groups * binary_blocks(s.out_channels) * filter_bytes(s) * kBinaryBlock;
}

void binary_conv2d_prepack(const BinaryWeightShape& s, const uint8_t* weight, uint8_t* prepacked) {
  const int64_t bytes = channel_bytes(s.channels);
  const int64_t group_bytes = packed_bytes(s.channels);
  std::memset(prepacked, 0, binary_conv2d_prepacked_bytes(s));
  for (int64_t o = 0; o < s.groups * s.out_channels; ++o) {
    const int64_t in_group = o % s.out_channels;
    const int64_t block =
        o / s.out_channels * binary_blocks(s.out_channels) + in_group / kBinaryBlock;
    uint8_t* lane = prepacked + block * filter_bytes(s) * kBinaryBlock + in_group % kBinaryBlock;
    for (int64_t tap = 0; tap < s.taps; ++tap) {
      const uint8_t* from = weight + (o * s.taps + tap) * group_bytes;
      for (int64_t k = 0; k < bytes; ++k, lane += kBinaryBlock) *lane = from[k];
    }
  }
}

int64_t binary_conv2d_scratch_bytes(const BinaryConv2dParams& p) {
  return lines_held(p) * line_indices(p) + kSlack;
}

void binary_conv2d(const BinaryConv2dParams& p, const BinaryTile& tile, uint8_t* scratch) {
  const int64_t blocks = binary_blocks(p.shape.out_channels);
  for (int64_t group = tile.block_begin / blocks; group * blocks < tile.block_end; ++group) {
    BinaryTile part = tile;
    part.block_begin = std::max(tile.block_begin - group * blocks, int64_t{0});
    part.block_end = std::min(tile.block_end - group * blocks, blocks);
    run_group(p, group, part, scratch);
  }
}

}  // namespace nncx::avx2
