#include "codebook_conv2d.h"

#include <immintrin.h>

#include "codebook_tiles.h"

namespace nncx::avx2 {
namespace {

struct V {
  using Floats = __m256;
  using Words = __m256i;
  static constexpr int kLanes = 8;
  static constexpr int kRows = 6;
  static constexpr int kTables = 11;

  NNCX_INLINE static Floats load(const float* x) { return _mm256_loadu_ps(x); }
  NNCX_INLINE static void store(float* to, Floats x) { _mm256_storeu_ps(to, x); }
  NNCX_INLINE static Floats broadcast(const float* x) { return _mm256_broadcast_ss(x); }
  NNCX_INLINE static Floats zero() { return _mm256_setzero_ps(); }
  NNCX_INLINE static Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
  NNCX_INLINE static Words load_words(const uint8_t* from) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  }
};

// Where an output's code lies in a step. Slots of 4 bits are transposed, see Nibbles.
Place place(int slot, int64_t output, int64_t code) {
  if (slot == 4) {
    return {output / 4 * 16 + code % 4 * 4 + output % 4, static_cast<int>(code / 4 * 4)};
  }
  return {output * 4 + code * slot / 8, static_cast<int>(code * slot % 8)};
}

// ---------------------------------------------------------------------------------------------
// Decoders, one codebook for all outputs

// 1 and 2 bits: `vpermilps` looks at 2 bits of each lane, whatever stands above them.
template <int Slot>
struct Pairs {
  static constexpr int kSlot = Slot;
  __m256 table;

  Pairs(const CodebookConv2dParams& p, int64_t, int64_t) {
    const float* c = p.codebook;
    table = Slot == 1 ? _mm256_setr_ps(c[0], c[1], c[0], c[1], c[0], c[1], c[0], c[1])
                      : _mm256_broadcast_ps(reinterpret_cast<const __m128*>(c));
  }

  template <class F>
  NNCX_INLINE void decode(int, __m256i words, const F& f) const {
    for_each<32 / Slot>([&](auto j) NNCX_INLINE {
      f(j, _mm256_permutevar_ps(table, _mm256_srli_epi32(words, Slot * j)));
    });
  }
};

// 3 and 4 bits: `pshufb` looks up each of the four bytes of 32 floats, and unpacking puts them
// together. Within 16 bytes of a step lie 4 outputs x 4 codes, outputs innermost, and in the high
// halves 4 codes more, so that unpacked vectors have outputs on their lanes.
struct Nibbles {
  static constexpr int kSlot = 4;
  __m256i planes[4];

  Nibbles(const CodebookConv2dParams& p, int64_t, int64_t) {
    alignas(16) uint8_t bytes[4][16] = {};
    for (int i = 0; i < 1 << p.bits; ++i) {
      const uint32_t entry = float_to_bits(p.codebook[i]);
      for (int b = 0; b < 4; ++b) bytes[b][i] = static_cast<uint8_t>(entry >> (8 * b));
    }
    for (int b = 0; b < 4; ++b) {
      planes[b] =
          _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(bytes[b])));
    }
  }

  template <class F>
  NNCX_INLINE void decode(int, __m256i words, const F& f) const {
    const __m256i mask = _mm256_set1_epi8(0x0F);
    for_each<2>([&](auto half) NNCX_INLINE {
      const __m256i index = _mm256_and_si256(half ? _mm256_srli_epi16(words, 4) : words, mask);
      __m256i b[4];
      for_each<4>([&](auto i) NNCX_INLINE { b[i] = _mm256_shuffle_epi8(planes[i], index); });
      const __m256i low01 = _mm256_unpacklo_epi8(b[0], b[1]);
      const __m256i high01 = _mm256_unpackhi_epi8(b[0], b[1]);
      const __m256i low23 = _mm256_unpacklo_epi8(b[2], b[3]);
      const __m256i high23 = _mm256_unpackhi_epi8(b[2], b[3]);
      f(Index<4 * half.value>{}, _mm256_castsi256_ps(_mm256_unpacklo_epi16(low01, low23)));
      f(Index<4 * half.value + 1>{}, _mm256_castsi256_ps(_mm256_unpackhi_epi16(low01, low23)));
      f(Index<4 * half.value + 2>{}, _mm256_castsi256_ps(_mm256_unpacklo_epi16(high01, high23)));
      f(Index<4 * half.value + 3>{}, _mm256_castsi256_ps(_mm256_unpackhi_epi16(high01, high23)));
    });
  }
};

// ---------------------------------------------------------------------------------------------
// Decoders for any codebook

// 1 bit: each output chooses between its two values.
struct Choices {
  static constexpr int kSlot = 1;
  __m256 zero[2], one[2];

  Choices(const CodebookConv2dParams& p, int64_t o, int64_t outputs) {
    alignas(32) float entries[2][kCodebookBlock] = {};
    for (int64_t i = 0; i < outputs; ++i) {
      const float* codebook = p.codebook + (o + i) * p.codebook_stride;
      entries[0][i] = codebook[0];
      entries[1][i] = codebook[1];
    }
    for (int v = 0; v < 2; ++v) {
      zero[v] = _mm256_load_ps(entries[0] + 8 * v);
      one[v] = _mm256_load_ps(entries[1] + 8 * v);
    }
  }

  template <class F>
  NNCX_INLINE void decode(int v, __m256i words, const F& f) const {
    for_each<32>([&](auto j) NNCX_INLINE {
      const __m256 sign = _mm256_castsi256_ps(_mm256_slli_epi32(words, 31 - j));
      f(j, _mm256_blendv_ps(zero[v], one[v], sign));
    });
  }
};

// `vgatherdps`, where there are too many entries for a register.
template <int Slot>
struct Gather {
  static constexpr int kSlot = Slot;
  const float* codebook;
  __m256i rows[2];  // where each output's codebook starts

  Gather(const CodebookConv2dParams& p, int64_t o, int64_t outputs)
      : codebook(p.codebook + o * p.codebook_stride) {
    alignas(32) int32_t starts[kCodebookBlock];
    for (int64_t i = 0; i < kCodebookBlock; ++i) {
      starts[i] = static_cast<int32_t>(std::min(i, outputs - 1) * p.codebook_stride);
    }
    for (int v = 0; v < 2; ++v) {
      rows[v] = _mm256_load_si256(reinterpret_cast<const __m256i*>(starts + 8 * v));
    }
  }

  template <class F>
  NNCX_INLINE void decode(int v, __m256i words, const F& f) const {
    const __m256i mask = _mm256_set1_epi32((1 << Slot) - 1);
    for_each<32 / Slot>([&](auto j) NNCX_INLINE {
      __m256i code;
      if constexpr (Slot == 4) {  // lies as Nibbles likes it
        constexpr int kFirst = j % 4 * 4;
        const __m256i spread = _mm256_broadcastsi128_si256(
            _mm_setr_epi8(kFirst, -1, -1, -1, kFirst + 1, -1, -1, -1, kFirst + 2, -1, -1, -1,
                          kFirst + 3, -1, -1, -1));
        code = _mm256_srli_epi32(_mm256_shuffle_epi8(words, spread), j / 4 * 4);
      } else {
        code = _mm256_srli_epi32(words, Slot * j);
      }
      code = _mm256_and_si256(code, mask);
      f(j, _mm256_i32gather_ps(codebook, _mm256_add_epi32(rows[v], code), 4));
    });
  }
};

}  // namespace

int64_t codebook_conv2d_prepacked_bytes(const Conv2dWeightShape& s, int bits) {
  return prepacked_bytes(s, bits);
}

void codebook_conv2d_prepack(const Conv2dWeightShape& s, int bits, const uint8_t* codes,
                             uint8_t* prepacked) {
  prepack(s, bits, codes, prepacked, place);
}

int64_t codebook_conv2d_scratch_bytes(const CodebookConv2dParams& p) {
  return Scratch::carve<V>(p, nullptr).bytes;
}

void codebook_conv2d(const CodebookConv2dParams& p, const Conv2dTile& tile, uint8_t* scratch) {
  const bool one_codebook = p.codebook_stride == 0;
  switch (slot_bits(p.bits)) {
    case 1:
      return one_codebook ? run<V, Pairs<1>>(p, tile, scratch) : run<V, Choices>(p, tile, scratch);
    case 2:
      return one_codebook ? run<V, Pairs<2>>(p, tile, scratch)
                          : run<V, Gather<2>>(p, tile, scratch);
    case 4:
      return one_codebook ? run<V, Nibbles>(p, tile, scratch) : run<V, Gather<4>>(p, tile, scratch);
    default:
      return run<V, Gather<8>>(p, tile, scratch);
  }
}

}  // namespace nncx::avx2
