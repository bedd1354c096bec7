// Decoders for AVX2; the loops are those of codebook_tiles.h. One row times 4096 x 4096 weights, on
// one core of a Zen 4, against torch's float32: 1 bit 10 times as fast, 2 bits 6.5, 4 bits 3.7,
// 5 bits 1.9, 8 bits 1.05. 1 bit with a codebook for each output 6, more bits so 0.7.
#include "codebook_conv2d.h"

#include <immintrin.h>

#include "codebook_tiles.h"

namespace nncx::avx2 {
namespace {

struct V {
  using Floats = __m256;
  using Words = __m256i;
  static constexpr int kLanes = 8;
  static constexpr int kRows = 6;   // times 2 vectors of sums, 2 of weights, 1 of activations
  static constexpr int kGroup = 3;  // activations whose 2^3 combinations fill a register

  NNCX_INLINE static Floats load(const float* x) { return _mm256_loadu_ps(x); }
  NNCX_INLINE static void store(float* to, Floats x) { _mm256_storeu_ps(to, x); }
  NNCX_INLINE static Floats broadcast(const float* x) { return _mm256_broadcast_ss(x); }
  NNCX_INLINE static Floats zero() { return _mm256_setzero_ps(); }
  NNCX_INLINE static Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
  NNCX_INLINE static Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
  NNCX_INLINE static Words load_words(const uint8_t* step) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(step));
  }
  NNCX_INLINE static Words shift_right(Words x, int by) { return _mm256_srli_epi32(x, by); }
  NNCX_INLINE static Floats look_up(Floats table, Words index) {
    return _mm256_permutevar8x32_ps(table, index);
  }
};

constexpr int kVectors = kCodebookBlock / V::kLanes;

// Where a code lies in a step. 1 and 2 bits: in the output's word. Else bytes [2][code][output], of
// four outputs and four codes each, which is how Bytes unpacks them; of slots of 4 bits there are
// eight codes, the last four in the high halves.
constexpr Place place(int slot, int64_t output, int64_t code) {
  if (slot <= 2) return {output * 4 + code * slot / 8, static_cast<int>(code * slot % 8)};
  return {output / 4 * 16 + code % 4 * 4 + output % 4, static_cast<int>(code / 4 * 4)};
}

// ---------------------------------------------------------------------------------------------
// Decoders

// 1 bit, any codebook: each output chooses between its two values.
struct Choices {
  static constexpr int kSlot = 1;
  __m256 values[2][kVectors];

  Choices(const CodebookConv2dParams& p, const Outputs& outputs) {
    for (int code = 0; code < 2; ++code) {
      alignas(32) float entries[kCodebookBlock];
      entries_of(p, outputs, code, entries);
      for (int v = 0; v < kVectors; ++v) {
        values[code][v] = _mm256_load_ps(entries + v * V::kLanes);
      }
    }
  }

  template <class F>
  NNCX_INLINE void decode(int v, const uint8_t* step, const F& f) const {
    const __m256i words = V::load_words(step);
    for_each<32>([&](auto j) NNCX_INLINE {
      const __m256 sign = _mm256_castsi256_ps(_mm256_slli_epi32(words, 31 - j));
      f(j, _mm256_blendv_ps(values[0][v], values[1][v], sign));
    });
  }
};

// 2 bits, one codebook: `vpermilps` looks at 2 bits of each lane, whatever stands above them.
struct Pairs {
  static constexpr int kSlot = 2;
  __m256 table;

  Pairs(const CodebookConv2dParams& p, const Outputs&)
      : table(_mm256_broadcast_ps(reinterpret_cast<const __m128*>(p.codebook))) {}

  template <class F>
  NNCX_INLINE void decode(int, const uint8_t* step, const F& f) const {
    const __m256i words = V::load_words(step);
    for_each<16>([&](auto j) NNCX_INLINE {
      f(j, _mm256_permutevar_ps(table, _mm256_srli_epi32(words, 2 * j)));
    });
  }
};

// 3 to 5 bits, one codebook: `pshufb` looks up each of the four bytes of 32 floats, and unpacking
// puts them together, outputs on the lanes. Two `vpermps` and a blend take 1.5 times the shuffles.
template <int Slot>
struct Bytes {
  static constexpr int kSlot = Slot;
  static constexpr int kTables = Slot == 4 ? 1 : 2;  // of 16 entries
  __m256i planes[kTables][4];

  Bytes(const CodebookConv2dParams& p, const Outputs&) {
    alignas(16) uint8_t bytes[kTables][4][16] = {};
    for (int i = 0; i < 1 << p.bits; ++i) {
      const uint32_t entry = float_to_bits(p.codebook[i]);
      for (int b = 0; b < 4; ++b) bytes[i / 16][b][i % 16] = static_cast<uint8_t>(entry >> 8 * b);
    }
    for (int i = 0; i < 4 * kTables; ++i) {
      planes[i / 4][i % 4] = _mm256_broadcastsi128_si256(
          _mm_load_si128(reinterpret_cast<const __m128i*>(bytes[i / 4][i % 4])));
    }
  }

  NNCX_INLINE __m256i look_up(int b, __m256i index) const {
    const __m256i low = _mm256_shuffle_epi8(planes[0][b], index);
    if constexpr (kTables == 1) return low;
    const __m256i high = _mm256_shuffle_epi8(planes[kTables - 1][b], index);
    return _mm256_blendv_epi8(low, high, _mm256_slli_epi16(index, 3));
  }

  template <class F>
  NNCX_INLINE void decode(int, const uint8_t* step, const F& f) const {
    const __m256i words = V::load_words(step);
    const __m256i mask = _mm256_set1_epi8((1 << Slot) - 1);
    for_each<8 / Slot>([&](auto half) NNCX_INLINE {
      const __m256i index = _mm256_and_si256(half ? _mm256_srli_epi16(words, 4) : words, mask);
      __m256i b[4];
      for_each<4>([&](auto i) NNCX_INLINE { b[i] = look_up(i, index); });
      const __m256i low01 = _mm256_unpacklo_epi8(b[0], b[1]);
      const __m256i high01 = _mm256_unpackhi_epi8(b[0], b[1]);
      const __m256i low23 = _mm256_unpacklo_epi8(b[2], b[3]);
      const __m256i high23 = _mm256_unpackhi_epi8(b[2], b[3]);
      constexpr int kFirst = 4 * half;
      f(Index<kFirst>{}, _mm256_castsi256_ps(_mm256_unpacklo_epi16(low01, low23)));
      f(Index<kFirst + 1>{}, _mm256_castsi256_ps(_mm256_unpackhi_epi16(low01, low23)));
      f(Index<kFirst + 2>{}, _mm256_castsi256_ps(_mm256_unpacklo_epi16(high01, high23)));
      f(Index<kFirst + 3>{}, _mm256_castsi256_ps(_mm256_unpackhi_epi16(high01, high23)));
    });
  }
};

// 6 to 8 bits, one codebook: eight loads. `vgatherdps` takes 1.4 times as long on a Zen 4.
struct Loads {
  static constexpr int kSlot = 8;
  const float* codebook;
  uint32_t mask;  // of four codes: a weight that was tampered with reads no other memory

  Loads(const CodebookConv2dParams& p, const Outputs&)
      : codebook(p.codebook), mask(((1u << p.bits) - 1) * 0x01010101) {}

  template <class F>
  NNCX_INLINE void decode(int, const uint8_t* step, const F& f) const {
    for_each<4>([&](auto j) NNCX_INLINE {
      uint32_t codes[2];
      std::memcpy(codes, step + 4 * j, 4);
      std::memcpy(codes + 1, step + 4 * j + 16, 4);
      const auto entry = [&](int lane) NNCX_INLINE {
        return codebook[(codes[lane / 4] & mask) >> lane % 4 * 8 & 0xFF];
      };
      f(j, _mm256_setr_ps(entry(0), entry(1), entry(2), entry(3), entry(4), entry(5), entry(6),
                          entry(7)));
    });
  }
};

// 2 to 8 bits, a codebook for each output.
template <int Slot>
struct Gather {
  static constexpr int kSlot = Slot;
  const float* codebook;
  __m256i mask;            // of a code, as in Loads
  __m256i rows[kVectors];  // where each output's codebook starts

  Gather(const CodebookConv2dParams& p, const Outputs& outputs)
      : codebook(p.codebook + outputs.first * p.codebook_stride),
        mask(_mm256_set1_epi32((1 << p.bits) - 1)) {
    alignas(32) int32_t starts[kCodebookBlock];
    codebook_starts(p, outputs, starts);
    for (int v = 0; v < kVectors; ++v) {
      rows[v] = V::load_words(reinterpret_cast<const uint8_t*>(starts + v * V::kLanes));
    }
  }

  template <class F>
  NNCX_INLINE void decode(int v, const uint8_t* step, const F& f) const {
    const __m256i words = V::load_words(step);
    for_each<32 / Slot>([&](auto j) NNCX_INLINE {
      __m256i codes = words;
      if constexpr (Slot > 2) {  // four bytes of each half, one a lane
        constexpr int kByte = j % 4 * 4;
        codes =
            _mm256_shuffle_epi8(words, _mm256_setr_epi32(kByte, kByte + 1, kByte + 2, kByte + 3,
                                                         kByte, kByte + 1, kByte + 2, kByte + 3));
      }
      constexpr int kShift = Slot > 2 ? j / 4 * 4 : Slot * j;
      codes = _mm256_and_si256(_mm256_srli_epi32(codes, kShift), mask);
      f(j, _mm256_i32gather_ps(codebook, _mm256_add_epi32(rows[v], codes), sizeof(float)));
    });
  }
};

// ---------------------------------------------------------------------------------------------

using Run = void (*)(const CodebookConv2dParams&, const Conv2dTile&, uint8_t*);
constexpr Run kOneCodebook[9] = {nullptr,          run<V, Choices>,  run<V, Pairs>,
                                 run<V, Bytes<4>>, run<V, Bytes<4>>, run<V, Bytes<8>>,
                                 run<V, Loads>,    run<V, Loads>,    run<V, Loads>};
constexpr Run kOneForEachOutput[9] = {nullptr,           run<V, Choices>,   run<V, Gather<2>>,
                                      run<V, Gather<4>>, run<V, Gather<4>>, run<V, Gather<8>>,
                                      run<V, Gather<8>>, run<V, Gather<8>>, run<V, Gather<8>>};

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
  (p.codebook_stride == 0 ? kOneCodebook : kOneForEachOutput)[p.bits](p, tile, scratch);
}

}  // namespace nncx::avx2
