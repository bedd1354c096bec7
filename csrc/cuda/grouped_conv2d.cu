// grouped_conv2d on CUDA: an implicit GEMM for groups of few channels, which memory bounds.
//
// A block has 64 output pixels and as many outputs as wait in 32 KB of shared memory, of several
// groups where they are neighbours in the output (grouped_plan.h): the input is read once, in whole
// pixels if possible, and the output written once, in pieces of 16 bytes, shuffled or not.
//
//   pass    up to 96 outputs of one group: the sums of 16 pixels in the registers of each warp
//   chunk   up to 160 bytes of K, of the 64 pixels and of the pass's weights, in shared memory: a
//           ring of them is on its way while one is multiplied, through all passes
//
// From sm_80 on numbers of 16 bits are multiplied by tensor cores, which add the products of 16 terms
// at a time in float32. float32 is multiplied and added on CUDA cores with one rounding a term, as are
// 16 bits in code compiled for less. A sum runs through the terms [tap][channel], then the bias.
//
// With channels innermost chunks are copied asynchronously, in pieces; with pixels innermost, or an
// odd number of channels of 16 bits, 16 bytes are put together from single numbers in registers.
//
// A warp multiplies 16 pixels x 80 outputs x 16 terms with 10 mma and 6 ldmatrix. Those read 3 KB of
// shared memory, which would bound a dense convolution at two fifths of an H200's tensor cores.
#include "cuda/convert.h"
#include "cuda/device.h"
#include "cuda/divider.h"
#include "cuda/gemm_rows.h"
#include "cuda/grouped_plan.h"
#include "cuda/launch.h"
#include "cuda/ptx_sm80.h"
#include "cuda/rows.h"
#include "grouped_conv2d.h"

namespace nncx::cuda {
namespace {

constexpr int kWarpPixels = 16;
constexpr int kColumns = kGroupedPassOutputs / 8;  // of a pass, of 8 outputs, as mma has them
constexpr int kStepBytes = 32;                     // of K, that mma multiplies

struct Grouped {
  GroupedConv2dParams conv;
  const void* weight;  // [output][tap][channel]
  const void* bias;
  GroupedPlan plan;
  Divider shuffled;  // outputs of each of the groups that the shuffle interleaves
};

__device__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Half) {
  ptx::mma_f16(d, a, b);
}
__device__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], BFloat16) {
  ptx::mma_bf16(d, a, b);
}

// kPieces: whether nothing but pieces is copied.
template <class T, bool kPieces>
class GroupedBlock {
 public:
  __device__ explicit GroupedBlock(const Grouped& grouped)
      : s(grouped),
        p(grouped.conv),
        plan(grouped.plan),
        k_bytes(p.shape.taps * p.shape.channels * kBytes),
        first_pixel(int64_t{blockIdx.x / channel_tiles()} * kGroupedPixels) {
    const unsigned tile = blockIdx.x % channel_tiles(), slices = plan.slices, band = tile / slices;
    first_group = int64_t{band} * plan.groups;
    first_of_group = int64_t{tile - band * slices} * plan.outputs;
    groups = static_cast<int>(min(p.shape.groups - first_group, int64_t{plan.groups}));
    outputs = static_cast<int>(min(p.shape.out_channels - first_of_group, int64_t{plan.outputs}));
    pixels = static_cast<int>(
        min(p.batch * p.out_height * p.out_width - first_pixel, int64_t{kGroupedPixels}));
  }

  __device__ void run() {
    locate_pixels();
    load_biases();
    multiply();
    __syncthreads();
    store();
  }

 private:
  static constexpr int kBytes = sizeof(T);
  static constexpr int kNumbers = 16 / kBytes;  // of a piece

  const Grouped& s;
  const GroupedConv2dParams& p;
  const GroupedPlan& plan;
  const int64_t k_bytes;
  const int64_t first_pixel;
  int64_t first_group, first_of_group;  // the first of the group's outputs
  int groups, outputs, pixels;          // that exist

  // As mma.sync holds them: with g = lane / 4, t = lane % 4, element i is of pixel g + 8 * (i / 2) of
  // the warp's and of output 2 * t + i % 2 of the column.
  float sums[kColumns][4] = {};

  // ---- Shared memory: the ring, where the pixels lie, biases [group][output], outputs that wait.

  __device__ uint8_t* pixel_stage(int slot) const {
    return dynamic_shared_memory() + slot * plan.stage_bytes();
  }
  __device__ uint8_t* weight_stage(int slot) const {
    return pixel_stage(slot) + kGroupedPixels * plan.pitch();
  }
  __device__ RowOrigin* origins() const {
    return reinterpret_cast<RowOrigin*>(pixel_stage(plan.stages));
  }
  __device__ float* biases() const { return reinterpret_cast<float*>(origins() + kGroupedPixels); }
  __device__ uint8_t* waiting() const {
    return reinterpret_cast<uint8_t*>(biases() + kGroupedMostOutputs);
  }

  __device__ static int thread() { return static_cast<int>(threadIdx.x); }
  __device__ static int lane() { return thread() % 32; }
  __device__ static int warp_pixel() { return thread() / 32 * kWarpPixels; }

  __device__ int64_t all_channels() const { return p.shape.groups * p.shape.channels; }
  __device__ int64_t all_outputs() const { return p.shape.groups * p.shape.out_channels; }
  __device__ unsigned channel_tiles() const { return static_cast<unsigned>(plan.channel_tiles); }
  __device__ int64_t in_image() const { return p.height * p.width; }
  __device__ int64_t out_image() const { return p.out_height * p.out_width; }

  // ---- Steps: a chunk of a pass.

  struct Step {
    int group = 0, output = 0, chunk = 0;  // of the block's; the first output of the pass
  };

  __device__ void advance(Step& at) const {
    if (++at.chunk < plan.chunks) return;
    at.chunk = 0;
    at.output += plan.pass_outputs;
    if (at.output < outputs) return;
    at.output = 0;
    ++at.group;
  }

  __device__ int outputs_of(const Step& at) const {
    return min(plan.pass_outputs, outputs - at.output);
  }
  // Counted over all groups: the first output of a plain block, and that of a pass.
  __device__ int64_t first_output() const {
    return first_group * p.shape.out_channels + first_of_group;
  }
  __device__ int64_t output_of(const Step& at) const {
    return first_output() + at.group * p.shape.out_channels + at.output;
  }

  // ---- Loading

  // What a thread loads of a chunk: its bytes from `byte` on, and more `bytes_apart`, of the row
  // `row`, and more `rows_apart`.
  struct Share {
    int row, rows_apart, byte, bytes_apart;
  };

  // Neighbouring threads have neighbouring pieces.
  __device__ Share pieces_share() const {
    const int piece = kPieces ? plan.piece : 16;
    const int pieces = plan.chunk_bytes / piece, rows = kGroupedThreads / pieces;
    const int row = thread() / pieces;
    const int none = kGroupedPixels + kGroupedPassOutputs;  // for threads that are too many
    return {row < rows ? row : none, rows, (thread() - row * pieces) * piece, plan.chunk_bytes};
  }

  // Neighbouring threads have neighbouring pixels.
  __device__ static Share pixels_share() {
    return {thread() % kGroupedPixels, kGroupedPixels, thread() / kGroupedPixels * 16,
            kGroupedThreads / kGroupedPixels * 16};
  }

  __device__ int64_t tap_bytes() const { return max(p.shape.channels * kBytes, int64_t{1}); }

  // At byte k of the terms, which is less than a chunk.
  __device__ TapCursor cursor_at(int k) const {
    TapCursor cursor(p, tap_bytes(), 0);
    cursor.advance(p, tap_bytes(), k);
    return cursor;
  }

  // Bytes between neighbours of a line of the input, and between neighbouring channels.
  __device__ int64_t pixel_bytes() const {
    return p.channels_last ? all_channels() * kBytes : kBytes;
  }
  __device__ int64_t channel_step() const { return p.channels_last ? kBytes : in_image() * kBytes; }

  __device__ void locate_pixels() const {
    if (thread() < kGroupedPixels) {
      RowOrigin origin = kNoRow;
      if (thread() < pixels && k_bytes > 0) {
        const int64_t pixel = first_pixel + thread();
        origin = row_origin(p, pixel_bytes(), pixel);
        if (!p.channels_last) {
          const int64_t n = output_pixel(p, pixel).n;
          origin.offset += n * (all_channels() - 1) * in_image() * kBytes;
        }
      }
      origins()[thread()] = origin;
    }
    __syncthreads();
  }

  // Which no pass has to wait for then.
  __device__ void load_biases() const {
    for (int group = 0; group < groups; ++group) {
      const int64_t first = first_output() + group * p.shape.out_channels;
      for (int o = thread(); o < outputs; o += kGroupedThreads) {
        biases()[group * outputs + o] = s.bias ? to_float(static_cast<const T*>(s.bias)[first + o])
                                               : -0.0f;  // x + -0 = x, also for -0
      }
    }
  }

  template <int kPiece>
  __device__ void copy_pixels(uint8_t* stage, const uint8_t* from, const TapCursor& cursor,
                              const Share& share) const {
    from += cursor.offset(p, pixel_bytes());
#pragma unroll 4
    for (int r = share.row; r < kGroupedPixels; r += share.rows_apart) {
      const RowOrigin row = origins()[r];
      ptx::cp_async<kPiece>(stage + r * plan.pitch() + share.byte, from + row.offset,
                            cursor.is_inside(p, row));
    }
  }

  __device__ void gather_pixels(uint8_t* stage, const uint8_t* from, TapCursor cursor,
                                const Share& share) const {
    for (int byte = share.byte; byte < plan.chunk_bytes; byte += share.bytes_apart) {
      for (int r = share.row; r < kGroupedPixels; r += share.rows_apart) {
        *reinterpret_cast<uint4*>(stage + r * plan.pitch() + byte) =
            gather(from, cursor, origins()[r]);
      }
      cursor.advance(p, tap_bytes(), share.bytes_apart);
    }
  }

  union Numbers {
    uint4 piece;
    T numbers[kNumbers];
  };

  __device__ uint4 gather(const uint8_t* from, TapCursor at, const RowOrigin& row) const {
    Numbers some;
    some.piece = {};
    bool is_inside = false;
    const uint8_t* next = nullptr;
#pragma unroll
    for (int i = 0; i < kNumbers; ++i) {
      if (i == 0 || at.byte == 0) {
        is_inside = at.is_inside(p, row);
        const int64_t tap = at.offset(p, pixel_bytes()) - at.byte;
        next = from + row.offset + tap + at.byte / kBytes * channel_step();
      }
      if (is_inside) some.numbers[i] = *reinterpret_cast<const T*>(next);
      next += channel_step();
      at.advance(p, tap_bytes(), kBytes);
    }
    return some.piece;
  }

  __device__ void load_pixels(uint8_t* stage, const Step& at, const TapCursor& cursor,
                              const Share& share) const {
    const uint8_t* from = static_cast<const uint8_t*>(p.input) +
                          (first_group + at.group) * p.shape.channels * channel_step();
    if constexpr (!kPieces) {
      gather_pixels(stage, from, cursor, share);
    } else if (plan.piece == 16) {
      copy_pixels<16>(stage, from, cursor, share);
    } else if (plan.piece == 8) {
      copy_pixels<8>(stage, from, cursor, share);
    } else {
      copy_pixels<4>(stage, from, cursor, share);
    }
  }

  // Rows and bytes beyond the last are 0.
  template <int kPiece>
  __device__ void copy_weights(uint8_t* stage, const Step& at, const uint8_t* from,
                               const Share& share) const {
    const int count = outputs_of(at);
    const int64_t left = k_bytes - int64_t{at.chunk} * plan.chunk_bytes - share.byte;
#pragma unroll 4
    for (int r = share.row; r < plan.pass_rows(); r += share.rows_apart) {
      ptx::cp_async<kPiece>(stage + r * plan.pitch() + share.byte, from + r * k_bytes + share.byte,
                            r < count && left > 0);
    }
  }

  __device__ void gather_weights(uint8_t* stage, const Step& at, const uint8_t* from,
                                 const Share& share) const {
    const int count = outputs_of(at);
    const int64_t left = (k_bytes - int64_t{at.chunk} * plan.chunk_bytes - share.byte) / kBytes;
    for (int r = share.row; r < plan.pass_rows(); r += share.rows_apart) {
      const T* row = reinterpret_cast<const T*>(from + r * k_bytes + share.byte);
      Numbers some;
      some.piece = {};
#pragma unroll
      for (int i = 0; i < kNumbers; ++i) {
        if (r < count && i < left) some.numbers[i] = row[i];
      }
      *reinterpret_cast<uint4*>(stage + r * plan.pitch() + share.byte) = some.piece;
    }
  }

  __device__ void load_weights(uint8_t* stage, const Step& at, const Share& share) const {
    const uint8_t* from = static_cast<const uint8_t*>(s.weight) + output_of(at) * k_bytes +
                          int64_t{at.chunk} * plan.chunk_bytes;
    if (plan.weight_piece == 16) {
      copy_weights<16>(stage, at, from, share);
    } else if constexpr (!kPieces) {
      gather_weights(stage, at, from, share);
    } else if (plan.weight_piece == 8) {
      copy_weights<8>(stage, at, from, share);
    } else {
      copy_weights<4>(stage, at, from, share);
    }
  }

  // ---- Multiplying

  __device__ static void wait_for_all_but(int groups) {
    if (groups == 1) return ptx::cp_async_wait<1>();
    ptx::cp_async_wait<0>();
  }

  __device__ void multiply() {
    const int passes = (outputs + plan.pass_outputs - 1) / plan.pass_outputs;
    const int steps = groups * passes * plan.chunks;
    const int ahead = plan.stages - 1;
    const Share weights = pieces_share();
    const Share share = kPieces || p.channels_last ? weights : pixels_share();
    TapCursor cursor = cursor_at(share.byte);
    Step loaded, multiplied;
    int next_slot = 0, slot = 0;
    for (int step = -ahead; step < steps; ++step) {
      if (step >= 0 && ahead > 0) wait_for_all_but(ahead - 1);
      __syncthreads();  // its chunk is there, and the one before it has been read
      if (step + ahead < steps) {
        if (loaded.chunk == 0) cursor = cursor_at(share.byte);
        load_pixels(pixel_stage(next_slot), loaded, cursor, share);
        load_weights(weight_stage(next_slot), loaded, weights);
        cursor.advance(p, tap_bytes(), plan.chunk_bytes);
        advance(loaded);
        if (++next_slot == plan.stages) next_slot = 0;
      }
      ptx::cp_async_commit();  // also of nothing, so that groups count steps
      if (ahead == 0) {
        wait_for_all_but(0);
        __syncthreads();
      }
      if (step < 0) continue;
      multiply_chunk(pixel_stage(slot), weight_stage(slot), multiplied);
      if (multiplied.chunk == plan.chunks - 1) finish(multiplied);
      advance(multiplied);
      if (++slot == plan.stages) slot = 0;
    }
  }

  __device__ void multiply_chunk(const uint8_t* a, const uint8_t* b, const Step& at) {
    const int columns = (outputs_of(at) + 7) / 8;
    if (kBytes == 4 || !ptx::compiled_for(80)) {
#pragma unroll 1
      for (int byte = 0; byte < plan.chunk_bytes; byte += 16) multiply_cores(a, b, byte, columns);
    } else if constexpr (kBytes == 2) {
#pragma unroll 1
      for (int byte = 0; byte < plan.chunk_bytes; byte += kStepBytes) {
        multiply_mma(a, b, byte, columns);
      }
    }
  }

  __device__ void multiply_mma(const uint8_t* a, const uint8_t* b, int byte, int columns) {
    uint32_t rows[4];
    ptx::ldmatrix_x4(rows,
                     a + (warp_pixel() + lane() % 16) * plan.pitch() + byte + lane() / 16 * 16);
    b += (lane() / 16 * 8 + lane() % 8) * plan.pitch() + byte + lane() / 8 % 2 * 16;
#pragma unroll
    for (int j = 0; j < kColumns; j += 2, b += 16 * plan.pitch()) {
      if (j >= columns) break;
      uint32_t pair[4];
      ptx::ldmatrix_x4(pair, b);
      mma(sums[j], rows, {pair[0], pair[1]}, T{});
      mma(sums[j + 1], rows, {pair[2], pair[3]}, T{});
    }
  }

  __device__ static Numbers load_numbers(const uint8_t* from) {
    Numbers some;
    some.piece = *reinterpret_cast<const uint4*>(from);
    return some;
  }

  // 16 bytes of K.
  __device__ void multiply_cores(const uint8_t* a, const uint8_t* b, int byte, int columns) {
    const int g = lane() / 4, t = lane() % 4;
    float rows[2][kNumbers];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Numbers some = load_numbers(a + (warp_pixel() + g + 8 * half) * plan.pitch() + byte);
#pragma unroll
      for (int i = 0; i < kNumbers; ++i) rows[half][i] = to_float(some.numbers[i]);
    }
    b += 2 * t * plan.pitch() + byte;
#pragma unroll
    for (int j = 0; j < kColumns; ++j, b += 8 * plan.pitch()) {
      if (j >= columns) break;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const Numbers some = load_numbers(b + e * plan.pitch());
#pragma unroll
        for (int i = 0; i < kNumbers; ++i) {
          const float w = to_float(some.numbers[i]);
          sums[j][e] = __fmaf_rn(rows[0][i], w, sums[j][e]);
          sums[j][2 + e] = __fmaf_rn(rows[1][i], w, sums[j][2 + e]);
        }
      }
    }
  }

  // ---- The end of a pass: its outputs wait at [pixel][group][output], or [pixel][output][group].

  __device__ void finish(const Step& at) {
    const int g = lane() / 4, t = lane() % 4, count = outputs_of(at);
    const float* bias = biases() + at.group * outputs + at.output;
    const int apart = plan.interleaved ? groups : 1;
    T* to = waiting_pixel(warp_pixel() + g) +
            (plan.interleaved ? at.output * groups + at.group : at.group * outputs + at.output);
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int o = 8 * j + 2 * t + e;
        if (o >= count) continue;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float y = activate(p.activation, sums[j][2 * half + e] + bias[o]);
          from_float(y, to + o * apart + half * 8 * (plan.pixel_pitch / kBytes));
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
#pragma unroll
      for (float& sum : sums[j]) sum = 0;
    }
  }

  __device__ T* waiting_pixel(int pixel) const {
    return reinterpret_cast<T*>(waiting() + pixel * plan.pixel_pitch);
  }

  // ---- Storing

  __device__ void store() const {
    const int count = groups * outputs;
    if (!p.channels_last || (p.shuffle > 1 && !plan.interleaved)) return store_numbers(count);
    const int64_t first = plan.interleaved ? first_of_group * groups : first_output();
    const int bytes = count * kBytes;
    uint8_t* to = static_cast<uint8_t*>(p.output) + (first_pixel * all_outputs() + first) * kBytes;
    const auto address = reinterpret_cast<uintptr_t>(to);
    if (plan.pixel_pitch == bytes && count == all_outputs() && address % 16 == 0) {
      const int whole = pixels * bytes / 16 * 16;
      copy_out<uint4>(1, 0, whole, to);
      copy_out<Piece<kBytes>>(1, whole, pixels * bytes, to);
    } else if ((address | all_outputs() * kBytes | bytes | plan.pixel_pitch) % 16 == 0) {
      copy_out<uint4>(pixels, 0, bytes, to);
    } else {
      copy_out<Piece<kBytes>>(pixels, 0, bytes, to);
    }
  }

  // Bytes [begin, end) of each of `lines` pixels.
  template <class Unit>
  __device__ void copy_out(int lines, int begin, int end, uint8_t* to) const {
    const int units = (end - begin) / int{sizeof(Unit)};
    if (units == 0) return;
    const int lines_apart = kGroupedThreads / units, rest = kGroupedThreads - lines_apart * units;
    int line = thread() / units, unit = thread() - line * units;
#pragma unroll 4
    while (line < lines) {
      const int byte = begin + unit * int{sizeof(Unit)};
      *reinterpret_cast<Unit*>(to + line * all_outputs() * kBytes + byte) =
          *reinterpret_cast<const Unit*>(waiting() + line * plan.pixel_pitch + byte);
      line += lines_apart;
      unit += rest;
      if (unit >= units) {
        unit -= units;
        ++line;
      }
    }
  }

  // Anything else: neighbouring threads have neighbouring pixels.
  __device__ void store_numbers(int count) const {
    constexpr int kAtATime = kGroupedThreads / kGroupedPixels;
    const int pixel = thread() % kGroupedPixels;
    if (pixel >= pixels) return;
    const OutputPixel at = output_pixel(p, first_pixel + pixel);
    const T* from = waiting_pixel(pixel);
    T* to = static_cast<T*>(p.output) + at.n * all_outputs() * out_image() +
            at.in_image * (p.channels_last ? all_outputs() : 1);
    const int64_t step = p.channels_last ? 1 : out_image();
    for (int i = thread() / kGroupedPixels; i < count; i += kAtATime) {
      to[stored(first_output() + i) * step] = from[i];
    }
  }

  // Where output o is stored.
  __device__ int64_t stored(int64_t o) const {
    const int64_t group = s.shuffled.quotient(o);
    return (o - group * s.shuffled.divisor()) * p.shuffle + group;
  }
};

template <class T, bool kPieces>
__global__ void __launch_bounds__(kGroupedThreads, 4)
    convolve_groups(const __grid_constant__ Grouped grouped) {
  GroupedBlock<T, kPieces>(grouped).run();
}

template <class T>
int run(const Grouped& grouped, unsigned blocks, cudaStream_t stream) {
  const GroupedPlan& plan = grouped.plan;
  return launch(plan.piece > 0 ? convolve_groups<T, true> : convolve_groups<T, false>, blocks,
                kGroupedThreads, plan.shared_bytes, stream, grouped);
}

}  // namespace

int grouped_conv2d(const GroupedConv2dParams& p, const void* weight, const void* bias,
                   void* stream) {
  Device device;
  if (const int error = current_device(device)) return error;
  const GroupedPlan plan = grouped_plan(p, address_of(weight), device);
  const int64_t blocks = plan.pixel_tiles * plan.channel_tiles;
  if (blocks >= int64_t{1} << 31) return cudaErrorInvalidConfiguration;
  const Grouped grouped = {p, weight, bias, plan,
                           Divider(p.shape.groups * p.shape.out_channels / p.shuffle)};
  const auto run_as = [&](auto number) {
    return run<decltype(number)>(grouped, static_cast<unsigned>(blocks),
                                 static_cast<cudaStream_t>(stream));
  };
  switch (p.dtype) {
    case Dtype::float32:
      return run_as(float{});
    case Dtype::float16:
      return run_as(Half{});
    case Dtype::bfloat16:
      return run_as(BFloat16{});
    case Dtype::float64:
      break;  // the op does not ask
  }
  return cudaErrorInvalidValue;
}

}  // namespace nncx::cuda
