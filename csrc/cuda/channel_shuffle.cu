// channel_shuffle on CUDA: bound by memory.
//
//   interleave   channels innermost, usual numbers of groups: a thread reads neighbours of every group
//                and writes them as 16-byte pieces
//   gather       anything else: a thread finds the numbers of 16 neighbouring bytes of the output one
//                by one, or, where planes are long, moves the 16 bytes as one
#include <algorithm>

#include "channel_shuffle.h"
#include "cuda/launch.h"
#include "cuda/rows.h"

namespace nncx::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kPiece = 16;  // bytes that are written at a time

unsigned blocks_of(int64_t threads) {
  return static_cast<unsigned>((threads + kThreads - 1) / kThreads);
}

// ------------------------------------------------------------------------------------------------
// Interleave

// A thread reads `kRead` bytes of each group; what it writes is whole pieces.
template <int Bytes, int Groups>
struct Interleaved {
  static constexpr int kRead = kPiece % Groups ? kPiece : std::max(kPiece / Groups, Bytes);
  static constexpr int kChannels = kRead / Bytes;
  static constexpr int kPieces = kRead * Groups / kPiece;
};

struct Interleave {
  const void* input;
  void* output;
  int64_t threads;
  int64_t channels;  // of a group
  Divider pixel_threads;
};

template <int Bytes, int Groups>
__global__ void __launch_bounds__(kThreads) interleave(const __grid_constant__ Interleave p) {
  using Tile = Interleaved<Bytes, Groups>;
  using Element = Piece<Bytes>;
  using Read = Piece<Tile::kRead>;
  const int64_t thread = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (thread >= p.threads) return;
  const int64_t pixel = p.pixel_threads.quotient(thread);
  const int64_t channel = (thread - pixel * p.pixel_threads.divisor()) * Tile::kChannels;
  const Element* from =
      static_cast<const Element*>(p.input) + pixel * (Groups * p.channels) + channel;
  union {
    Read read;
    Element elements[Tile::kChannels];
  } in[Groups];
#pragma unroll
  for (int g = 0; g < Groups; ++g) {
    in[g].read = *reinterpret_cast<const Read*>(from + g * p.channels);
  }
  union {
    Piece<kPiece> pieces[Tile::kPieces];
    Element elements[Tile::kChannels * Groups];
  } out;
#pragma unroll
  for (int e = 0; e < Tile::kChannels * Groups; ++e) {
    out.elements[e] = in[e % Groups].elements[e / Groups];
  }
  auto* to = static_cast<Piece<kPiece>*>(p.output) + thread * Tile::kPieces;
#pragma unroll
  for (int i = 0; i < Tile::kPieces; ++i) to[i] = out.pieces[i];
}

template <int Bytes, int Groups>
bool can_interleave(const ChannelShuffleParams& p) {
  constexpr int kRead = Interleaved<Bytes, Groups>::kRead;
  return p.channels_last && p.groups == Groups &&
         widest_piece(address_of(p.input), p.channels * Bytes) >= kRead;
}

template <int Bytes, int Groups>
int run_interleave(const ChannelShuffleParams& p, cudaStream_t stream) {
  const int64_t pixel_threads = p.channels / Interleaved<Bytes, Groups>::kChannels;
  const int64_t threads = p.batch * p.pixels * pixel_threads;
  const Interleave params = {p.input, p.output, threads, p.channels, Divider(pixel_threads)};
  return launch(interleave<Bytes, Groups>, blocks_of(threads), kThreads, 0, stream, params);
}

// ------------------------------------------------------------------------------------------------
// Gather

// As output[image][channel][group][run] = input[image][group][channel][run] of elements, which may
// be pieces of several numbers. Where channels are innermost, a run is one number, an image a pixel.
struct Gather {
  const void* input;
  void* output;
  int64_t elements, image_elements;
  Divider run, groups, channels;
};

// Index counts the elements of an image and some of the next.
template <int Bytes, class Index>
__global__ void __launch_bounds__(kThreads) gather(const __grid_constant__ Gather p) {
  using Element = Piece<Bytes>;
  constexpr int kElements = kPiece / Bytes;
  const int64_t first = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kElements;
  const int64_t left = p.elements - first;
  if (left <= 0) return;
  const int count = left < kElements ? static_cast<int>(left) : kElements;
  const auto run = static_cast<Index>(p.run.divisor());
  const auto groups = static_cast<Index>(p.groups.divisor());
  const auto channels = static_cast<Index>(p.channels.divisor());
  const int64_t line = p.run.quotient(first);
  const int64_t column = p.groups.quotient(line), image = p.channels.quotient(column);
  auto r = static_cast<Index>(first - line * run);
  auto i = static_cast<Index>(line - column * groups);
  auto j = static_cast<Index>(column - image * channels);
  const auto* input = static_cast<const Element*>(p.input) + image * p.image_elements;
  Index from = (i * channels + j) * run + r;
  // from behind a run to the next one, and besides behind the last group, the last channel
  const Index to_group = (channels - 1) * run, to_channel = (1 - groups * channels) * run;
  const Index to_image = (groups - 1) * channels * run;
  union {
    Piece<kPiece> piece;
    Element elements[kElements];
  } out;
#pragma unroll
  for (int e = 0; e < kElements; ++e) {
    if (e < count) out.elements[e] = input[from];
    ++from;
    if (++r < run) continue;
    r = 0;
    from += to_group;
    if (++i < groups) continue;
    i = 0;
    from += to_channel;
    if (++j < channels) continue;
    j = 0;
    from += to_image;
  }
  auto* output = static_cast<Element*>(p.output) + first;
  if (count == kElements) {
    *reinterpret_cast<Piece<kPiece>*>(output) = out.piece;
  } else {
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      if (e < count) output[e] = out.elements[e];
    }
  }
}

template <int Bytes>
int run_gather(const ChannelShuffleParams& p, cudaStream_t stream) {
  const int64_t run = p.channels_last ? 1 : p.pixels * p.element_bytes / Bytes;
  const int64_t image_elements = p.groups * p.channels * run;
  const int64_t elements = p.batch * (p.channels_last ? p.pixels : 1) * image_elements;
  const Gather params = {p.input,      p.output,          elements,           image_elements,
                         Divider(run), Divider(p.groups), Divider(p.channels)};
  constexpr int64_t kElements = kPiece / Bytes;
  const bool small = image_elements < int64_t{1} << 30;
  return launch(small ? gather<Bytes, int> : gather<Bytes, int64_t>,
                blocks_of((elements + kElements - 1) / kElements), kThreads, 0, stream, params);
}

// ------------------------------------------------------------------------------------------------

template <int Bytes>
int run(const ChannelShuffleParams& p, cudaStream_t stream) {
  if (can_interleave<Bytes, 2>(p)) return run_interleave<Bytes, 2>(p, stream);
  if (can_interleave<Bytes, 3>(p)) return run_interleave<Bytes, 3>(p, stream);
  if (can_interleave<Bytes, 4>(p)) return run_interleave<Bytes, 4>(p, stream);
  if (can_interleave<Bytes, 8>(p)) return run_interleave<Bytes, 8>(p, stream);
  const int64_t together = p.element_bytes * (p.channels_last ? 1 : p.pixels);
  switch (widest_piece(address_of(p.input), together)) {
    case 16:
      return run_gather<16>(p, stream);
    case 8:
      return run_gather<8>(p, stream);
    case 4:
      return run_gather<4>(p, stream);
    case 2:
      return run_gather<2>(p, stream);
  }
  return run_gather<1>(p, stream);
}

}  // namespace

int channel_shuffle(const ChannelShuffleParams& p, void* stream) {
  auto* cuda_stream = static_cast<cudaStream_t>(stream);
  switch (p.element_bytes) {
    case 8:
      return run<8>(p, cuda_stream);
    case 4:
      return run<4>(p, cuda_stream);
    case 2:
      return run<2>(p, cuda_stream);
  }
  return run<1>(p, cuda_stream);
}

}  // namespace nncx::cuda
