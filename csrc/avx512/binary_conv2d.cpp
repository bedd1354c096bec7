// VPOPCNTQ on 8 output channels at once: xor, popcount and add make 8 x 64 products of signs. No
// table, no narrow sums, and the packed image is read as it is.
//
//   weights   prepacked [group][block of 32 outputs][tap][64-bit word][32 outputs of 8 bytes]: one
//   word
//             of activations is broadcast against four registers of weights.
//   rows      4 output pixels at a time. A tap outside the image is masked out of the popcount, or
//             reads a pixel of the pad value.
//   sums      64 bits wide: 4 rows x 4 registers, which leaves 16 of the 32 for everything else.
#include "binary_conv2d.h"

#include <immintrin.h>

#include <algorithm>

#include "binary_rows.h"
#include "pack_signs.h"
#include "unroll.h"

namespace nncx::avx512 {
namespace {

constexpr int kMaxRows = 4;
constexpr int kRegisters = kBinaryBlock / 8;

int64_t words(const BinaryWeightShape& s) { return packed_bytes(s.channels) / 8; }
int64_t block_words(const BinaryWeightShape& s) { return s.taps * words(s) * kBinaryBlock; }

// What one tap of up to kMaxRows output pixels reads.
struct Tap {
  const uint8_t* pixel[kMaxRows];
  __mmask8 counts[kMaxRows];  // all bits, or none outside the image
};

// counts[row][output] = popcount(pixels xor weights) over all taps.
template <int Rows>
void gemm(const Tap* taps, const BinaryWeightShape& s, const uint64_t* weights, int32_t* counts) {
  const int64_t tap_words = words(s);
  __m512i sums[Rows * kRegisters];
  for_each<Rows * kRegisters>([&](auto i) NNCX_INLINE { sums[i] = _mm512_setzero_si512(); });
  for (const Tap* tap = taps; tap < taps + s.taps; ++tap) {
    for (int64_t word = 0; word < tap_words; ++word, weights += kBinaryBlock) {
      __m512i w[kRegisters];
      for_each<kRegisters>([&](auto k) NNCX_INLINE { w[k] = _mm512_loadu_si512(weights + 8 * k); });
      for_each<Rows>([&](auto r) NNCX_INLINE {
        int64_t signs;
        std::memcpy(&signs, tap->pixel[r] + 8 * word, 8);
        const __m512i a = _mm512_set1_epi64(signs);
        for_each<kRegisters>([&](auto k) NNCX_INLINE {
          const __m512i differ = _mm512_xor_si512(a, w[k]);
          sums[r * kRegisters + k] = _mm512_add_epi64(
              sums[r * kRegisters + k], _mm512_maskz_popcnt_epi64(tap->counts[r], differ));
        });
      });
    }
  }
  for_each<Rows * kRegisters>([&](auto i) NNCX_INLINE {
    _mm256_store_si256(reinterpret_cast<__m256i*>(counts + 8 * i), _mm512_cvtepi64_epi32(sums[i]));
  });
}

using Gemm = void (*)(const Tap*, const BinaryWeightShape&, const uint64_t*, int32_t*);
constexpr Gemm kGemm[kMaxRows + 1] = {nullptr, gemm<1>, gemm<2>, gemm<3>, gemm<4>};

// Fills row `r` of all taps for one output pixel; returns how many of them count.
int64_t locate(const BinaryConv2dParams& p, int64_t pixel, int64_t group, const uint8_t* padding,
               int64_t r, Tap* taps) {
  const int64_t n = pixel / (p.out_height * p.out_width);
  const int64_t top = pixel / p.out_width % p.out_height * p.stride_h - p.padding_h;
  const int64_t left = pixel % p.out_width * p.stride_w - p.padding_w;
  const int64_t group_bytes = packed_bytes(p.shape.channels);
  int64_t counted = 0;
  for (int64_t i = 0; i < p.kernel_h; ++i) {
    const int64_t h = top + i * p.dilation_h;
    for (int64_t j = 0; j < p.kernel_w; ++j, ++taps) {
      const int64_t w = left + j * p.dilation_w;
      const bool inside = h >= 0 && h < p.height && w >= 0 && w < p.width;
      const int64_t at = ((n * p.height + h) * p.width + w) * p.shape.groups + group;
      taps->pixel[r] = inside ? p.input + at * group_bytes : padding;
      taps->counts[r] = inside || p.pad_value ? 0xFF : 0;
      counted += inside || p.pad_value;
    }
  }
  return counted;
}

// A pixel of the pad value; bits beyond the last channel stay 0, as in the weights.
void make_padding(const BinaryConv2dParams& p, uint8_t* pixel) {
  std::memset(pixel, 0, packed_bytes(p.shape.channels));
  if (p.pad_value <= 0) return;
  for (int64_t c = 0; c < p.shape.channels; ++c) pixel[c / 8] |= static_cast<uint8_t>(1 << (c % 8));
}

}  // namespace

int64_t binary_conv2d_prepacked_bytes(const BinaryWeightShape& s) {
  return s.groups * binary_blocks(s.out_channels) * block_words(s) * 8;
}

void binary_conv2d_prepack(const BinaryWeightShape& s, const uint8_t* weight, uint8_t* prepacked) {
  std::memset(prepacked, 0, binary_conv2d_prepacked_bytes(s));
  for (int64_t o = 0; o < s.groups * s.out_channels; ++o) {
    const int64_t in_group = o % s.out_channels;
    const int64_t block =
        o / s.out_channels * binary_blocks(s.out_channels) + in_group / kBinaryBlock;
    uint8_t* to = prepacked + 8 * (block * block_words(s) + in_group % kBinaryBlock);
    for (int64_t i = 0; i < s.taps * words(s); ++i, weight += 8, to += 8 * kBinaryBlock) {
      std::memcpy(to, weight, 8);
    }
  }
}

int64_t binary_conv2d_scratch_bytes(const BinaryConv2dParams& p) {
  return p.shape.taps * static_cast<int64_t>(sizeof(Tap)) + packed_bytes(p.shape.channels);
}

void binary_conv2d(const BinaryConv2dParams& p, const BinaryTile& tile, uint8_t* scratch) {
  const BinaryWeightShape& s = p.shape;
  const int64_t blocks = binary_blocks(s.out_channels);
  Tap* taps = reinterpret_cast<Tap*>(scratch);
  uint8_t* padding = scratch + s.taps * sizeof(Tap);
  make_padding(p, padding);
  const auto* weights = reinterpret_cast<const uint64_t*>(p.weight);
  for (int64_t group = tile.block_begin / blocks; group * blocks < tile.block_end; ++group) {
    const int64_t begin = std::max(tile.block_begin, group * blocks);
    const int64_t end = std::min(tile.block_end, (group + 1) * blocks);
    BinaryRows<kMaxRows> rows;
    for (rows.first = tile.pixel_begin; rows.first < tile.pixel_end; rows.first += rows.count) {
      rows.count = std::min<int64_t>(kMaxRows, tile.pixel_end - rows.first);
      for (int64_t r = 0; r < rows.count; ++r) {
        rows.bits[r] = s.channels * locate(p, rows.first + r, group, padding, r, taps);
      }
      for (int64_t block = begin; block < end; ++block) {
        alignas(64) int32_t counts[kMaxRows * kBinaryBlock];
        kGemm[rows.count](taps, s, weights + block * block_words(s), counts);
        store_rows(p, rows, group, (block - group * blocks) * kBinaryBlock, kBinaryBlock, counts);
      }
    }
  }
}

}  // namespace nncx::avx512
