// Sums of products, as many at a time as registers hold; each in the same order: bias, then tap by tap.
#pragma once

#include <limits>

#include "depthwise_conv2d.h"
#include "unroll.h"

namespace nncx {
namespace {

// Columns of an image.
struct Evenly {
  int64_t step;
  NNCX_INLINE int64_t operator()(int i) const { return i * step; }
};

// Columns of a patch.
template <int64_t kStep>
struct Fixed {
  NNCX_INLINE int64_t operator()(int i) const { return i * kStep; }
};

// Columns of a line in phases: of 3 taps, the first two and one more of phase 0.
struct InPhases {
  int64_t phase;
  NNCX_INLINE int64_t operator()(int i) const { return i % 2 * phase + i / 2; }
};

// Columns of a line.
template <class V, class Place>
struct Columns {
  const float* from;
  Place place;
  NNCX_INLINE typename V::Floats operator()(int w) const { return V::load(from + place(w)); }
};

// Lines of an image or patch.
template <class V, class Place>
struct Lines {
  const float* from;
  int64_t step;
  Place place;
  NNCX_INLINE Columns<V, Place> operator()(int h) const { return {from + h * step, place}; }
};

// Which of the inputs of a rectangle of sums are padding: its first or last line or column.
struct Edges {
  bool top, bottom, left, right;
  NNCX_INLINE bool any() const { return top || bottom || left || right; }
};

struct NoEdges {
  static constexpr bool top = false, bottom = false, left = false, right = false;
};

// f(row, column, sum) for Rows x Columns sums of 3 x 3 products each, `Stride` inputs apart.
template <class V, int Stride, int Rows, int Columns, class L, class E, class F>
NNCX_INLINE inline void sum_3x3(const L& lines, const E& edges,
                                const typename V::Floats (&weights)[9], typename V::Floats bias,
                                const F& f) {
  constexpr int kLastLine = (Rows - 1) * Stride + 2, kLastColumn = (Columns - 1) * Stride + 2;
  typename V::Floats sums[Rows][Columns];
  for_each<Rows * Columns>([&](auto i) NNCX_INLINE { sums[i / Columns][i % Columns] = bias; });
  for_each<kLastLine + 1>([&](auto h) NNCX_INLINE {
    if ((h == 0 && edges.top) || (h == kLastLine && edges.bottom)) return;
    const auto line = lines(h);
    for_each<kLastColumn + 1>([&](auto w) NNCX_INLINE {
      if ((w == 0 && edges.left) || (w == kLastColumn && edges.right)) return;
      const typename V::Floats x = line(w);
      for_each<Rows * Columns>([&](auto sum) NNCX_INLINE {
        constexpr int kRow = sum / Columns, kColumn = sum % Columns;
        constexpr int kI = h - kRow * Stride, kJ = w - kColumn * Stride;
        if constexpr (kI >= 0 && kI < 3 && kJ >= 0 && kJ < 3) {
          sums[kRow][kColumn] = V::fma(x, weights[kI * 3 + kJ], sums[kRow][kColumn]);
        }
      });
    });
  });
  for_each<Rows * Columns>(
      [&](auto i) NNCX_INLINE { f(i / Columns, i % Columns, sums[i / Columns][i % Columns]); });
}

// What follows a sum.
template <class V>
struct Activated {
  bool clamps;
  typename V::Floats low, high;

  NNCX_INLINE explicit Activated(Activation activation)
      : clamps(activation != Activation::none),
        low(V::fill(activation == Activation::none ? -kInfinity : 0)),
        high(V::fill(activation == Activation::relu6 ? 6 : kInfinity)) {}
  NNCX_INLINE typename V::Floats operator()(typename V::Floats y) const {
    return clamps ? V::clamp(y, low, high) : y;
  }

 private:
  static constexpr float kInfinity = std::numeric_limits<float>::infinity();
};

// f(i, sum) for Count sums of any kernel, `step` floats apart.
template <class V, int Count, class Weight, class F>
NNCX_INLINE inline void sum_taps(const float* from, int64_t step, const int64_t* offsets,
                                 int64_t taps, const Weight& weight, typename V::Floats bias,
                                 const F& f) {
  typename V::Floats sums[Count];
  for_each<Count>([&](auto i) NNCX_INLINE { sums[i] = bias; });
  for (int64_t tap = 0; tap < taps; ++tap) {
    const typename V::Floats w = weight(tap);
    const float* x = from + offsets[tap];
    for_each<Count>([&](auto i)
                        NNCX_INLINE { sums[i] = V::fma(V::load(x + i * step), w, sums[i]); });
  }
  for_each<Count>([&](auto i) NNCX_INLINE { f(i, sums[i]); });
}

// f(Index<count>, first) with counts from Most down to 1 that add up to `end - first`.
template <int Most, class F>
NNCX_INLINE inline void in_steps(int64_t first, int64_t end, const F& f) {
  for (; first + Most <= end; first += Most) f(Index<Most>{}, first);
  if constexpr (Most > 1) in_steps<(Most > 4 ? Most / 2 : Most - 1)>(first, end, f);
}

}  // namespace
}  // namespace nncx
