// How the vector paths run the hashed ops; a path brings its vectors.
//
//   hashed_linear   lanes are outputs. For each block of 16, kChunk k's of the weight are hashed to a
//                   panel [k][16], which stays in L1 while the rows of a strip meet it, kRows at a
//                   time, in registers. Sums wait in scratch between chunks.
//   the others      lanes are neighbours in a row of the weight
//
// Hashing and looking up a weight costs some 20 instructions a vector: as much as multiplying it with
// 10 rows. One row skips no step: to store the panel and read it again is a tenth of it.
//
// V, a path's vectors: what it does with 8 or 16 floats and as many 32-bit words, and how many rows
// its registers hold.
#pragma once

#include <algorithm>

#include "hashed_linear.h"
#include "unroll.h"

namespace nncx {
namespace {

constexpr int64_t kChunk = 256;  // k's in a panel: 16 KB
constexpr int64_t kStrip = 512;  // rows: 32 KB of sums

// hash_place of V::kLanes at once. `first` is the key with k * kHashStep added.
template <class V>
NNCX_INLINE inline typename V::Words places_of(typename V::Words first, typename V::Words second,
                                               uint32_t places) {
  auto x = V::multiply(V::xor_shifted(first, 16), V::words(kHashMultipliers[0]));
  x = V::multiply(V::add(V::xor_shifted(x, 15), second), V::words(kHashMultipliers[1]));
  return V::multiply_high(x, V::words(places));
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
template <class V>
void hash_panel(const HashedWeight& w, const BlockKeys& keys, int64_t begin, int64_t end,
                float* panel) {
  constexpr int kVectors = kHashedBlock / V::kLanes;
  typename V::Words first[kVectors], second[kVectors];
  for_each<kVectors>([&](auto v) NNCX_INLINE {
    first[v] = V::load_words(keys.first + v * V::kLanes);
    second[v] = V::load_words(keys.second + v * V::kLanes);
  });
  for (int64_t k = begin; k < end; ++k, panel += kHashedBlock) {
    const auto step = V::words(static_cast<uint32_t>(k) * kHashStep);
    for_each<kVectors>([&](auto v) NNCX_INLINE {
      const auto places = places_of<V>(V::add(first[v], step), second[v], w.places);
      V::store(panel + v * V::kLanes, V::look_up(w.buckets, places));
    });
  }
}

// sums[row][16] (+)= `count` k's of Rows rows times the panel; `x` are the first row's.
template <class V, int Rows>
void multiply_rows(const float* x, int64_t stride, int64_t count, bool is_first, const float* panel,
                   float* sums) {
  constexpr int kVectors = kHashedBlock / V::kLanes;
  typename V::Floats acc[Rows * kVectors];
  for_each<Rows * kVectors>(
      [&](auto i) NNCX_INLINE { acc[i] = is_first ? V::zero() : V::load(sums + i * V::kLanes); });
  for (int64_t k = 0; k < count; ++k, panel += kHashedBlock) {
    typename V::Floats w[kVectors];
    for_each<kVectors>([&](auto v) NNCX_INLINE { w[v] = V::load(panel + v * V::kLanes); });
    for_each<Rows>([&](auto r) NNCX_INLINE {
      const auto a = V::broadcast(x + r * stride + k);
      for_each<kVectors>([&](auto v) NNCX_INLINE {
        acc[r * kVectors + v] = V::fma(a, w[v], acc[r * kVectors + v]);
      });
    });
  }
  for_each<Rows * kVectors>([&](auto i) NNCX_INLINE { V::store(sums + i * V::kLanes, acc[i]); });
}

// All rows [begin, end) times a block of outputs.
template <class V>
void multiply_block(const HashedLinearParams& p, const BlockKeys& keys, int64_t begin, int64_t end,
                    float* panel, float* sums) {
  const int64_t terms = p.weight.in_features, rows = end - begin;
  if (terms == 0) std::fill_n(sums, rows * kHashedBlock, 0.0f);
  for (int64_t k = 0; k < terms; k += kChunk) {
    const int64_t count = std::min(kChunk, terms - k);
    hash_panel<V>(p.weight, keys, k, k + count, panel);
    const float* x = static_cast<const float*>(p.input) + begin * terms + k;
    int64_t row = 0;
    for (; row + V::kRows <= rows; row += V::kRows) {
      multiply_rows<V, V::kRows>(x + row * terms, terms, count, k == 0, panel,
                                 sums + row * kHashedBlock);
    }
    for (; row < rows; ++row) {
      multiply_rows<V, 1>(x + row * terms, terms, count, k == 0, panel, sums + row * kHashedBlock);
    }
  }
}

constexpr int64_t kHashedScratchBytes = 4 * kHashedBlock * (kChunk + kStrip);

template <class V>
void run_linear(const HashedLinearParams& p, const Conv2dTile& tile, uint8_t* scratch) {
  float* panel = reinterpret_cast<float*>(scratch);
  float* sums = panel + kChunk * kHashedBlock;
  const FloatEpilogue& e = p.epilogue;
  for (int64_t block = tile.block_begin; block < tile.block_end; ++block) {
    const BlockKeys keys(p.weight.seed, block);
    const int64_t first = block * kHashedBlock;
    const int64_t outputs = std::min(kHashedBlock, p.weight.out_features - first);
    for (int64_t begin = tile.pixel_begin; begin < tile.pixel_end; begin += kStrip) {
      const int64_t end = std::min(begin + kStrip, tile.pixel_end);
      multiply_block<V>(p, keys, begin, end, panel, sums);
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

// Calls vector(k, places of V::kLanes neighbours) along a row of the weight, scalar(k, place) at its end.
template <class V, class Vector, class Scalar>
NNCX_INLINE inline void along_row(const HashedWeight& w, int64_t o, const Vector& vector,
                                  const Scalar& scalar) {
  const HashKeys keys = hash_keys(w.seed, o);
  const auto second = V::words(keys.second);
  alignas(64) uint32_t lanes[V::kLanes];
  for (int i = 0; i < V::kLanes; ++i) lanes[i] = keys.first + static_cast<uint32_t>(i) * kHashStep;
  auto first = V::load_words(lanes);
  int64_t k = 0;
  for (; k + V::kLanes <= w.in_features; k += V::kLanes) {
    vector(k, places_of<V>(first, second, w.places));
    first = V::add(first, V::words(V::kLanes * kHashStep));
  }
  for (; k < w.in_features; ++k) scalar(k, hash_place(keys, k, w.places));
}

template <class V>
void write_weight(const HashedWeight& w, int64_t begin, int64_t end, float* values) {
  for (int64_t o = begin; o < end; ++o) {
    float* row = values + o * w.in_features;
    along_row<V>(
        w, o,
        [&](int64_t k, auto places)
            NNCX_INLINE { V::store(row + k, V::look_up(w.buckets, places)); },
        [&](int64_t k, uint32_t place) NNCX_INLINE { row[k] = value_at(w, place); });
  }
}

template <class V>
void sum_buckets(const HashedWeight& w, const float* values, float* sums) {
  std::fill_n(sums, w.places / 2, 0.0f);
  for (int64_t o = 0; o < w.out_features; ++o, values += w.in_features) {
    const auto add = [&](int64_t k, uint32_t place)
                         NNCX_INLINE { sums[place / 2] += signed_by(values[k], place); };
    along_row<V>(
        w, o,
        [&](int64_t k, auto places) NNCX_INLINE {
          alignas(64) uint32_t lanes[V::kLanes];
          V::store_words(lanes, places);
          for (int i = 0; i < V::kLanes; ++i) add(k + i, lanes[i]);
        },
        add);
  }
}

}  // namespace
}  // namespace nncx
