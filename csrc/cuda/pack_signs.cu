// pack_signs on CUDA: bound by memory, where the input is 16 or 32 times the output.
//
//   rows      channels innermost: a thread reads 8 neighbouring channels and writes their byte, so that
//             a warp reads 512 bytes or more in a row and writes 32
//   columns   anything else, NCHW above all: a thread reads 64 channels of one pixel or two, a warp
//             neighbouring pixels; the words meet in shared memory, to leave as the pixels' bytes
//
// What lies beyond the last channel is taken for NaN, whose bit is 0.
#include <algorithm>

#include "cuda/launch.h"
#include "cuda/rows.h"
#include "pack_signs.h"

namespace nncx::cuda {
namespace {

constexpr int kThreads = 256;

// Signs of the numbers in a register, which collect from above: `push` moves those before down.

template <class T>
struct Signs {
  using Register = T;
  static constexpr int kShift = 1;  // of `push` for neighbours

  __device__ static uint32_t push(uint32_t signs, T x, int shift = kShift) {
    return signs >> shift | (is_positive(x) ? 0x8000 : 0);
  }
  // The byte of 8 neighbours.
  __device__ static uint32_t byte(uint32_t signs) { return signs >> 8; }
};

// Two numbers of 16 bits: their signs are bits 15 and 31. A number is negative if its sign is set and
// it is not 0, and NaN if its magnitude is above infinity's.
template <uint32_t Infinity>
struct SignsOfTwo {
  using Register = uint32_t;
  static constexpr int kShift = 2;

  __device__ static uint32_t push(uint32_t signs, uint32_t two, int shift = kShift) {
    const uint32_t magnitudes = two & 0x7FFF7FFF;
    const uint32_t nonzero = magnitudes + 0x7FFF7FFF;
    const uint32_t nan = magnitudes + (0x7FFF - Infinity) * 0x10001;
    return signs >> shift | (~(two & nonzero | nan) & 0x80008000);
  }
  __device__ static uint32_t byte(uint32_t signs) {
    return (signs >> 9 & 0x55) | (signs >> 24 & 0xAA);
  }
};

template <>
struct Signs<Half> : SignsOfTwo<0x7C00> {};
template <>
struct Signs<BFloat16> : SignsOfTwo<0x7F80> {};

template <class Target>
__device__ void fill_with_nan(Target& target) {
  memset(&target, 0xFF, sizeof target);
}

// ------------------------------------------------------------------------------------------------
// Rows

struct Rows {
  const void* input;
  uint8_t* output;
  int64_t bytes;     // of the output
  int64_t channels;  // of a row
  Divider row_bytes;
  RowOffsets offsets;
};

// 8 neighbours, of which `left` are in the row: in pieces, none of which crosses the row's end.
template <class T, int Bytes>
class Eight {
 public:
  using Register = typename Signs<T>::Register;
  static constexpr int kRegisters = 8 * int{sizeof(T)} / int{sizeof(Register)};

  __device__ void load(const T* from, int64_t left) {
    constexpr int kNumbers = Bytes / int{sizeof(T)};
#pragma unroll
    for (int i = 0; i < 8 / kNumbers; ++i) {
      fill_with_nan(pieces_[i]);
      if (i * kNumbers < left) pieces_[i] = reinterpret_cast<const Piece<Bytes>*>(from)[i];
    }
  }

  __device__ Register operator[](int i) const { return registers_[i]; }

 private:
  union {
    Piece<Bytes> pieces_[8 * sizeof(T) / Bytes];
    Register registers_[kRegisters];
  };
};

// The same of 16-bit numbers at any address. In the midst of a row they are in 5 aligned words, where
// that is odd behind another number, which is in memory too and is shifted out when all is loaded.
template <class T>
class Eight<T, 2> {
 public:
  static constexpr int kRegisters = 4;

  __device__ void load(const T* from, int64_t left) {
    const int before = left >= 10 && reinterpret_cast<uintptr_t>(from) % 4 == 2 ? 1 : 0;
    shift_ = 16 * before;
#pragma unroll
    for (int i = 0; i < 5; ++i) {
      words_[i] = 0xFFFFFFFF;
      if (left >= 10) words_[i] = reinterpret_cast<const uint32_t*>(from - before)[i];
    }
    if (left >= 10) return;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i < left) words_[i / 2] ^= uint32_t{static_cast<uint16_t>(~from[i].bits)} << 16 * (i % 2);
    }
  }

  __device__ uint32_t operator[](int i) const {
    return __funnelshift_r(words_[i], words_[i + 1], shift_);
  }

 private:
  uint32_t words_[5];
  int shift_;
};

template <class T, int Bytes>
__global__ void __launch_bounds__(kThreads) pack_rows(const __grid_constant__ Rows p) {
  constexpr int kInFlight = 64 / (8 * int{sizeof(T)});  // output bytes of a thread
  const int64_t first = int64_t{blockIdx.x} * (kThreads * kInFlight) + threadIdx.x;
  Eight<T, Bytes> x[kInFlight];
  int64_t channel = p.channels;
  const T* from = nullptr;
#pragma unroll
  for (int i = 0; i < kInFlight; ++i) {
    const int64_t at = first + i * kThreads;
    if (channel >= p.channels) {  // not in the row of the byte before: of long rows, few are
      const int64_t row = p.row_bytes.quotient(at);
      channel = (at - row * p.row_bytes.divisor()) * 8;
      from = static_cast<const T*>(p.input) + p.offsets(row) + channel;
    }
    x[i].load(from, at < p.bytes ? p.channels - channel : 0);
    channel += kThreads * 8;
    from += kThreads * 8;
  }
#pragma unroll
  for (int i = 0; i < kInFlight; ++i) {
    uint32_t signs = 0;
#pragma unroll
    for (int j = 0; j < x[i].kRegisters; ++j) signs = Signs<T>::push(signs, x[i][j]);
    const int64_t at = first + i * kThreads;
    if (at < p.bytes) p.output[at] = static_cast<uint8_t>(Signs<T>::byte(signs));
  }
}

template <class T>
cudaError_t run_rows(const PackSignsParams& p, cudaStream_t stream) {
  const int64_t rows = p.batch * p.height * p.width * p.groups;
  Rows r = {p.input,
            p.output,
            rows * packed_bytes(p.channels),
            p.channels,
            Divider(packed_bytes(p.channels)),
            RowOffsets(p, p.groups, p.channels)};
  int piece = widest_piece(address_of(p.input), p.channels * sizeof(T),
                           r.offsets.widest_piece_between(sizeof(T)));
  if (p.channels % 64 == 0 && r.offsets.is_uniform(p.channels)) {  // one row
    r.channels = rows * p.channels;
    r.row_bytes = Divider(r.bytes);
  }
  const auto launch_rows = [&](auto* kernel) {
    constexpr int64_t kBytes = kThreads * (8 / sizeof(T));
    const auto blocks = static_cast<unsigned>((r.bytes + kBytes - 1) / kBytes);
    return launch(kernel, blocks, kThreads, 0, stream, r);
  };
  if (piece == 16) return launch_rows(pack_rows<T, 16>);
  if (piece == 8) return launch_rows(pack_rows<T, 8>);
  if constexpr (sizeof(T) <= 4) {
    if (piece == 4) return launch_rows(pack_rows<T, 4>);
  }
  return launch_rows(pack_rows<T, sizeof(T)>);
}

// ------------------------------------------------------------------------------------------------
// Columns

constexpr int kWarps = kThreads / 32;
constexpr int kStep = 16;  // channels that a thread reads at a time

// A block packs `tiles` times 32 neighbouring vectors of pixels, `words` of each pixel: one a warp.
struct Columns {
  PackSignsParams pack;
  RowOffsets pixel_offsets;
  int64_t pixels, pixel_words;
  Divider group_words, word_blocks;
  int words, tiles;
};

// The signs of 16 channels of the pixels that a piece holds.
template <class T, int Bytes>
__device__ uint32_t pack_step(const T* x, int64_t stride, int64_t channels) {
  union {
    Piece<Bytes> piece;
    typename Signs<T>::Register bits;
  } numbers[kStep];
#pragma unroll
  for (int i = 0; i < kStep; ++i) {
    fill_with_nan(numbers[i]);
    if (i < channels) {
      numbers[i].piece = *reinterpret_cast<const Piece<Bytes>*>(x + i * stride);
    }
  }
  uint32_t signs = 0;
#pragma unroll
  for (int i = 0; i < kStep; ++i) signs = Signs<T>::push(signs, numbers[i].bits, 1);
  return signs;
}

template <class T, int Bytes>
__global__ void __launch_bounds__(kThreads) pack_columns(const __grid_constant__ Columns p) {
  constexpr int kPixels = Bytes / int{sizeof(T)};  // of a thread: 1 or 2
  __shared__ uint64_t staged[kWarps * 32 * kPixels];
  const int64_t tile = p.word_blocks.quotient(blockIdx.x);
  const int64_t first_word = (blockIdx.x - tile * p.word_blocks.divisor()) * p.words;
  const int64_t first_pixel = tile * p.tiles * (32 * kPixels);
  const int local_pixel = static_cast<int>(threadIdx.z * 32 + threadIdx.x) * kPixels;
  const int64_t pixel = first_pixel + local_pixel, word = first_word + threadIdx.y;
  if (pixel < p.pixels && word < p.pixel_words) {
    const PackSignsParams& q = p.pack;
    const int64_t group = p.group_words.quotient(word);
    const int64_t channel = (word - group * p.group_words.divisor()) * 64;
    const T* x = static_cast<const T*>(q.input) + p.pixel_offsets(pixel) +
                 (group * q.channels + channel) * q.stride_c;
    uint64_t bits[kPixels] = {};
    for (int c = 0; c < 64 && channel + c < q.channels; c += kStep) {
      const uint32_t signs =
          pack_step<T, Bytes>(x + c * q.stride_c, q.stride_c, q.channels - channel - c);
#pragma unroll
      for (int i = 0; i < kPixels; ++i) bits[i] |= uint64_t{signs >> 16 * i & 0xFFFF} << c;
    }
#pragma unroll
    for (int i = 0; i < kPixels; ++i) {
      staged[(local_pixel + i) * p.words + threadIdx.y] = bits[i];
    }
  }
  __syncthreads();
  const int thread = static_cast<int>((threadIdx.z * p.words + threadIdx.y) * 32 + threadIdx.x);
  const int threads = p.tiles * p.words * 32;
  for (int i = thread; i < threads * kPixels; i += threads) {
    const int64_t to_pixel = first_pixel + i / p.words, to_word = first_word + i % p.words;
    if (to_pixel < p.pixels && to_word < p.pixel_words) {
      reinterpret_cast<uint64_t*>(p.pack.output)[to_pixel * p.pixel_words + to_word] = staged[i];
    }
  }
}

template <class T>
cudaError_t run_columns(const PackSignsParams& p, cudaStream_t stream) {
  const int64_t group_words = packed_bytes(p.channels) / 8;
  const int64_t pixel_words = p.groups * group_words;
  const int64_t word_blocks = (pixel_words + kWarps - 1) / kWarps;
  const auto words = static_cast<int>((pixel_words + word_blocks - 1) / word_blocks);
  const Columns c = {p,           RowOffsets(p, 1, 0),  p.batch * p.height * p.width,
                     pixel_words, Divider(group_words), Divider(word_blocks),
                     words,       kWarps / words};
  const auto launch_columns = [&](auto* kernel, int64_t vector) {
    const int64_t tile = c.tiles * 32 * vector;
    const int64_t blocks = (c.pixels + tile - 1) / tile * word_blocks;
    return launch(kernel, static_cast<unsigned>(blocks), dim3(32, words, c.tiles), 0, stream, c);
  };
  if constexpr (sizeof(T) == 2) {
    const auto even = [&](int64_t size, int64_t stride) { return size == 1 || stride % 2 == 0; };
    if (p.stride_w == 1 && p.width % 2 == 0 && address_of(p.input) % 4 == 0 &&
        p.stride_c % 2 == 0 && even(p.height, p.stride_h) && even(p.batch, p.stride_n)) {
      return launch_columns(pack_columns<T, 4>, 2);
    }
  }
  return launch_columns(pack_columns<T, sizeof(T)>, 1);
}

template <class T>
int run(const PackSignsParams& p, cudaStream_t stream) {
  constexpr int64_t kFewChannels = 8;  // a thread of `rows` would find no more
  const bool rows = p.stride_c == 1 && p.channels > kFewChannels;
  return rows ? run_rows<T>(p, stream) : run_columns<T>(p, stream);
}

}  // namespace

int pack_signs(const PackSignsParams& p, void* stream) {
  auto* cuda_stream = static_cast<cudaStream_t>(stream);
  switch (p.dtype) {
    case Dtype::float32:
      return run<float>(p, cuda_stream);
    case Dtype::float64:
      return run<double>(p, cuda_stream);
    case Dtype::float16:
      return run<Half>(p, cuda_stream);
    case Dtype::bfloat16:
      return run<BFloat16>(p, cuda_stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace nncx::cuda
