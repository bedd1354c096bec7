// Vectors of 8.
//
//   hashed_linear   lanes are outputs. For each block of 16, kChunk k's of the weight are hashed to
//                   a panel [k][16], which stays in L1 while the rows of a strip meet it, kRows at
//                   a time, in registers. Sums wait in scratch between chunks.
//   the others      lanes are neighbours in a row of the weight
//
// To hash and look up a vector of weights takes some 20 instructions and a gather. One row has no
// kernel of its own: beside that, to store the panel and read it again is little.
#include "hashed_linear.h"

#include <immintrin.h>

#include <algorithm>

#include "unroll.h"

namespace nncx::avx2 {
namespace {

using Floats = __m256;
using Words = __m256i;
constexpr int kLanes = 8;
constexpr int kRows = 6;         // times 2 vectors of sums, 2 of weights, 1 of activations
constexpr int64_t kChunk = 256;  // k's in a panel: 16 KB
constexpr int64_t kStrip = 512;  // rows: 32 KB of sums

NNCX_INLINE inline Floats load(const float* x) { return _mm256_loadu_ps(x); }
NNCX_INLINE inline void store(float* to, Floats x) { _mm256_storeu_ps(to, x); }
NNCX_INLINE inline Floats broadcast(const float* x) { return _mm256_broadcast_ss(x); }
NNCX_INLINE inline Floats zero() { return _mm256_setzero_ps(); }
NNCX_INLINE inline Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }

NNCX_INLINE inline Words words(uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); }
NNCX_INLINE inline Words load_words(const uint32_t* x) {
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(x));
}
NNCX_INLINE inline void store_words(uint32_t* to, Words x) {
  _mm256_store_si256(reinterpret_cast<__m256i*>(to), x);
}
NNCX_INLINE inline Words add(Words a, Words b) { return _mm256_add_epi32(a, b); }
NNCX_INLINE inline Words multiply(Words a, Words b) { return _mm256_mullo_epi32(a, b); }
NNCX_INLINE inline Words xor_shifted(Words x, int by) {
  return _mm256_xor_si256(x, _mm256_srli_epi32(x, by));
}
// The upper halves of the products; `_mm256_mul_epu32` multiplies every other lane.
NNCX_INLINE inline Words multiply_high(Words a, Words b) {
  const __m256i even = _mm256_srli_epi64(_mm256_mul_epu32(a, b), 32);
  return _mm256_blend_epi32(even, _mm256_mul_epu32(_mm256_srli_epi64(a, 32), b), 0xAA);
}
NNCX_INLINE inline Floats look_up(const float* buckets, Words places) {
  const Floats value = _mm256_i32gather_ps(buckets, _mm256_srli_epi32(places, 1), sizeof(float));
  return _mm256_xor_ps(value, _mm256_castsi256_ps(_mm256_slli_epi32(places, 31)));
}

// hash_place of kLanes at once. `first` is the key with k * kHashStep added.
NNCX_INLINE inline Words places_of(Words first, Words second, uint32_t places) {
  auto x = multiply(xor_shifted(first, 16), words(kHashMultipliers[0]));
  x = multiply(add(xor_shifted(x, 15), second), words(kHashMultipliers[1]));
  return multiply_high(x, words(places));
}

// The keys of a block's outputs, also of those that do not exist.
struct BlockKeys {
  alignas(64) uint32_t first[kHashedBlock], second[kHashedBlock];

  BlockKeys(uint64_t seed, int64_t block) {
    for (int64_t i = 0; i < kHashedBlock; ++i) {
      const HashKeys keys = hash_keys(seed, block * kHashedBlock + i);
      first[i] = keys.first;
      second[i] = keys.second;
    }
  }
};

// panel[k][16] of the k's [begin, end).
void hash_panel(const HashedWeight& w, const BlockKeys& keys, int64_t begin, int64_t end,
                float* panel) {
  constexpr int kVectors = kHashedBlock / kLanes;
  Words first[kVectors], second[kVectors];
  for_each<kVectors>([&](auto v) NNCX_INLINE {
    first[v] = load_words(keys.first + v * kLanes);
    second[v] = load_words(keys.second + v * kLanes);
  });
  for (int64_t k = begin; k < end; ++k, panel += kHashedBlock) {
    const auto step = words(static_cast<uint32_t>(k) * kHashStep);
    for_each<kVectors>([&](auto v) NNCX_INLINE {
      const auto places = places_of(add(first[v], step), second[v], w.places);
      store(panel + v * kLanes, look_up(w.buckets, places));
    });
  }
}

// sums[row][16] (+)= `count` k's of Rows rows times the panel; `x` are the first row's.
template <int Rows>
void multiply_rows(const float* x, int64_t stride, int64_t count, bool is_first, const float* panel,
                   float* sums) {
  constexpr int kVectors = kHashedBlock / kLanes;
  Floats acc[Rows * kVectors];
  for_each<Rows * kVectors>(
      [&](auto i) NNCX_INLINE { acc[i] = is_first ? zero() : load(sums + i * kLanes); });
  for (int64_t k = 0; k < count; ++k, panel += kHashedBlock) {
    Floats w[kVectors];
    for_each<kVectors>([&](auto v) NNCX_INLINE { w[v] = load(panel + v * kLanes); });
    for_each<Rows>([&](auto r) NNCX_INLINE {
      const auto a = broadcast(x + r * stride + k);
      for_each<kVectors>(
          [&](auto v) NNCX_INLINE { acc[r * kVectors + v] = fma(a, w[v], acc[r * kVectors + v]); });
    });
  }
  for_each<Rows * kVectors>([&](auto i) NNCX_INLINE { store(sums + i * kLanes, acc[i]); });
}

// All rows [begin, end) times a block of outputs.
void multiply_block(const HashedLinearParams& p, const BlockKeys& keys, int64_t begin, int64_t end,
                    float* panel, float* sums) {
  const int64_t terms = p.weight.in_features, rows = end - begin;
  if (terms == 0) std::fill_n(sums, rows * kHashedBlock, 0.0f);
  for (int64_t k = 0; k < terms; k += kChunk) {
    const int64_t count = std::min(kChunk, terms - k);
    hash_panel(p.weight, keys, k, k + count, panel);
    const float* x = static_cast<const float*>(p.input) + begin * terms + k;
    int64_t row = 0;
    for (; row + kRows <= rows; row += kRows) {
      multiply_rows<kRows>(x + row * terms, terms, count, k == 0, panel, sums + row * kHashedBlock);
    }
    for (; row < rows; ++row) {
      multiply_rows<1>(x + row * terms, terms, count, k == 0, panel, sums + row * kHashedBlock);
    }
  }
}

// Along a row of the weight calls vector(k, places of kLanes neighbours), and at its end
// scalar(k, place).
template <class Vector, class Scalar>
NNCX_INLINE inline void along_row(const HashedWeight& w, int64_t o, const Vector& vector,
                                  const Scalar& scalar) {
  const HashKeys keys = hash_keys(w.seed, o);
  const auto second = words(keys.second);
  alignas(64) uint32_t lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = keys.first + static_cast<uint32_t>(i) * kHashStep;
  auto first = load_words(lanes);
  int64_t k = 0;
  for (; k + kLanes <= w.in_features; k += kLanes) {
    vector(k, places_of(first, second, w.places));
    first = add(first, words(kLanes * kHashStep));
  }
  for (; k < w.in_features; ++k) scalar(k, hash_place(keys, k, w.places));
}

}  // namespace

int64_t hashed_linear_scratch_bytes(const HashedLinearParams&) {
  return 4 * kHashedBlock * (kChunk + kStrip);
}

void hashed_linear(const HashedLinearParams& p, const Conv2dTile& tile, uint8_t* scratch) {
  float* panel = reinterpret_cast<float*>(scratch);
  float* sums = panel + kChunk * kHashedBlock;
  const FloatEpilogue& e = p.epilogue;
  for (int64_t block = tile.block_begin; block < tile.block_end; ++block) {
    const BlockKeys keys(p.weight.seed, block);
    const int64_t first = block * kHashedBlock;
    const int64_t outputs = std::min(kHashedBlock, p.weight.out_features - first);
    for (int64_t begin = tile.pixel_begin; begin < tile.pixel_end; begin += kStrip) {
      const int64_t end = std::min(begin + kStrip, tile.pixel_end);
      multiply_block(p, keys, begin, end, panel, sums);
      for (int64_t row = begin; row < end; ++row) {
        const float* row_sums = sums + (row - begin) * kHashedBlock;
        for (int64_t i = 0; i < outputs; ++i) {
          store_float(finish(e, row_sums[i], first + i), e.dtype, e.output,
                      row * e.stride_n + first + i);
        }
      }
    }
  }
}

void hashed_weight(const HashedWeight& w, int64_t begin, int64_t end, float* values) {
  for (int64_t o = begin; o < end; ++o) {
    float* row = values + o * w.in_features;
    along_row(
        w, o,
        [&](int64_t k, auto places) NNCX_INLINE { store(row + k, look_up(w.buckets, places)); },
        [&](int64_t k, uint32_t place) NNCX_INLINE { row[k] = value_at(w, place); });
  }
}

void hashed_bucket_sums(const HashedWeight& w, const float* values, float* sums) {
  std::fill_n(sums, w.places / 2, 0.0f);
  for (int64_t o = 0; o < w.out_features; ++o, values += w.in_features) {
    const auto add = [&](int64_t k, uint32_t place)
                         NNCX_INLINE { sums[place / 2] += signed_by(values[k], place); };
    along_row(
        w, o,
        [&](int64_t k, auto places) NNCX_INLINE {
          alignas(64) uint32_t lanes[kLanes];
          store_words(lanes, places);
          for (int i = 0; i < kLanes; ++i) add(k + i, lanes[i]);
        },
        add);
  }
}

}  // namespace nncx::avx2
