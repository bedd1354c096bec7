// 3 x 3 kernels on float32 images with pixels innermost, read where they lie.
//
// Down a column of vectors: a line is loaded once and multiplied by all three lines of the kernel,
// for the output that is complete with it and the two that it begins or continues. So there are 9
// products to 3 loads, neighbours that overlap, and all weights stay in registers. Rectangles of
// sums, whose lines are loaded again by the next rectangle, take 1.3 to 1.7 times as long.
//
// With a stride of 2 a vector is every second number of two loads, in an order of V's own, which is
// undone when the sums are complete. Loads leave out what is beyond the ends of a line.
//
// Asking for lines ahead of time (a prefetch in every step) gains 3 to 5 % at 112 x 112 and 56 x 56,
// nothing below, and is left out.
//
// V, besides what depthwise_sums.h says:
//   Mask inside(first, end)    the lanes i with 0 <= first + i < end
//   load(from, mask)           zeros in the other lanes, for which nothing is read
//   evens(a, b), odds(a, b)    half of the numbers in a and b, in any order that in_order(y) undoes
//   Narrow                     the vectors for what is left of a line
#pragma once

#include <algorithm>

#include "depthwise_conv2d.h"
#include "depthwise_sums.h"
#include "unroll.h"

namespace nncx {
namespace {

// What is loaded of a line, for the three columns of a kernel.
template <class V, int Stride>
struct LineParts {
  static constexpr int kCount = Stride == 1 ? 3 : 4;
  static constexpr int kNumbers = V::kLanes * Stride + 2;

  static constexpr int offset(int part) {
    return Stride == 1 ? part : part % 2 * V::kLanes + part / 2 * 2;
  }
};

// Of some outputs of an image.
struct PlaneLines {
  int64_t n, first, end;
  int64_t y, y_end;
};

template <class V>
struct WholeLines {
  NNCX_INLINE typename V::Floats load(const float* from, int) const {
    typename V::Floats x = V::load(from);
    asm("" : "+v"(x));  // else gcc loads it anew for each product, and takes 1.4 times as long
    return x;
  }
};

template <class V, int Stride>
struct MaskedLines {
  typename V::Mask masks[LineParts<V, Stride>::kCount];

  NNCX_INLINE typename V::Floats load(const float* from, int part) const {
    return V::load(from, masks[part]);
  }
};

template <class V, int Stride>
class Planes {
  using Floats = typename V::Floats;
  using Parts = LineParts<V, Stride>;

 public:
  explicit Planes(const DepthwiseConv2dParams& params) : p(params), activated(p.activation) {}

  // Outputs [first, end) of an image, lines [y, y_end): as many channels at a time as the L1 cache
  // holds, and lines, so that vectors find what they share with their neighbours.
  void run(int64_t n, int64_t first, int64_t end, int64_t y, int64_t y_end) const {
    const int64_t group = std::max<int64_t>(1, kChannelFloats / (p.height * p.width));
    for (; first < end; first += group) {
      const int64_t group_end = std::min(first + group, end);
      for (int64_t begin = y; begin < y_end; begin += kLines) {
        run_lines({n, first, group_end, begin, std::min(begin + kLines, y_end)});
      }
    }
  }

 private:
  template <class, int>
  friend class Planes;

  struct Line {
    Floats columns[3];
  };

  static constexpr int64_t kChannelFloats = 4 << 10;
  static constexpr int64_t kLines = 32;

  const DepthwiseConv2dParams& p;
  const Activated<V> activated;

  void run_lines(const PlaneLines& lines) const {
    using Narrow = typename V::Narrow;
    int64_t x = 0;
    for (; p.out_width - x > Narrow::kLanes; x += V::kLanes) run_column(lines, x);
    if (x < p.out_width) Planes<Narrow, Stride>(p).run_column(lines, x);
  }

  // From column x on, or so far before it that the vector ends with the line.
  void run_column(const PlaneLines& lines, int64_t x) const {
    x = std::clamp<int64_t>(p.out_width - V::kLanes, 0, x);
    const int64_t w = x * Stride - p.padding_w;
    if (w >= 0 && w + Parts::kNumbers <= p.width) return run_column(lines, x, WholeLines<V>{});
    MaskedLines<V, Stride> masked;
    for_each<Parts::kCount>([&](auto part) NNCX_INLINE {
      masked.masks[part] = V::inside(w + Parts::offset(part), p.width);
    });
    run_column(lines, x, masked);
  }

  template <class Load>
  void run_column(const PlaneLines& lines, int64_t x, const Load& load) const {
    const int64_t h = lines.y * Stride - p.padding_h, w = x * Stride - p.padding_w;
    const int64_t count = std::min<int64_t>(p.out_width - x, V::kLanes);
    for (int64_t o = lines.first; o < lines.end; ++o) {
      const int64_t channel = lines.n * p.channels + o / p.multiplier;
      const int64_t output = lines.n * depthwise_outputs(p) + o;
      walk(lines, o, static_cast<const float*>(p.input) + (channel * p.height + h) * p.width + w,
           load,
           static_cast<float*>(p.output) + (output * p.out_height + lines.y) * p.out_width + x,
           count);
    }
  }

  // The first line that is read is at `from`, if it is in the image.
  template <class Load>
  NNCX_INLINE void walk(const PlaneLines& lines, int64_t o, const float* from, const Load& load,
                        float* out, int64_t count) const {
    const int64_t width = p.width, out_width = p.out_width;
    const float* filter = static_cast<const float*>(p.weight) + o * 9;
    Floats weights[9];
    for_each<9>([&](auto tap) NNCX_INLINE { weights[tap] = V::broadcast(filter + tap); });
    const Floats bias = V::fill(p.bias ? static_cast<const float*>(p.bias)[o] : 0.0f);

    const auto read = [&](int h) NNCX_INLINE { return read_line(from + h * width, load); };
    const auto add = [&](auto i, Floats sum, const Line& line) NNCX_INLINE {
      for_each<3>([&](auto j)
                      NNCX_INLINE { sum = V::fma(line.columns[j], weights[i * 3 + j], sum); });
      return sum;
    };
    const auto leave = [&](Floats sum) NNCX_INLINE {
      store(activated(Stride == 1 ? sum : V::in_order(sum)), out, count);
      from += Stride * width;
      out += out_width;
    };

    constexpr Index<0> kTop;
    constexpr Index<1> kMiddle;
    constexpr Index<2> kBottom;
    int64_t y = lines.y;
    // Only the last line of outputs can lack its last line of inputs.
    const int64_t end = std::min(lines.y_end, (p.height + p.padding_h - 3 + Stride) / Stride);
    Floats sum = y * Stride < p.padding_h ? bias : add(kTop, bias, read(0));
    if constexpr (Stride == 1) {
      const Line middle = read(1);
      sum = add(kMiddle, sum, middle);
      for (Floats next = add(kTop, bias, middle); y < end; ++y) {
        const Line line = read(2);
        const Floats full = add(kBottom, sum, line);
        sum = add(kMiddle, next, line);
        next = add(kTop, bias, line);
        leave(full);
      }
      if (y < lines.y_end) leave(sum);
    } else {
      for (; y < end; ++y) {
        sum = add(kMiddle, sum, read(1));
        const Line line = read(2);
        const Floats full = add(kBottom, sum, line);
        sum = add(kTop, bias, line);
        leave(full);
      }
      if (y < lines.y_end) leave(add(kMiddle, sum, read(1)));
    }
  }

  template <class Load>
  NNCX_INLINE static Line read_line(const float* from, const Load& load) {
    Floats parts[Parts::kCount];
    for_each<Parts::kCount>(
        [&](auto part) NNCX_INLINE { parts[part] = load.load(from + Parts::offset(part), part); });
    if constexpr (Stride == 1) {
      return {{parts[0], parts[1], parts[2]}};
    } else {
      return {{V::evens(parts[0], parts[1]), V::odds(parts[0], parts[1]),
               V::evens(parts[2], parts[3])}};
    }
  }

  NNCX_INLINE static void store(Floats y, float* out, int64_t count) {
    if (count == V::kLanes) return V::store(y, out);
    V::store(y, out, count);
  }
};

}  // namespace
}  // namespace nncx
