// Leaving a tile of sums, 8 outputs at a time, with either channels or pixels innermost.
//
// A `Tile` gives
//   numbers(r, i)             8 numbers of row r, of the outputs from i on
//   store(y, index, count)    the first `count` of y, as elements `index`... of the output
#pragma once

#include <immintrin.h>

#include <algorithm>

#include "lanes.h"
#include "transpose.h"
#include "unroll.h"

namespace nncx {
namespace {

// Channels innermost: row by row, since the lines of different rows may fall into one set of the L1
// cache. `outputs` is a multiple of 8, here and below.
template <class Tile>
void store_rows(const Tile& tile, int64_t rows, int64_t outputs, int64_t index, int64_t channels) {
  for (int64_t r = 0; r < rows; ++r, index += channels) {
    for (int64_t i = 0; i < outputs; i += kLanes) {
      tile.store(tile.numbers(r, i), index + i, kLanes);
    }
  }
}

// Pixels innermost: squares of 8 x 8, transposed.
template <class Tile>
void store_columns(const Tile& tile, int64_t rows, int64_t outputs, int64_t index, int64_t image) {
  for (int64_t i = 0; i < outputs; i += kLanes, index += kLanes * image) {
    for (int64_t first = 0; first < rows; first += kLanes) {
      const int64_t count = std::min(kLanes, rows - first);
      __m256 y[kLanes];
      for_each<kLanes>([&](auto lane) NNCX_INLINE {
        y[lane] = tile.numbers(first + std::min<int64_t>(lane, count - 1), i);
      });
      transpose_8x8(y);
      for_each<kLanes>(
          [&](auto lane) NNCX_INLINE { tile.store(y[lane], index + lane * image + first, count); });
    }
  }
}

// The first `count` lanes, for whatever can store all of them.
template <class T>
NNCX_INLINE inline void store_lanes(__m256 y, T* out, int64_t count) {
  if (count == kLanes) return store_lanes(y, out);
  T all[kLanes];
  store_lanes(y, all);
  int64_t i = 0;
  for_each<3>([&](auto half) NNCX_INLINE {  // in place of one memcpy, which would be a call
    constexpr int64_t kCount = kLanes / 2 >> half;
    if (!(count & kCount)) return;
    std::memcpy(out + i, all + i, kCount * sizeof(T));
    i += kCount;
  });
}

}  // namespace
}  // namespace nncx
