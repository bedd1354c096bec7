// The table GEMM. For 4 signs of the activations, a, a 16-byte table holds popcount(a xor w) for
// all 16 values w of the weights: `pshufb` looks up 32 output channels at once and `paddb` adds
// them, 128 products of signs in two instructions. Only the table's address depends on the
// activations.
//
//   rows      a tile of up to kMaxRows output pixels is gathered into scratch, one byte per 4 signs
//             (half the offset of its table: the x86 address scale does the other half); pixels
//             outside the image get the entry for the pad value. The image is never expanded whole.
//   weights   prepacked [group][block of 32 outputs][tap][byte][32 outputs]: a plain transposition
//   of
//             bytes, so a weight still takes one bit (outputs are padded to a multiple of 32).
//   sums      8 bits wide for 31 bytes of channels (31 * 8 < 256), then spilled to 32.
//
// 4 rows x 2 blocks keep 8 sums, 2 weights, 1 table and 1 mask in the 16 registers; 5 and 6 rows
// were no faster.
#include "binary_conv2d.h"

#include <immintrin.h>

#include <algorithm>

#include "pack_signs.h"
#include "unroll.h"

namespace nncx::avx2 {
namespace {

constexpr int kMaxRows = 4;
constexpr int kMaxBlocks = 2;
static_assert(kMaxBlocks * kBinaryBlock <= kMaxRowOutputs);
constexpr int64_t kSpillBytes = 31;
constexpr int64_t kSlack = 16;  // gather writes 16 bytes at a time

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
constexpr uint8_t kNotCounted = 16 * 2;

NNCX_INLINE inline __m256i table_of(uint8_t index) {
  const uint8_t* entry = &kTables.entry[0][0] + 8 * static_cast<int64_t>(index);
  return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(entry)));
}

// ---------------------------------------------------------------------------------------------
// Gather: packed signs -> table indices

// 8 bytes of signs -> 16 indices, low half of each byte first.
void expand_8_bytes(const uint8_t* signs, uint8_t* indices) {
  const __m128i mask = _mm_set1_epi8(0x1E);
  const __m128i x = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(signs));
  const __m128i low = _mm_and_si128(_mm_add_epi8(x, x), mask);
  const __m128i high = _mm_and_si128(_mm_srli_epi16(x, 3), mask);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(indices), _mm_unpacklo_epi8(low, high));
}

void gather_signs(const uint8_t* signs, int64_t bytes, uint8_t* indices) {
  for (int64_t i = 0; i < bytes; i += 8) expand_8_bytes(signs + i, indices + 2 * i);
}

void gather_padding(int pad_value, int64_t channels, uint8_t* indices) {
  const int64_t bytes = channel_bytes(channels);
  const uint8_t index = pad_value == 0 ? kNotCounted : pad_value > 0 ? 15 * 2 : 0;
  std::memset(indices, index, 2 * bytes);
  if (pad_value <= 0) return;
  for (int64_t c = channels; c < 8 * bytes; ++c) {  // bits beyond the last channel stay 0
    indices[c / 4] &= static_cast<uint8_t>(~(2u << (c % 4)));
  }
}

// An output pixel, counted up without divisions.
struct Position {
  int64_t n, y, x;

  Position(const BinaryConv2dParams& p, int64_t pixel)
      : n(pixel / (p.out_height * p.out_width)),
        y(pixel / p.out_width % p.out_height),
        x(pixel % p.out_width) {}

  void next(const BinaryConv2dParams& p) {
    if (++x < p.out_width) return;
    x = 0;
    if (++y < p.out_height) return;
    y = 0;
    ++n;
  }
};

// One output pixel of one group: its row of indices, tap by tap. Returns the number of taps that
// count.
int64_t gather_row(const BinaryConv2dParams& p, const Position& at, int64_t group, uint8_t* row) {
  const int64_t bytes = channel_bytes(p.shape.channels);
  const int64_t group_bytes = packed_bytes(p.shape.channels);
  const int64_t pixel_bytes = p.shape.groups * group_bytes;
  const int64_t top = at.y * p.stride_h - p.padding_h;
  const int64_t left = at.x * p.stride_w - p.padding_w;
  int64_t inside = 0;
  for (int64_t i = 0; i < p.kernel_h; ++i) {
    const int64_t h = top + i * p.dilation_h;
    const bool line_inside = h >= 0 && h < p.height;
    const uint8_t* line = p.input +
                          ((at.n * p.height + (line_inside ? h : 0)) * p.width * pixel_bytes) +
                          group * group_bytes;
    for (int64_t j = 0; j < p.kernel_w; ++j, row += 2 * bytes) {
      const int64_t w = left + j * p.dilation_w;
      if (line_inside && w >= 0 && w < p.width) {
        gather_signs(line + w * pixel_bytes, bytes, row);
        ++inside;
      } else {
        gather_padding(p.pad_value, p.shape.channels, row);
      }
    }
  }
  return p.pad_value == 0 ? inside : p.shape.taps;
}

// ---------------------------------------------------------------------------------------------
// GEMM: counts[row][block * 32 + output] = popcount(row xor weights)

// sums[row][block] += popcount(4 signs of the row xor 4 of the weights), 32 outputs a block. The
// empty asm keeps gcc from adding the two halves of a byte before the sum, which needs twice the
// registers.
template <int Rows, int Blocks>
NNCX_INLINE inline void add_half_byte(const uint8_t* indices, int64_t stride,
                                      const __m256i (&weights)[Blocks],
                                      __m256i (&sums)[Rows * Blocks]) {
  for_each<Rows>([&](auto r) NNCX_INLINE {
    const __m256i table = table_of(indices[r * stride]);
    for_each<Blocks>([&](auto b) NNCX_INLINE {
      sums[r * Blocks + b] =
          _mm256_add_epi8(sums[r * Blocks + b], _mm256_shuffle_epi8(table, weights[b]));
      asm("" : "+x"(sums[r * Blocks + b]));
    });
  });
}

template <int Rows, int Blocks>
NNCX_INLINE inline void add_byte(const uint8_t* indices, int64_t stride, const uint8_t* weights,
                                 int64_t block_stride, __m256i (&sums)[Rows * Blocks]) {
  const __m256i mask = _mm256_set1_epi8(0x0F);
  const auto load = [&](int b) NNCX_INLINE {
    return _mm256_load_si256(reinterpret_cast<const __m256i*>(weights + b * block_stride));
  };
  __m256i half[Blocks];
  for_each<Blocks>([&](auto b) NNCX_INLINE { half[b] = _mm256_and_si256(load(b), mask); });
  add_half_byte<Rows, Blocks>(indices, stride, half, sums);
  for_each<Blocks>(
      [&](auto b) NNCX_INLINE { half[b] = _mm256_and_si256(_mm256_srli_epi16(load(b), 4), mask); });
  add_half_byte<Rows, Blocks>(indices + 1, stride, half, sums);
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
void gemm(const uint8_t* indices, int64_t stride, const uint8_t* weights, int64_t block_stride,
          int64_t bytes, int32_t* counts) {
  constexpr int kSums = Rows * Blocks;
  std::memset(counts, 0, kSums * kBinaryBlock * sizeof *counts);
  for (int64_t k = 0; k < bytes; k += kSpillBytes) {
    __m256i sums[kSums];
    for_each<kSums>([&](auto i) NNCX_INLINE { sums[i] = _mm256_setzero_si256(); });
    const int64_t end = std::min(k + kSpillBytes, bytes);
    for (int64_t i = k; i < end; ++i) {
      add_byte<Rows, Blocks>(indices + 2 * i, stride, weights + i * kBinaryBlock, block_stride,
                             sums);
    }
    for_each<kSums>([&](auto i) NNCX_INLINE { spill(sums[i], counts + i * kBinaryBlock); });
  }
}

using Gemm = void (*)(const uint8_t*, int64_t, const uint8_t*, int64_t, int64_t, int32_t*);
constexpr Gemm kGemm[kMaxRows + 1][kMaxBlocks + 1] = {
    {},
    {nullptr, gemm<1, 1>, gemm<1, 2>},
    {nullptr, gemm<2, 1>, gemm<2, 2>},
    {nullptr, gemm<3, 1>, gemm<3, 2>},
    {nullptr, gemm<4, 1>, gemm<4, 2>},
};

// ---------------------------------------------------------------------------------------------

struct Rows {
  int64_t first, count;    // output pixels
  int64_t bits[kMaxRows];  // positions that count
};

void store(const BinaryConv2dParams& p, const Rows& rows, int64_t group, int64_t block,
           int64_t blocks, int32_t* counts) {
  const BinaryWeightShape& s = p.shape;
  const int64_t image = p.out_height * p.out_width;
  const int64_t first = block * kBinaryBlock;
  const int64_t outputs = std::min(blocks * kBinaryBlock, s.out_channels - first);
  const int64_t o = group * s.out_channels + first;
  for (int64_t r = 0; r < rows.count; ++r, counts += blocks * kBinaryBlock) {
    for (int64_t i = 0; i < blocks * kBinaryBlock; ++i) {
      counts[i] = static_cast<int32_t>(rows.bits[r]) - 2 * counts[i];
    }
    const int64_t pixel = rows.first + r;
    const float* input_scale = p.epilogue.input_scale;
    if (input_scale) input_scale += (pixel / image * s.groups + group) * image + pixel % image;
    store_row(p.epilogue, counts, outputs, o, input_scale, pixel * s.groups * s.out_channels + o);
  }
}

int64_t row_bytes(const BinaryWeightShape& s) { return s.taps * channel_bytes(s.channels); }
int64_t row_stride(const BinaryWeightShape& s) { return 2 * row_bytes(s) + kSlack; }

// Output pixels [begin, end) times blocks [block_begin, block_end) of one group.
void run_group(const BinaryConv2dParams& p, int64_t group, const BinaryTile& tile,
               uint8_t* scratch) {
  const int64_t bytes = row_bytes(p.shape);
  const int64_t stride = row_stride(p.shape);
  const int64_t block_stride = bytes * kBinaryBlock;
  const uint8_t* weights = p.weight + group * binary_blocks(p.shape.out_channels) * block_stride;
  Position at(p, tile.pixel_begin);
  Rows rows;
  for (rows.first = tile.pixel_begin; rows.first < tile.pixel_end; rows.first += rows.count) {
    rows.count = std::min<int64_t>(kMaxRows, tile.pixel_end - rows.first);
    for (int64_t r = 0; r < rows.count; ++r, at.next(p)) {
      rows.bits[r] = p.shape.channels * gather_row(p, at, group, scratch + r * stride);
    }
    int64_t blocks;
    for (int64_t block = tile.block_begin; block < tile.block_end; block += blocks) {
      blocks = std::min<int64_t>(kMaxBlocks, tile.block_end - block);
      alignas(32) int32_t counts[kMaxRows * kMaxBlocks * kBinaryBlock];
      kGemm[rows.count][blocks](scratch, stride, weights + block * block_stride, block_stride,
                                bytes, counts);
      store(p, rows, group, block, blocks, counts);
    }
  }
}

}  // namespace

int64_t binary_conv2d_prepacked_bytes(const BinaryWeightShape& s) {
  return s.groups * binary_blocks(s.out_channels) * row_bytes(s) * kBinaryBlock;
}

void binary_conv2d_prepack(const BinaryWeightShape& s, const uint8_t* weight, uint8_t* prepacked) {
  const int64_t bytes = channel_bytes(s.channels);
  const int64_t group_bytes = packed_bytes(s.channels);
  std::memset(prepacked, 0, binary_conv2d_prepacked_bytes(s));
  for (int64_t o = 0; o < s.groups * s.out_channels; ++o) {
    const int64_t in_group = o % s.out_channels;
    const int64_t block =
        o / s.out_channels * binary_blocks(s.out_channels) + in_group / kBinaryBlock;
    uint8_t* lane = prepacked + block * row_bytes(s) * kBinaryBlock + in_group % kBinaryBlock;
    for (int64_t tap = 0; tap < s.taps; ++tap) {
      const uint8_t* from = weight + (o * s.taps + tap) * group_bytes;
      for (int64_t k = 0; k < bytes; ++k, lane += kBinaryBlock) *lane = from[k];
    }
  }
}

int64_t binary_conv2d_scratch_bytes(const BinaryWeightShape& s) { return kMaxRows * row_stride(s); }

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
