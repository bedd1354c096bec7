// quantize_int8 on CUDA: bound by memory, where every number is read once and its byte written once.
//
//   rows      channels innermost: pieces of 16 bytes become 4 or 8 bytes; any strides where every
//             pixel has its own scale
//   columns   anything else, NCHW above all: a thread reads 4 channels of 4 or 8 pixels, a warp
//             neighbouring pixels; bytes are transposed through shared memory
#include <algorithm>
#include <bit>

#include "cuda/convert.h"
#include "cuda/launch.h"
#include "cuda/rows.h"
#include "quantize_int8.h"

namespace nncx::cuda {
namespace {

constexpr int kThreads = 256;

// As quantize() of quantize_int8.h. The GPU's conversion rounds ties to even, makes NaN 0 and what is
// too large the largest int.
__device__ int8_t to_int8(const Int8Quantizer& q, float x) {
  const int rounded = __float2int_rn(x * q.inverse_scale);
  const int clamped = min(max(rounded, -128 - q.zero_point), 127 - q.zero_point);
  return static_cast<int8_t>(clamped + q.zero_point);
}

// ------------------------------------------------------------------------------------------------
// Rows

constexpr int pieces_in_flight(int bytes) { return bytes == 16 ? 4 : 8; }  // of a thread

struct Rows {
  QuantizeInt8Params quantize;
  int64_t numbers;   // of all rows
  int64_t channels;  // of a row
  Divider row_numbers;
  RowOffsets offsets;
};

// No piece crosses the end of a row, but of a single one, whose last few numbers block 0 does singly.
template <class T, int Bytes>
__global__ void __launch_bounds__(kThreads) quantize_rows(const __grid_constant__ Rows p) {
  constexpr int kNumbers = Bytes / int{sizeof(T)};
  constexpr int kInFlight = pieces_in_flight(Bytes);
  constexpr int kStep = kThreads * kNumbers;
  const QuantizeInt8Params& q = p.quantize;
  const int64_t first = int64_t{blockIdx.x} * (kStep * kInFlight) + threadIdx.x * kNumbers;
  union {
    Piece<Bytes> piece;
    T numbers[kNumbers];
  } x[kInFlight] = {};
  int64_t row[kInFlight], channel = p.channels;
  const T* from = nullptr;
#pragma unroll
  for (int i = 0; i < kInFlight; ++i) {
    const int64_t at = first + i * kStep;
    row[i] = i > 0 ? row[i - 1] : 0;
    if (channel >= p.channels) {  // not in the row of the piece before: of long rows, few are
      row[i] = p.row_numbers.quotient(at);
      channel = at - row[i] * p.channels;
      from = static_cast<const T*>(q.input) + p.offsets(row[i]) + channel * q.stride_c;
    }
    if (at + kNumbers <= p.numbers) x[i].piece = *reinterpret_cast<const Piece<Bytes>*>(from);
    channel += kStep;
    from += kStep * q.stride_c;
  }
  Int8Quantizer quantizer = int8_quantizer(q.scale[0], q.zero_point[0]);
#pragma unroll
  for (int i = 0; i < kInFlight; ++i) {
    const int64_t at = first + i * kStep;
    if (at + kNumbers > p.numbers) break;
    if (q.per_pixel) quantizer = quantizer_of(q, row[i]);
    union {
      Piece<kNumbers> piece;
      int8_t numbers[kNumbers];
    } y;
#pragma unroll
    for (int j = 0; j < kNumbers; ++j) {
      y.numbers[j] = to_int8(quantizer, to_float(x[i].numbers[j]));
    }
    *reinterpret_cast<Piece<kNumbers>*>(q.output + at) = y.piece;
  }
  const int64_t at = p.numbers / kNumbers * kNumbers + threadIdx.x;
  if (kNumbers > 1 && blockIdx.x == 0 && at < p.numbers) {
    const T x = static_cast<const T*>(q.input)[at];
    q.output[at] = to_int8(int8_quantizer(q.scale[0], q.zero_point[0]), to_float(x));
  }
}

template <class T>
cudaError_t run_rows(const QuantizeInt8Params& p, cudaStream_t stream) {
  constexpr int64_t kSize = sizeof(T);
  const int64_t rows = p.batch * p.height * p.width, numbers = rows * p.channels;
  Rows r = {p, numbers, p.channels, Divider(p.channels), RowOffsets(p, 1, 0)};
  int piece = widest_piece(address_of(p.input), address_of(p.output) * kSize);
  if (p.stride_c != 1) {
    piece = kSize;
  } else if (!p.per_pixel && r.offsets.is_uniform(p.channels)) {  // one row
    r.channels = numbers;
    r.row_numbers = Divider(numbers);
  } else {
    piece = widest_piece(piece, p.channels * kSize, r.offsets.widest_piece_between(kSize));
  }
  const auto launch_rows = [&](auto* kernel, int bytes) {
    const int64_t block = kThreads * pieces_in_flight(bytes) * (bytes / kSize);
    const auto blocks = static_cast<unsigned>((numbers + block - 1) / block);
    return launch(kernel, blocks, kThreads, 0, stream, r);
  };
  if (piece == 16) return launch_rows(quantize_rows<T, 16>, 16);
  if (piece == 8) return launch_rows(quantize_rows<T, 8>, 8);
  if (piece == 4) return launch_rows(quantize_rows<T, 4>, 4);
  return launch_rows(quantize_rows<T, kSize>, kSize);
}

// ------------------------------------------------------------------------------------------------
// Columns

constexpr int kMostFours = 16;  // of channels, in a block's tile

// A block quantizes a tile of 4 * 2^fours_log2 channels and as many pixels as its threads then have:
// thread (i, j) those of 4 channels from 4j on, one lane i of the pixels.
struct Columns {
  QuantizeInt8Params quantize;
  RowOffsets pixel_offsets;
  int64_t pixels;
  Divider channel_blocks;
  int fours_log2;
  bool writes_words;  // of 4 bytes
};

// Wide: a thread's pixels are neighbours in one line and 16 bytes; else they are a lane apart.
template <class T, bool Wide>
__global__ void __launch_bounds__(kThreads) quantize_columns(const __grid_constant__ Columns p) {
  constexpr int kPixels = 16 / int{sizeof(T)};           // of a thread
  __shared__ uint32_t tile[kThreads * kPixels * 3 / 2];  // an odd pitch, of at most 3/2
  const QuantizeInt8Params& q = p.quantize;
  const int fours = 1 << p.fours_log2, lanes = kThreads >> p.fours_log2, pitch = fours | 1;
  const int lane = static_cast<int>(threadIdx.x) & (lanes - 1);
  const int four = static_cast<int>(threadIdx.x) >> (8 - p.fours_log2);
  const int64_t pixel_block = p.channel_blocks.quotient(blockIdx.x);
  const int64_t channel_block = blockIdx.x - pixel_block * p.channel_blocks.divisor();
  const int64_t first_pixel = pixel_block * lanes * kPixels;
  const int64_t first_channel = channel_block * fours * 4;
  const int64_t channel = first_channel + four * 4;
  union {
    Piece<16> piece;
    T numbers[kPixels];
  } x[4] = {};
  const auto local_pixel = [&](int i) { return Wide ? lane * kPixels + i : lane + i * lanes; };
  const T* input = static_cast<const T*>(q.input) + channel * q.stride_c;
  if constexpr (Wide) {
    const int64_t pixel = first_pixel + local_pixel(0);
    const T* from = input + p.pixel_offsets(pixel);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      if (pixel < p.pixels && channel + c < q.channels) {
        x[c].piece = *reinterpret_cast<const Piece<16>*>(from + c * q.stride_c);
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < kPixels; ++i) {
      const int64_t pixel = first_pixel + local_pixel(i);
      const T* from = input + p.pixel_offsets(pixel);
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        if (pixel < p.pixels && channel + c < q.channels) {
          x[c].numbers[i] = from[c * q.stride_c];
        }
      }
    }
  }
  const Int8Quantizer quantizer = int8_quantizer(q.scale[0], q.zero_point[0]);
#pragma unroll
  for (int i = 0; i < kPixels; ++i) {
    uint32_t word = 0;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      word |= uint32_t{static_cast<uint8_t>(to_int8(quantizer, to_float(x[c].numbers[i])))}
              << 8 * c;
    }
    tile[local_pixel(i) * pitch + four] = word;
  }
  __syncthreads();
  // Now neighbouring threads have neighbouring channels.
#pragma unroll
  for (int i = 0; i < kPixels; ++i) {
    const int at = static_cast<int>(threadIdx.x) + i * kThreads;
    const int to_four = at & (fours - 1), to_local = at >> p.fours_log2;
    const int64_t to_pixel = first_pixel + to_local, to_channel = first_channel + to_four * 4;
    if (to_pixel >= p.pixels || to_channel >= q.channels) continue;
    const uint32_t word = tile[to_local * pitch + to_four];
    int8_t* to = q.output + to_pixel * q.channels + to_channel;
    if (p.writes_words) {
      *reinterpret_cast<uint32_t*>(to) = word;
    } else {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        if (to_channel + c < q.channels) to[c] = static_cast<int8_t>(word >> 8 * c);
      }
    }
  }
}

template <class T>
cudaError_t run_columns(const QuantizeInt8Params& p, cudaStream_t stream) {
  constexpr int64_t kSize = sizeof(T), kPixels = 16 / kSize;
  const int64_t fours = std::min<int64_t>((p.channels + 3) / 4, kMostFours);
  const int fours_log2 = std::bit_width(static_cast<uint64_t>(fours - 1));
  const int64_t tile_channels = int64_t{4} << fours_log2;
  const int64_t tile_pixels = (kThreads >> fours_log2) * kPixels;
  const int64_t channel_blocks = (p.channels + tile_channels - 1) / tile_channels;
  const Columns c = {p,
                     RowOffsets(p, 1, 0),
                     p.batch * p.height * p.width,
                     Divider(channel_blocks),
                     fours_log2,
                     p.channels % 4 == 0 && address_of(p.output) % 4 == 0};
  const auto blocks =
      static_cast<unsigned>((c.pixels + tile_pixels - 1) / tile_pixels * channel_blocks);
  const bool wide =
      p.stride_w == 1 && p.width % kPixels == 0 &&
      widest_piece(address_of(p.input), p.stride_c * kSize, p.height > 1 ? p.stride_h * kSize : 0,
                   p.batch > 1 ? p.stride_n * kSize : 0) == 16;
  return launch(wide ? quantize_columns<T, true> : quantize_columns<T, false>, blocks, kThreads, 0,
                stream, c);
}

template <class T>
int run(const QuantizeInt8Params& p, cudaStream_t stream) {
  const bool rows = p.stride_c == 1 || p.per_pixel;
  return rows ? run_rows<T>(p, stream) : run_columns<T>(p, stream);
}

}  // namespace

int quantize_int8(const QuantizeInt8Params& p, void* stream) {
  auto* cuda_stream = static_cast<cudaStream_t>(stream);
  switch (p.dtype) {
    case Dtype::float32:
      return run<float>(p, cuda_stream);
    case Dtype::float16:
      return run<Half>(p, cuda_stream);
    case Dtype::bfloat16:
      return run<BFloat16>(p, cuda_stream);
    case Dtype::float64:
      break;  // the op refuses it
  }
  return cudaErrorInvalidValue;
}

}  // namespace nncx::cuda
