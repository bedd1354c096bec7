// VPOPCNTQ on 8 output channels at once: xor, popcount and add make 8 x 64 products of signs. No
// table and no narrow sums.
//
//   lines     (conv2d_lines.h) the 64-bit words of signs as they are. Where padding counts as 0, a
//             word behind each pixel says whether it counts: it masks the popcount, so borders cost
//             no more. (VPTERNLOG for xor and mask in one is slower: it overwrites an operand.)
//   weights   prepacked [group][block of 32 outputs][tap][64-bit word][32 outputs of 8 bytes]: one
//             word of activations is broadcast against four registers of weights.
//   sums      64 bits wide: 4 rows x 4 registers, which leaves 16 of the 32 for everything else.
#include "binary_conv2d.h"

#include <immintrin.h>

#include <algorithm>

#include "avx2/binary_tile.h"
#include "binary_rows.h"
#include "pack_signs.h"
#include "unroll.h"

namespace nncx::avx512 {
namespace {

constexpr int kMaxRows = 4;
constexpr int kRegisters = kBinaryBlock / 8;

int64_t words(int64_t channels) { return packed_bytes(channels) / 8; }

NNCX_INLINE inline __m512i broadcast(const uint8_t* word) {
  int64_t value;
  std::memcpy(&value, word, 8);
  return _mm512_set1_epi64(value);
}

// counts[row][32] = popcount(row xor weights). With Masked, each pixel of `run_words` is followed by
// a word of ones or, if it does not count, of zeros.
template <int Rows, bool Masked>
void gemm(const uint8_t* const* rows_in_memory, const Taps& taps, int64_t run_words,
          const uint64_t* weights, int64_t counts_stride, int32_t* counts) {
  const uint8_t* rows[Rows];
  for_each<Rows>([&](auto r) NNCX_INLINE { rows[r] = rows_in_memory[r]; });
  __m512i sums[Rows * kRegisters];
  for_each<Rows * kRegisters>([&](auto i) NNCX_INLINE { sums[i] = _mm512_setzero_si512(); });
  for (int64_t line = 0; line < taps.lines; ++line) {
    for (int64_t run = 0; run < taps.runs; ++run) {
      const int64_t begin = line * taps.line_step + run * taps.run_step;
      const int64_t end = begin + 8 * run_words;
      __mmask8 counts_at[Rows];
      for_each<Rows>([&](auto r) NNCX_INLINE { counts_at[r] = Masked ? rows[r][end] : 0xFF; });
      for (int64_t at = begin; at < end; at += 8, weights += kBinaryBlock) {
        __m512i w[kRegisters];
        for_each<kRegisters>([&](auto k)
                                 NNCX_INLINE { w[k] = _mm512_loadu_si512(weights + 8 * k); });
        for_each<Rows>([&](auto r) NNCX_INLINE {
          const __m512i a = broadcast(rows[r] + at);
          for_each<kRegisters>([&](auto k) NNCX_INLINE {
            const __m512i differ = _mm512_xor_si512(a, w[k]);
            const __m512i count = Masked ? _mm512_maskz_popcnt_epi64(counts_at[r], differ)
                                         : _mm512_popcnt_epi64(differ);
            __m512i& sum = sums[r * kRegisters + k];
            sum = _mm512_add_epi64(sum, count);
          });
        });
      }
    }
  }
  for_each<Rows * kRegisters>([&](auto i) NNCX_INLINE {
    int32_t* to = counts + i / kRegisters * counts_stride + i % kRegisters * 8;
    _mm256_store_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi64_epi32(sums[i]));
  });
}

using Gemm = void (*)(const uint8_t* const*, const Taps&, int64_t, const uint64_t*, int64_t,
                      int32_t*);
constexpr Gemm kGemm[2][kMaxRows + 1] = {
    {nullptr, gemm<1, false>, gemm<2, false>, gemm<3, false>, gemm<4, false>},
    {nullptr, gemm<1, true>, gemm<2, true>, gemm<3, true>, gemm<4, true>},
};

struct PopcountGemm : BinaryPath {
  // Whether a word behind each pixel says if it counts.
  static bool masked(const BinaryConv2dParams& p) {
    return p.pad_value == 0 && (p.padding_h || p.padding_w);
  }

  static bool contiguous(const BinaryConv2dParams& p) { return !masked(p); }

  static int64_t pixel_bytes(const BinaryConv2dParams& p) {
    return packed_bytes(p.shape.channels) + (masked(p) ? 8 : 0);
  }

  static int64_t block_bytes(const BinaryWeightShape& s) {
    return kBlock * s.taps * packed_bytes(s.channels);
  }

  static uint8_t* expand_pixels(const BinaryConv2dParams& p, const uint8_t* signs, int64_t count,
                                int64_t step, uint8_t* out) {
    const int64_t bytes = packed_bytes(p.shape.channels);
    const bool mask = masked(p);
    for (int64_t i = 0; i < count; ++i, signs += step) {
      for (int64_t k = 0; k < bytes; k += 8, out += 8) std::memcpy(out, signs + k, 8);
      if (mask) {
        std::memset(out, 0xFF, 8);
        out += 8;
      }
    }
    return out;
  }

  // Bits beyond the last channel are 0 in the weights and stay 0 here.
  static uint8_t* expand_padding(const BinaryConv2dParams& p, int64_t count, uint8_t* out) {
    const int64_t bytes = pixel_bytes(p);
    uint8_t* end = out + count * bytes;
    std::memset(out, 0, end - out);
    if (p.pad_value <= 0) return end;
    for (; out < end; out += bytes) {
      std::memset(out, 0xFF, p.shape.channels / 8);
      for (int64_t c = p.shape.channels / 8 * 8; c < p.shape.channels; ++c) {
        out[c / 8] |= static_cast<uint8_t>(1 << (c % 8));
      }
    }
    return end;
  }

  static void gemm(const Params& p, const Rows& rows, const uint8_t* const* pointers,
                   const Taps& taps, const uint8_t* weights, int64_t blocks, int32_t* counts) {
    const Gemm* kernels = kGemm[masked(p)];
    const int64_t run_words = taps.run_pixels * words(p.shape.channels);
    const int64_t width = blocks * kBinaryBlock;
    for (int64_t block = 0; block < blocks; ++block) {
      const auto* block_weights =
          reinterpret_cast<const uint64_t*>(weights + block * block_bytes(p.shape));
      for (int64_t r = 0; r < rows.count; r += kMaxRows) {
        kernels[std::min<int64_t>(kMaxRows, rows.count - r)](
            pointers + r, taps, run_words, block_weights, width,
            counts + r * width + block * kBinaryBlock);
      }
    }
  }

  static constexpr auto store = store_tile;
  static constexpr auto tile = multiply_then_store<PopcountGemm>;
};

}  // namespace

int64_t binary_conv2d_prepacked_bytes(const BinaryWeightShape& s) {
  return s.groups * binary_blocks(s.out_channels) * PopcountGemm::block_bytes(s);
}

void binary_conv2d_prepack(const BinaryWeightShape& s, const uint8_t* weight, uint8_t* prepacked) {
  const int64_t block_stride = PopcountGemm::block_bytes(s);
  std::memset(prepacked, 0, binary_conv2d_prepacked_bytes(s));
  for (int64_t o = 0; o < s.groups * s.out_channels; ++o) {
    const int64_t in_group = o % s.out_channels;
    const int64_t block =
        o / s.out_channels * binary_blocks(s.out_channels) + in_group / kBinaryBlock;
    uint8_t* to = prepacked + block * block_stride + 8 * (in_group % kBinaryBlock);
    for (int64_t i = 0; i < s.taps * words(s.channels); ++i, weight += 8, to += 8 * kBinaryBlock) {
      std::memcpy(to, weight, 8);
    }
  }
}

int64_t binary_conv2d_scratch_bytes(const BinaryConv2dParams& p) {
  return Conv2dLines<PopcountGemm>(p).scratch_bytes();
}

void binary_conv2d(const BinaryConv2dParams& p, const BinaryTile& tile, uint8_t* scratch) {
  Conv2dLines<PopcountGemm>(p).run(tile, scratch);
}

}  // namespace nncx::avx512
