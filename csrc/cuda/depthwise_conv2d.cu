// depthwise_conv2d on CUDA: bound by memory for small kernels, by float32 arithmetic from about 5 x 5
// on, so that both count.
//
//   strips   square kernels of 3, 5 and 7 at stride 1 or 2: a thread has a strip of the output,
//            kColumns wide, and goes down its rows. It reads each line of the input once, converts it
//            once, and adds it to all outputs that it is part of: the sums of the rows that are begun
//            stay in registers, as do the weights
//   points   anything else: a thread makes one output
//
// Every sum starts at the bias and goes through the taps line by line, padding included, with one rounding a
// tap: the bits do not depend on the kernel, the layout or the launch.
#include <algorithm>

#include "cuda/convert.h"
#include "cuda/device.h"
#include "cuda/launch.h"
#include "cuda/rows.h"
#include "depthwise_conv2d.h"

namespace nncx::cuda {
namespace {

constexpr int kThreads = 128;

__device__ float activated(Activation activation, float y) {
  if (activation == Activation::none) return y;
  y = y < 0 ? 0 : y;  // NaN stays
  return activation == Activation::relu6 && y > 6 ? 6 : y;
}

__device__ void store_pair(float first, float second, Half* out) {
  *reinterpret_cast<uint32_t*>(out) = half_pair(first, second);
}
__device__ void store_pair(float first, float second, BFloat16* out) {
  *reinterpret_cast<uint32_t*>(out) = bfloat16_pair(first, second);
}
__device__ void store_pair(float first, float second, float* out) {
  *reinterpret_cast<float2*>(out) = {first, second};
}

// ------------------------------------------------------------------------------------------------
// Strips

// What a thread does: its outputs of one row are kColumns pixels of kChannels channels. Registers
// decide: at stride 1, Kernel - 1 rows of sums, all weights and two lines of the input are live. Many
// images are a multiple of 7 wide.
template <class T, int Kernel, bool Vector>
struct Strip {
  static constexpr int kColumns = sizeof(T) == 2 ? 7 : 4;
  static constexpr int kChannels = Vector ? 2 : 1;
  static constexpr int kBlocks = Kernel == 3 ? 4 : Kernel == 5 ? 3 : 2;  // on a multiprocessor
};

// The neighbours that one access reads or writes.
template <class T, int Count>
union Numbers {
  Piece<Count* int{sizeof(T)}> piece;
  T numbers[Count];
};

struct Strips {
  DepthwiseConv2dParams conv;
  int rows;                      // of a strip
  Divider inner, middle, outer;  // strips by channels, columns and rows, in the order of memory
  Divider multiplier;
  // in bytes
  int in_stride_w, in_stride_h, out_stride_w, out_stride_h;
  int64_t in_stride_c, in_stride_n, out_stride_c, out_stride_n;
};

struct Place {
  int64_t n, channels, rows, columns;  // counted in strips
};

// Neighbouring threads are neighbours in memory.
__device__ Place place_of(const Strips& p, int64_t thread) {
  const int64_t a = p.inner.quotient(thread), b = p.middle.quotient(a), n = p.outer.quotient(b);
  const int64_t inner = thread - a * p.inner.divisor(), middle = a - b * p.middle.divisor();
  const int64_t outer = b - n * p.outer.divisor();
  if (p.conv.channels_last) return {n, inner, outer, middle};
  return {n, outer, middle, inner};
}

template <class T, int Kernel, int Stride, bool Vector>
__global__ void __launch_bounds__(kThreads, Strip<T, Kernel, Vector>::kBlocks)
    convolve_strips(const __grid_constant__ Strips p, int64_t threads) {
  using Tile = Strip<T, Kernel, Vector>;
  constexpr int kColumns = Tile::kColumns, kChannels = Tile::kChannels;
  constexpr int kInputs = (kColumns - 1) * Stride + Kernel;  // columns of the input
  constexpr int kBegun = (Kernel + Stride - 1) / Stride;     // rows that a line is part of, at most
  using Vec = Numbers<T, kChannels>;
  using Access = Piece<kChannels* int{sizeof(T)}>;
  const DepthwiseConv2dParams& q = p.conv;
  const int64_t thread = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (thread >= threads) return;
  const Place place = place_of(p, thread);
  const int64_t channel = place.channels * kChannels;  // of the output
  const int first_row = static_cast<int>(place.rows) * p.rows;
  const int first_column = static_cast<int>(place.columns) * kColumns;
  const int rows = min(p.rows, static_cast<int>(q.out_height) - first_row);
  const int columns = static_cast<int>(q.out_width) - first_column;

  float weight[Kernel * Kernel][kChannels];
#pragma unroll
  for (int c = 0; c < kChannels; ++c) {
    const T* from = static_cast<const T*>(q.weight) + (channel + c) * (Kernel * Kernel);
#pragma unroll
    for (int tap = 0; tap < Kernel * Kernel; ++tap) weight[tap][c] = to_float(from[tap]);
  }
  Vec bias;
  bias.piece = {};
  if (q.bias) {
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      bias.numbers[c] = static_cast<const T*>(q.bias)[channel + c];
    }
  }

  const int x = first_column * Stride - static_cast<int>(q.padding_w);
  int y = first_row * Stride - static_cast<int>(q.padding_h);
  const char* from = static_cast<const char*>(q.input) + place.n * p.in_stride_n +
                     p.multiplier.quotient(channel) * p.in_stride_c + int64_t{y} * p.in_stride_h +
                     int64_t{x} * p.in_stride_w;
  char* to = static_cast<char*>(q.output) + place.n * p.out_stride_n + channel * p.out_stride_c +
             int64_t{first_row} * p.out_stride_h + int64_t{first_column} * p.out_stride_w;
  unsigned inside = 0;  // which columns are in the image
#pragma unroll
  for (int i = 0; i < kInputs; ++i) {
    inside |= static_cast<unsigned>(x + i) < static_cast<unsigned>(q.width) ? 1u << i : 0u;
  }
  Vec next[kInputs];
  const auto load_next = [&] {
    const bool is_line = static_cast<unsigned>(y) < static_cast<unsigned>(q.height);
    const unsigned loaded = is_line ? inside : 0u;
#pragma unroll
    for (int i = 0; i < kInputs; ++i) {
      next[i].piece = {};
      if (loaded >> i & 1) {
        next[i].piece = *reinterpret_cast<const Access*>(from + int64_t{p.in_stride_w} * i);
      }
    }
    ++y;
    from += p.in_stride_h;
  };

  // sums[i]: of the row whose tap lines below Stride * (i + 1) are added
  float sums[kBegun][kColumns][kChannels];
  load_next();
  for (int step = 0; step < rows + kBegun - 1; ++step) {
#pragma unroll
    for (int s = 0; s < Stride; ++s) {
      float line[kInputs][kChannels];
#pragma unroll
      for (int i = 0; i < kInputs; ++i) {
#pragma unroll
        for (int c = 0; c < kChannels; ++c) line[i][c] = to_float(next[i].numbers[c]);
      }
      load_next();
#pragma unroll
      for (int begun = kBegun - 1; begun >= 0; --begun) {
        const int tap_line = begun * Stride + s;
        // rows of other strips are not worth their arithmetic
        const bool counts = static_cast<unsigned>(step - begun) < static_cast<unsigned>(rows);
        if (tap_line >= Kernel || !counts) continue;
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
#pragma unroll
          for (int c = 0; c < kChannels; ++c) {
            float sum = s > 0       ? sums[begun][j][c]
                        : begun > 0 ? sums[begun - 1][j][c]
                                    : to_float(bias.numbers[c]);
#pragma unroll
            for (int tap = 0; tap < Kernel; ++tap) {
              sum = __fmaf_rn(line[j * Stride + tap][c], weight[tap_line * Kernel + tap][c], sum);
            }
            sums[begun][j][c] = sum;
          }
        }
      }
    }
    if (step < kBegun - 1) continue;  // no row is done
    if (q.activation != Activation::none) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
#pragma unroll
        for (int c = 0; c < kChannels; ++c) {
          sums[kBegun - 1][j][c] = activated(q.activation, sums[kBegun - 1][j][c]);
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      const float (&sum)[kChannels] = sums[kBegun - 1][j];
      Vec out;
      if constexpr (kChannels == 1) {
        from_float(sum[0], out.numbers);
      } else {
#pragma unroll
        for (int c = 0; c < kChannels; c += 2) store_pair(sum[c], sum[c + 1], &out.numbers[c]);
      }
      if (j < columns) {
        *reinterpret_cast<Access*>(to + int64_t{p.out_stride_w} * j) = out.piece;
      }
    }
    to += p.out_stride_h;
  }
}

// ------------------------------------------------------------------------------------------------
// Points

struct Points {
  DepthwiseConv2dParams conv;
  int64_t numbers;  // of the output
  Divider outputs, out_width, out_height, multiplier;
};

template <class T>
__global__ void __launch_bounds__(kThreads) convolve_points(const __grid_constant__ Points p) {
  const DepthwiseConv2dParams& q = p.conv;
  const int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (at >= p.numbers) return;
  int64_t pixel = at, channel = 0;  // the pixel of the batch; of NCHW first of all planes
  if (q.channels_last) {
    pixel = p.outputs.quotient(at);
    channel = at - pixel * p.outputs.divisor();
  }
  const int64_t line = p.out_width.quotient(pixel);
  int64_t n = p.out_height.quotient(line);
  const int64_t y = (line - n * q.out_height) * q.stride_h - q.padding_h;
  const int64_t x = (pixel - line * q.out_width) * q.stride_w - q.padding_w;
  if (!q.channels_last) {
    const int64_t plane = n;
    n = p.outputs.quotient(plane);
    channel = plane - n * p.outputs.divisor();
  }
  const int64_t plane = q.height * q.width, in_channel = p.multiplier.quotient(channel);
  const int64_t stride_w = q.channels_last ? q.channels : 1;
  const T* input = static_cast<const T*>(q.input) + n * q.channels * plane +
                   in_channel * (q.channels_last ? 1 : plane);
  const T* weight = static_cast<const T*>(q.weight) + channel * q.kernel_h * q.kernel_w;
  float sum = q.bias ? to_float(static_cast<const T*>(q.bias)[channel]) : 0;
  for (int64_t i = 0; i < q.kernel_h; ++i) {
    const int64_t from_y = y + i * q.dilation_h;
    for (int64_t j = 0; j < q.kernel_w; ++j) {
      const int64_t from_x = x + j * q.dilation_w;
      const bool inside = from_y >= 0 && from_y < q.height && from_x >= 0 && from_x < q.width;
      const float a = inside ? to_float(input[(from_y * q.width + from_x) * stride_w]) : 0;
      sum = __fmaf_rn(a, to_float(weight[i * q.kernel_w + j]), sum);
    }
  }
  from_float(activated(q.activation, sum), static_cast<T*>(q.output) + at);
}

// ------------------------------------------------------------------------------------------------

int64_t ceil_div(int64_t count, int64_t by) { return (count + by - 1) / by; }

template <class T>
cudaError_t run_points(const DepthwiseConv2dParams& p, cudaStream_t stream) {
  const int64_t numbers = p.batch * depthwise_outputs(p) * p.out_height * p.out_width;
  const Points points = {p,
                         numbers,
                         Divider(depthwise_outputs(p)),
                         Divider(p.out_width),
                         Divider(p.out_height),
                         Divider(p.multiplier)};
  const auto blocks = static_cast<unsigned>(ceil_div(numbers, kThreads));
  return launch(convolve_points<T>, blocks, kThreads, 0, stream, points);
}

// How many rows a strip has: few enough that all multiprocessors are busy to the end, and not so few
// that most lines are read twice; all strips about the same.
int64_t rows_of_a_strip(int64_t threads_of_a_row, int64_t out_height, int kernel,
                        int multiprocessors) {
  constexpr int64_t kWanted = 2048;  // threads of a multiprocessor: some waves
  const int64_t most = ceil_div(out_height, ceil_div(kWanted * multiprocessors, threads_of_a_row));
  const int64_t rows = std::max<int64_t>(most, 2 * kernel);
  return ceil_div(out_height, ceil_div(out_height, rows));
}

template <class T, int Kernel, int Stride, bool Vector>
cudaError_t run_strips(const DepthwiseConv2dParams& p, cudaStream_t stream) {
  using Tile = Strip<T, Kernel, Vector>;
  Device device;
  if (const int error = current_device(device)) return static_cast<cudaError_t>(error);
  const int64_t outputs = depthwise_outputs(p), channels = outputs / Tile::kChannels;
  const int64_t columns = ceil_div(p.out_width, Tile::kColumns);
  const int64_t strip_rows =
      rows_of_a_strip(p.batch * channels * columns, p.out_height, Kernel, device.multiprocessors);
  const int64_t rows = ceil_div(p.out_height, strip_rows);
  const bool last = p.channels_last;
  const int64_t size = sizeof(T);
  const int64_t in_pixel = size * (last ? p.channels : 1), out_pixel = size * (last ? outputs : 1);
  const Strips strips = {p,
                         static_cast<int>(strip_rows),
                         Divider(last ? channels : columns),
                         Divider(last ? columns : rows),
                         Divider(last ? rows : channels),
                         Divider(p.multiplier),
                         static_cast<int>(in_pixel),
                         static_cast<int>(in_pixel * p.width),
                         static_cast<int>(out_pixel),
                         static_cast<int>(out_pixel * p.out_width),
                         last ? size : size * p.height * p.width,
                         size * p.channels * p.height * p.width,
                         last ? size : size * p.out_height * p.out_width,
                         size * outputs * p.out_height * p.out_width};
  const int64_t threads = p.batch * channels * columns * rows;
  const auto blocks = static_cast<unsigned>(ceil_div(threads, kThreads));
  return launch(convolve_strips<T, Kernel, Stride, Vector>, blocks, kThreads, 0, stream, strips,
                threads);
}

template <class T, int Kernel, int Stride>
cudaError_t run_strips(const DepthwiseConv2dParams& p, cudaStream_t stream) {
  constexpr int64_t kChannels = Strip<T, Kernel, true>::kChannels;
  constexpr int64_t kBytes = kChannels * sizeof(T);
  const bool vector = p.channels_last && p.multiplier == 1 && p.channels % kChannels == 0 &&
                      widest_piece(address_of(p.input), address_of(p.output)) >= kBytes;
  return vector ? run_strips<T, Kernel, Stride, true>(p, stream)
                : run_strips<T, Kernel, Stride, false>(p, stream);
}

// Whether strips can count the bytes of a line, and the lines, in 32 bits.
bool is_small(const DepthwiseConv2dParams& p) {
  constexpr int64_t kMost = int64_t{1} << 30;
  const int64_t most_numbers =
      (std::max(p.width, p.out_width) + 2 * p.padding_w) * depthwise_outputs(p);
  return 4 * most_numbers < kMost && p.height + 2 * p.padding_h < kMost;
}

template <class T>
int run(const DepthwiseConv2dParams& p, cudaStream_t stream) {
  const bool square = p.kernel_h == p.kernel_w && p.stride_h == p.stride_w;
  if (square && p.stride_h <= 2 && p.dilation_h == 1 && p.dilation_w == 1 && is_small(p)) {
    const bool every = p.stride_h == 1;
    switch (p.kernel_h) {
      case 3:
        return every ? run_strips<T, 3, 1>(p, stream) : run_strips<T, 3, 2>(p, stream);
      case 5:
        return every ? run_strips<T, 5, 1>(p, stream) : run_strips<T, 5, 2>(p, stream);
      case 7:
        return every ? run_strips<T, 7, 1>(p, stream) : run_strips<T, 7, 2>(p, stream);
    }
  }
  return run_points<T>(p, stream);
}

}  // namespace

int depthwise_conv2d(const DepthwiseConv2dParams& p, void* stream) {
  auto* cuda_stream = static_cast<cudaStream_t>(stream);
  switch (p.dtype) {
    case Dtype::float32:
      return run<float>(p, cuda_stream);
    case Dtype::float16:
      return run<Half>(p, cuda_stream);
    case Dtype::bfloat16:
      return run<BFloat16>(p, cuda_stream);
    case Dtype::float64:
      break;  // the op does not ask
  }
  return cudaErrorInvalidValue;
}

}  // namespace nncx::cuda
