// The table GEMM. For 4 signs of the activations, a, a 16-byte table holds popcount(a xor w) for
// all 16 values w of the weights: `pshufb` looks up 32 output channels at once and `paddb` adds
// them, 128 products of signs in two instructions. Only the table's address depends on the
// activations.
//
//   lines     (conv2d_lines.h) one byte per 4 signs, which is half the offset of their table.
//   weights   prepacked [group][block of 32 outputs][tap][byte][32 outputs]: a transposition of
//             bytes, so a weight still takes one bit (outputs are padded to a multiple of 32).
//   sums      8 bits wide for 31 bytes of channels (31 * 8 < 256), then spilled to 32.
//
// 4 rows x 2 blocks, or 8 x 1, keep 8 sums, 2 weights, 1 table and 1 mask in the 16 registers; 5 and
// 6 rows x 2 were no faster.
#include "binary_conv2d.h"

#include <immintrin.h>

#include <algorithm>

#include "binary_rows.h"
#include "binary_tile.h"
#include "unroll.h"

namespace nncx::avx2 {
namespace {

constexpr int kMaxSums = 8;  // rows x blocks
constexpr int64_t kSpillBytes = 31;
constexpr uint8_t kNotCounted = 16 * 2;  // the table of zeros: a pixel that does not count

constexpr int64_t channel_bytes(int64_t channels) { return (channels + 7) / 8; }

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
void gemm(const uint8_t* const* rows_in_memory, const Taps& taps, int64_t run_bytes,
          const uint8_t* weights, int64_t block_stride, int32_t* counts) {
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
      for (int64_t left = run_bytes; left > 0;) {
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

using Gemm = void (*)(const uint8_t* const*, const Taps&, int64_t, const uint8_t*, int64_t,
                      int32_t*);
constexpr Gemm kOneBlock[] = {nullptr,    gemm<1, 1>, gemm<2, 1>, gemm<3, 1>, gemm<4, 1>,
                              gemm<5, 1>, gemm<6, 1>, gemm<7, 1>, gemm<8, 1>};
constexpr Gemm kTwoBlocks[] = {nullptr, gemm<1, 2>, gemm<2, 2>, gemm<3, 2>, gemm<4, 2>};

// 8 bytes of signs -> 16 indices, low half of each byte first.
NNCX_INLINE inline void expand_8_bytes(const uint8_t* signs, uint8_t* indices) {
  const __m128i mask = _mm_set1_epi8(0x1E);
  const __m128i x = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(signs));
  const __m128i low = _mm_and_si128(_mm_add_epi8(x, x), mask);
  const __m128i high = _mm_and_si128(_mm_srli_epi16(x, 3), mask);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(indices), _mm_unpacklo_epi8(low, high));
}

struct TableGemm : BinaryPath {
  static int64_t pixel_bytes(const BinaryConv2dParams& p) {
    return 2 * channel_bytes(p.shape.channels);
  }

  static int64_t block_bytes(const BinaryWeightShape& s) {
    return kBlock * s.taps * channel_bytes(s.channels);
  }

  static bool contiguous(const BinaryConv2dParams&) { return true; }

  static uint8_t* expand_pixels(const BinaryConv2dParams& p, const uint8_t* signs, int64_t count,
                                int64_t step, uint8_t* indices) {
    const int64_t bytes = channel_bytes(p.shape.channels);
    for (int64_t i = 0; i < count; ++i, signs += step, indices += 2 * bytes) {
      for (int64_t k = 0; k < bytes; k += 8) expand_8_bytes(signs + k, indices + 2 * k);
    }
    return indices;
  }

  // Bits beyond the last channel are 0 in the weights and stay 0 here.
  static uint8_t* expand_padding(const BinaryConv2dParams& p, int64_t count, uint8_t* indices) {
    const int64_t bytes = pixel_bytes(p);
    uint8_t* end = indices + count * bytes;
    if (p.pad_value <= 0) {
      std::memset(indices, p.pad_value == 0 ? kNotCounted : 0, end - indices);
      return end;
    }
    for (; indices < end; indices += bytes) {
      std::memset(indices, 15 * 2, bytes);
      for (int64_t c = p.shape.channels; c < 4 * bytes; ++c) {
        indices[c / 4] &= static_cast<uint8_t>(~(2u << (c % 4)));
      }
    }
    return end;
  }

  static void gemm(const Params& p, const Rows& rows, const uint8_t* const* pointers,
                   const Taps& taps, const uint8_t* weights, int64_t blocks, int32_t* counts) {
    const Gemm* kernels = blocks == 1 ? kOneBlock : kTwoBlocks;
    const int64_t most = kMaxSums / blocks;
    const int64_t run_bytes = taps.run_pixels * channel_bytes(p.shape.channels);
    for (int64_t r = 0; r < rows.count; r += most) {
      kernels[std::min(most, rows.count - r)](pointers + r, taps, run_bytes, weights,
                                              block_bytes(p.shape),
                                              counts + r * blocks * kBinaryBlock);
    }
  }

  static constexpr auto store = store_tile;
  static constexpr auto tile = multiply_then_store<TableGemm>;
};

}  // namespace

int64_t binary_conv2d_prepacked_bytes(const BinaryWeightShape& s) {
  return s.groups * binary_blocks(s.out_channels) * TableGemm::block_bytes(s);
}

void binary_conv2d_prepack(const BinaryWeightShape& s, const uint8_t* weight, uint8_t* prepacked) {
  const int64_t bytes = channel_bytes(s.channels);
  const int64_t group_bytes = packed_bytes(s.channels);
  const int64_t block_stride = TableGemm::block_bytes(s);
  std::memset(prepacked, 0, binary_conv2d_prepacked_bytes(s));
  for (int64_t o = 0; o < s.groups * s.out_channels; ++o) {
    const int64_t in_group = o % s.out_channels;
    const int64_t block =
        o / s.out_channels * binary_blocks(s.out_channels) + in_group / kBinaryBlock;
    uint8_t* lane = prepacked + block * block_stride + in_group % kBinaryBlock;
    for (int64_t tap = 0; tap < s.taps; ++tap) {
      const uint8_t* from = weight + (o * s.taps + tap) * group_bytes;
      for (int64_t k = 0; k < bytes; ++k, lane += kBinaryBlock) *lane = from[k];
    }
  }
}

int64_t binary_conv2d_scratch_bytes(const BinaryConv2dParams& p) {
  return Conv2dLines<TableGemm>(p).scratch_bytes();
}

void binary_conv2d(const BinaryConv2dParams& p, const BinaryTile& tile, uint8_t* scratch) {
  Conv2dLines<TableGemm>(p).run(tile, scratch);
}

}  // namespace nncx::avx2
