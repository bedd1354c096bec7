// A block of outputs is one vector, and a codebook of up to 16 entries one register: `vpermps`
// looks up a whole block at once. The loops are those of codebook_tiles.h. One row times
// 4096 x 4096 weights, on one core of a Zen 4, against torch's float32: 1 bit 22 times as fast,
// 2 bits 8, 4 bits 4.5, 5 bits 3.8, 8 bits 1. 1 bit with a codebook for each output 6, more bits so
// 0.6.
#include "codebook_conv2d.h"

#include <immintrin.h>

#include "codebook_tiles.h"

namespace nncx::avx512 {
namespace {

struct V {
  using Floats = __m512;
  using Words = __m512i;
  static constexpr int kLanes = 16;
  static constexpr int kRows = 8;   // sums enough to hide the latency of FMA
  static constexpr int kGroup = 4;  // activations whose 2^4 combinations fill a register

  NNCX_INLINE static Floats load(const float* x) { return _mm512_loadu_ps(x); }
  NNCX_INLINE static void store(float* to, Floats x) { _mm512_storeu_ps(to, x); }
  NNCX_INLINE static Floats broadcast(const float* x) { return _mm512_set1_ps(*x); }
  NNCX_INLINE static Floats zero() { return _mm512_setzero_ps(); }
  NNCX_INLINE static Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
  NNCX_INLINE static Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
  NNCX_INLINE static Words load_words(const uint8_t* step) { return _mm512_loadu_si512(step); }
  NNCX_INLINE static Words shift_right(Words x, int by) { return _mm512_srli_epi32(x, by); }
  NNCX_INLINE static Floats look_up(Floats table, Words index) {
    return _mm512_permutexvar_ps(index, table);
  }
};
static_assert(V::kLanes == kCodebookBlock);

// Codes lie in the output's word.
constexpr Place place(int slot, int64_t output, int64_t code) {
  return {output * 4 + code * slot / 8, static_cast<int>(code * slot % 8)};
}

// ---------------------------------------------------------------------------------------------
// Decoders

// 1 bit, any codebook: each output chooses between its two values.
struct Choices {
  static constexpr int kSlot = 1;
  __m512 values[2];

  Choices(const CodebookConv2dParams& p, const Outputs& outputs) {
    for (int code = 0; code < 2; ++code) {
      alignas(64) float entries[kCodebookBlock];
      entries_of(p, outputs, code, entries);
      values[code] = _mm512_load_ps(entries);
    }
  }

  template <class F>
  NNCX_INLINE void decode(int, const uint8_t* step, const F& f) const {
    const __m512i words = V::load_words(step);
    for_each<32>([&](auto j) NNCX_INLINE {
      const __mmask16 set = _mm512_movepi32_mask(_mm512_slli_epi32(words, 31 - j));
      f(j, _mm512_mask_blend_ps(set, values[0], values[1]));
    });
  }
};

// 2 to 8 bits, one codebook. `vpermps` looks at 4 bits of each lane, whatever stands above them,
// and `vpermi2ps` at 5; of larger codebooks all parts are looked up, and the bits above choose.
template <int Bits>
struct Registers {
  static constexpr int kSlot = 1 << slot_log2(Bits);
  static constexpr int kTables = Bits <= 4 ? 1 : 1 << (Bits - 4);
  __m512 tables[kTables];

  Registers(const CodebookConv2dParams& p, const Outputs&) {
    alignas(64) float entries[16 * kTables];
    for (int i = 0; i < 16 * kTables; ++i) entries[i] = p.codebook[i % (1 << Bits)];
    for (int i = 0; i < kTables; ++i) tables[i] = _mm512_load_ps(entries + 16 * i);
  }

  // Entries of Count tables from First on.
  template <int First, int Count>
  NNCX_INLINE __m512 look_up(__m512i index) const {
    if constexpr (Count == 1) {
      return _mm512_permutexvar_ps(index, tables[First]);
    } else if constexpr (Count == 2) {
      return _mm512_permutex2var_ps(tables[First], index, tables[First + 1]);
    } else {
      const __mmask16 high = _mm512_test_epi32_mask(index, _mm512_set1_epi32(16 * Count / 2));
      return _mm512_mask_blend_ps(high, look_up<First, Count / 2>(index),
                                  look_up<First + Count / 2, Count / 2>(index));
    }
  }

  template <class F>
  NNCX_INLINE void decode(int, const uint8_t* step, const F& f) const {
    const __m512i words = V::load_words(step);
    for_each<32 / kSlot>([&](auto j) NNCX_INLINE {
      f(j, look_up<0, kTables>(_mm512_srli_epi32(words, kSlot * j)));
    });
  }
};

// 2 to 8 bits, a codebook for each output.
template <int Slot>
struct Gather {
  static constexpr int kSlot = Slot;
  const float* codebook;
  __m512i mask;  // of a code: a weight that was tampered with reads no other memory
  __m512i rows;  // where each output's codebook starts

  Gather(const CodebookConv2dParams& p, const Outputs& outputs)
      : codebook(p.codebook + outputs.first * p.codebook_stride),
        mask(_mm512_set1_epi32((1 << p.bits) - 1)) {
    alignas(64) int32_t starts[kCodebookBlock];
    codebook_starts(p, outputs, starts);
    rows = _mm512_load_si512(starts);
  }

  template <class F>
  NNCX_INLINE void decode(int, const uint8_t* step, const F& f) const {
    const __m512i words = V::load_words(step);
    for_each<32 / Slot>([&](auto j) NNCX_INLINE {
      const __m512i codes = _mm512_and_si512(_mm512_srli_epi32(words, Slot * j), mask);
      f(j, _mm512_i32gather_ps(_mm512_add_epi32(rows, codes), codebook, sizeof(float)));
    });
  }
};

// ---------------------------------------------------------------------------------------------

using Run = void (*)(const CodebookConv2dParams&, const Conv2dTile&, uint8_t*);
constexpr Run kOneCodebook[9] = {nullptr,
                                 run<V, Choices>,
                                 run<V, Registers<2>>,
                                 run<V, Registers<3>>,
                                 run<V, Registers<4>>,
                                 run<V, Registers<5>>,
                                 run<V, Registers<6>>,
                                 run<V, Registers<7>>,
                                 run<V, Registers<8>>};
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

}  // namespace nncx::avx512
