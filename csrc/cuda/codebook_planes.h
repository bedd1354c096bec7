// codebook_conv2d of 1 or 2 bits for at most 16 rows, a linear layer at a small batch, on tensor
// cores in float32 precision.
//
// A weight is not looked up. Of an output's codebook, let c be the entry closest to 0 and d[i] what
// the others are more than c. Then
//
//   y = c * (sum of all x) + sum over i of d[i] * (sum of the x whose code is i)
//
// with codes counted from c's (code ^ base): no partial sum is larger than y's own terms are, so
// nothing cancels that would not cancel in y. The inner sums are products of the activations with
// binary planes, which mma.sync makes: a plane's bits, 0 or 2.0 as bfloat16 or half, are its 16-row
// operand. Making two of them takes a shift and an AND. The activations are its 8 columns: a half or
// bfloat16 as it is; a float32 is the exact sum of three bfloat16, one column each.
//
// A block has 32 or 64 outputs and up to 8 rows, a warp a share of the terms: four steps of the
// weight (codebook_weight.h) at a time, of which each lane reads its 16 bytes of 4 outputs while the
// rows' terms are split into pieces, in the warp's own shared memory. Which term sits in which of
// mma's slots does not matter, as long as it is the same for both operands. The warps' sums are
// added in their order.
//
// NaN, infinity, overflow: whatever is not finite is computed once more, term by term.
#pragma once

#include <algorithm>
#include <type_traits>

#include "cuda/codebook_weight.h"
#include "cuda/convert.h"
#include "cuda/device.h"
#include "cuda/launch.h"
#include "cuda/numbers.h"
#include "cuda/ptx_sm80.h"

namespace nncx::cuda {

constexpr int kPlaneMostUnits = 2;  // of 32 outputs, in a block

struct CodebookPlanes {
  CodebookConv2dParams params;
  CodebookWeight weight;
  int rows;
  int units;
  unsigned output_tiles;  // of a group
  bool is_wide;           // four terms of a row are one aligned load
};

// kTiles: of 8 columns, of B.
template <class T, int kBits, int kTiles>
class PlanesBlock {
 public:
  static constexpr int kPieces = sizeof(T) == 4 ? 3 : 1;
  static constexpr int kRows = kTiles * 8 / kPieces;
  static constexpr int kWarps = kTiles == 1 ? 16 : 8;
  static constexpr int kStepTerms = kCodesStepBytes * 8 / kBits;
  static constexpr int kTerms = 4 * kStepTerms;  // of a warp's turn
  static constexpr int kColumns = 8 * kTiles;
  static constexpr int kPitch =
      4 * kColumns + 2;  // of a product's pairs: other banks for the next's

  static constexpr int table_bytes() { return static_cast<int>(sizeof(Tables)); }
  static constexpr int warp_bytes() {
    return kTerms / 16 * kPitch * static_cast<int>(sizeof(uint2));
  }

  __device__ explicit PlanesBlock(const CodebookPlanes& planes)
      : s_(planes),
        p_(planes.params),
        group_(blockIdx.x / planes.output_tiles),
        first_output_(int64_t{blockIdx.x % planes.output_tiles} * planes.units * kCodesBlock),
        first_row_(static_cast<int>(blockIdx.y) * kRows),
        rows_(min(kRows, planes.rows - first_row_)) {}

  __device__ void run() {
    multiply();
    stage();
    __syncthreads();
    store();
  }

 private:
  static constexpr int kPlanes = (1 << kBits) - 1;
  static constexpr int kPairs = 16 / kBits;     // of a word's codes: code i and code i + kPairs
  static constexpr int kProducts = kPairs / 2;  // mma's of a word
  static constexpr int kMostOutputs = kPlaneMostUnits * kCodesBlock;

  struct alignas(16) Output {
    uint32_t flip;    // to be xor-ed to 32 bits of codes: `base` becomes code 0
    float scales[3];  // of the planes, d / 2
  };

  struct Tables {
    Output outputs[kMostOutputs];
    float row_sums[kWarps][8];
  };

  const CodebookPlanes& s_;
  const CodebookConv2dParams& p_;
  const int64_t group_, first_output_;
  const int first_row_, rows_;

  // As mma.sync holds them: with g = lane / 4, t = lane % 4, element i is of output g + 8 * (i / 2) of
  // the 16 and of column 2 * t + i % 2 of the tile.
  float sums_[kPlaneMostUnits][2][kTiles][4] = {};
  float row_sum_ = 0;  // this lane's part of that of its row, see split_rows

  __device__ static int lane() { return static_cast<int>(threadIdx.x); }
  __device__ static int warp() { return static_cast<int>(threadIdx.y); }
  __device__ static int thread() { return warp() * 32 + lane(); }
  __device__ static int g() { return lane() / 4; }
  __device__ static int t() { return lane() % 4; }

  __device__ static Tables& tables() { return *reinterpret_cast<Tables*>(dynamic_shared_memory()); }
  __device__ uint8_t* memory_of(int warp) const {
    return dynamic_shared_memory() + sizeof(Tables) + warp * warp_bytes();
  }

  // ---- Codebooks

  __device__ const float* codebook_of(int output) const {
    const int64_t in_group = min(first_output_ + output, p_.shape.out_channels - 1);
    return p_.codebook + (group_ * p_.shape.out_channels + in_group) * p_.codebook_stride;
  }

  struct Codebook {
    float entries[1 << kBits];
  };

  // A thread has that of output `thread()` of the block.
  __device__ Codebook load_codebook() const {
    Codebook own = {};
    if (thread() < kMostOutputs) {
      for (int i = 0; i <= kPlanes; ++i) own.entries[i] = codebook_of(thread())[i];
    }
    return own;
  }

  __device__ static void write_codebook(const Codebook& own) {
    if (thread() >= kMostOutputs) return;
    unsigned base = 0;
    float nearest = own.entries[0];
#pragma unroll
    for (unsigned code = 1; code <= kPlanes; ++code) {
      const bool is_nearer = fabsf(own.entries[code]) < fabsf(nearest);
      base = is_nearer ? code : base;
      nearest = is_nearer ? own.entries[code] : nearest;
    }
    Output& to = tables().outputs[thread()];
    to.flip = base * (0xFFFFFFFF / kPlanes);  // in every slot
#pragma unroll
    for (unsigned code = 0; code <= kPlanes; ++code) {
      if (code != base) to.scales[(code ^ base) - 1] = 0.5f * (own.entries[code] - nearest);
    }
  }

  // ---- Codes. A lane reads a step of four outputs of a unit, 8 apart. Beyond the last step it is the
  // last one again, for terms that are 0.

  __device__ int turns() const { return static_cast<int>((s_.weight.steps() + 3) / 4); }

  __device__ void load_codes(uint4 (&codes)[4], int unit, int turn) const {
    const int64_t block = min(first_output_ / kCodesBlock + unit, s_.weight.blocks() - 1);
    const int64_t step = min(int64_t{turn} * 4 + t(), s_.weight.steps() - 1);
    const uint8_t* from = p_.weight + kCodesOffset +
                          (group_ * s_.weight.blocks() + block) * s_.weight.block_bytes() +
                          (step * kCodesBlock + g()) * kCodesStepBytes;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      codes[i] = *reinterpret_cast<const uint4*>(from + 8 * i * kCodesStepBytes);
    }
  }

  __device__ static uint32_t shift(uint32_t x, int left) {
    return left < 0 ? x >> -left : x << left;
  }

  // Where codes `pair` and `pair` + kPairs are plane + 1, 2.0, as bfloat16 and half write it alike.
  __device__ static uint32_t operand(uint32_t codes, int pair, int plane) {
    constexpr uint32_t kTwo = 0x40004000;
    const uint32_t low = shift(codes, 14 - pair * kBits);
    if (kBits == 1) return low & kTwo;
    const uint32_t high = shift(codes, 13 - pair * kBits);
    return (plane == 0 ? low & ~high : plane == 1 ? high & ~low : low & high) & kTwo;
  }

  // ---- Rows. In shared memory: [word][product][column][step][2] pairs of terms, as mma's B.

  __device__ uint2* pairs_at(int word, int product, int column, int step) const {
    auto* pairs = reinterpret_cast<uint2*>(memory_of(warp()));
    return pairs + (word * kProducts + product) * kPitch + column * 4 + step;
  }

  union Four {
    std::conditional_t<sizeof(T) == 4, uint4, uint2> words;
    T numbers[4];
  };

  __device__ Four load_four(const T* row, int64_t k) const {
    Four x = {};
    if (s_.is_wide) {
      if (k < p_.shape.channels) x.words = *reinterpret_cast<const decltype(x.words)*>(row + k);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (k + i < p_.shape.channels) x.numbers[i] = row[k + i];
      }
    }
    return x;
  }

  __device__ const T* row_at(int row) const {
    return static_cast<const T*>(p_.input) +
           ((first_row_ + row) * p_.shape.groups + group_) * p_.shape.channels;
  }

  // The rows, rounded up so that the same lanes have the same row in every turn.
  __device__ int row_lanes() const { return rows_ <= 1 ? 1 : rows_ <= 2 ? 2 : rows_ <= 4 ? 4 : 8; }

  // A lane takes four terms and their partners of one row and one step, and goes on along the step.
  __device__ void split_rows(int turn) {
    const int row = g() % row_lanes();
    if (row >= rows_) return;
#pragma unroll 1
    for (int part = g() / row_lanes(); part < kStepTerms / 8; part += 8 / row_lanes()) {
      const int word = part / (kPairs / 4), pair = part % (kPairs / 4) * 4;
      const int64_t k = (int64_t{turn} * 4 + t()) * kStepTerms + word * 2 * kPairs + pair;
      const Four low = load_four(row_at(row), k), high = load_four(row_at(row), k + kPairs);
#pragma unroll
      for (int i = 0; i < 4; ++i) row_sum_ += to_float(low.numbers[i]) + to_float(high.numbers[i]);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        uint32_t first[kPieces], second[kPieces];
        split(low.numbers[2 * i], high.numbers[2 * i], first);
        split(low.numbers[2 * i + 1], high.numbers[2 * i + 1], second);
#pragma unroll
        for (int piece = 0; piece < kPieces; ++piece) {
          *pairs_at(word, pair / 2 + i, row * kPieces + piece, t()) = {first[piece], second[piece]};
        }
      }
    }
  }

  __device__ static void split(BFloat16 low, BFloat16 high, uint32_t (&words)[1]) {
    words[0] = uint32_t{high.bits} << 16 | low.bits;
  }
  __device__ static void split(Half low, Half high, uint32_t (&words)[1]) {
    words[0] = uint32_t{high.bits} << 16 | low.bits;
  }
  __device__ static void split(float low, float high, uint32_t (&words)[3]) {
#pragma unroll
    for (int piece = 0; piece < 3; ++piece) {
      const uint32_t low_bits = __float_as_uint(low) & 0xFFFF0000;
      const uint32_t high_bits = __float_as_uint(high) & 0xFFFF0000;
      words[piece] = high_bits | low_bits >> 16;
      low -= __uint_as_float(low_bits);  // exact
      high -= __uint_as_float(high_bits);
    }
  }

  // The four or eight lanes of a row that share its terms add up.
  __device__ void stage_row_sum() {
    for (int bits = 1; bits < 32; bits *= 2) {
      const float other = __shfl_xor_sync(kAllLanes, row_sum_, bits);
      if (bits < 4 || bits >= 4 * row_lanes()) row_sum_ += other;
    }
    if (lane() % 4 == 0 && lane() < 4 * row_lanes()) tables().row_sums[warp()][g()] = row_sum_;
  }

  // ---- The product

  // All that is needed first is on its way before any of it is waited for.
  __device__ void multiply() {
    const int warps = static_cast<int>(blockDim.y);
    const Codebook own = load_codebook();
    uint4 codes[kPlaneMostUnits][4];
#pragma unroll
    for (int unit = 0; unit < kPlaneMostUnits; ++unit) load_codes(codes[unit], unit, warp());
    split_rows(warp());
    write_codebook(own);
    __syncthreads();
    for (int turn = warp(); turn < turns();) {
#pragma unroll
      for (int unit = 0; unit < kPlaneMostUnits; ++unit) {
        if (unit >= s_.units) break;
        multiply_unit(codes[unit], unit);
        load_codes(codes[unit], unit, turn + warps);
      }
      turn += warps;
      __syncwarp();
      split_rows(turn);
      __syncwarp();
    }
  }

  // The loop over words is one of the machine too: instructions that a warp runs once cost more to
  // fetch than to run.
  __device__ void multiply_unit(uint4 (&codes)[4], int unit) {
    float acc[2][kPlanes][kTiles][4] = {};
    const Output* outputs = tables().outputs + unit * kCodesBlock + g();
    const uint2* pairs = pairs_at(0, 0, g(), t());
#pragma unroll 1
    for (int word = 0; word < 4; ++word, pairs += kProducts * kPitch) {
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        words[i] = codes[i].x ^ outputs[8 * i].flip;
        codes[i] = {codes[i].y, codes[i].z, codes[i].w, 0};
      }
      multiply_word(words, pairs, acc);
    }
    add(acc, outputs, sums_[unit]);
  }

  // Columns that no row has hold anything.
  __device__ static void multiply_word(const uint32_t (&words)[4], const uint2* pairs,
                                       float (&acc)[2][kPlanes][kTiles][4]) {
#pragma unroll
    for (int product = 0; product < kProducts; ++product) {
      uint32_t b[kTiles][2];
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const uint2 pair = pairs[product * kPitch + 8 * tile * 4];
        b[tile][0] = pair.x;
        b[tile][1] = pair.y;
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int plane = 0; plane < kPlanes; ++plane) {
          const uint32_t upper = words[2 * half], lower = words[2 * half + 1];
          const uint32_t a[4] = {
              operand(upper, 2 * product, plane), operand(lower, 2 * product, plane),
              operand(upper, 2 * product + 1, plane), operand(lower, 2 * product + 1, plane)};
#pragma unroll
          for (int tile = 0; tile < kTiles; ++tile) mma(acc[half][plane][tile], a, b[tile]);
        }
      }
    }
  }

  __device__ static void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    if constexpr (std::is_same_v<T, Half>) {
      ptx::mma_f16(d, a, b);
    } else {
      ptx::mma_bf16(d, a, b);
    }
  }

  __device__ static void add(const float (&acc)[2][kPlanes][kTiles][4], const Output* outputs,
                             float (&sums)[2][kTiles][4]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int plane = 0; plane < kPlanes; ++plane) {
        const float scales[2] = {outputs[16 * half].scales[plane],
                                 outputs[16 * half + 8].scales[plane]};
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            sums[half][tile][i] =
                __fmaf_rn(scales[i / 2], acc[half][plane][tile][i], sums[half][tile][i]);
          }
        }
      }
    }
  }

  // ---- The end. Staged: [warp][output][column], where the rows were.

  __device__ void stage() {
    stage_row_sum();
    auto* own = reinterpret_cast<float*>(memory_of(warp()));
#pragma unroll
    for (int unit = 0; unit < kPlaneMostUnits; ++unit) {
      if (unit >= s_.units) break;
#pragma unroll
      for (int i = 0; i < 2 * kTiles * 4; ++i) {
        const int half = i / (kTiles * 4), tile = i / 4 % kTiles;
        const int output = unit * kCodesBlock + 16 * half + g() + 8 * (i % 4 / 2);
        const int column = 8 * tile + 2 * t() + i % 2;
        own[output * kColumns + column] = sums_[unit][half][tile][i % 4];
      }
    }
  }

  __device__ void store() const {
    const FloatEpilogue& e = p_.epilogue;
    const int image = static_cast<int>(p_.out_height * p_.out_width);  // at most 16
    const int64_t outputs =
        min(int64_t{s_.units} * kCodesBlock, p_.shape.out_channels - first_output_);
    for (int i = thread(); i < rows_ * kMostOutputs; i += 32 * static_cast<int>(blockDim.y)) {
      const int row = i / kMostOutputs, output = i % kMostOutputs;
      if (output >= outputs) continue;
      float y = sum_of(row, output);
      if (!(fabsf(y) <= kLargest)) y = dot(row, output);
      const int64_t o = group_ * p_.shape.out_channels + first_output_ + output;
      const int pixel = first_row_ + row;
      store_number(finish(e, y, o), e.dtype, e.output,
                   pixel / image * e.stride_n + pixel % image * e.stride_pixel + o * e.stride_o);
    }
  }

  __device__ float sum_of(int row, int output) const {
    float sum = 0, row_sum = 0;
    for (int piece = kPieces - 1; piece >= 0; --piece) {
      for (int warp = 0; warp < static_cast<int>(blockDim.y); ++warp) {
        sum += reinterpret_cast<const float*>(
            memory_of(warp))[output * kColumns + row * kPieces + piece];
      }
    }
    for (int warp = 0; warp < static_cast<int>(blockDim.y); ++warp) {
      row_sum += tables().row_sums[warp][row];
    }
    const unsigned base = tables().outputs[output].flip & kPlanes;
    return __fmaf_rn(codebook_of(output)[base], row_sum, sum);
  }

  __device__ float dot(int row, int output) const {
    const float* codebook = codebook_of(output);
    const int64_t at = first_output_ + output;
    const uint8_t* codes =
        p_.weight + kCodesOffset +
        (group_ * s_.weight.blocks() + at / kCodesBlock) * s_.weight.block_bytes() +
        at % kCodesBlock * kCodesStepBytes;
    float sum = 0;
    for (int64_t k = 0; k < p_.shape.channels; ++k) {
      const uint8_t* step = codes + k / kStepTerms * (kCodesBlock * kCodesStepBytes);
      const unsigned code = code_at(step, k % kStepTerms, kBits);
      sum = __fmaf_rn(to_float(row_at(row)[k]), codebook[code], sum);
    }
    return sum;
  }

  static constexpr float kLargest = 3.40282347e38f;
};

template <class T, int kBits, int kTiles>
__global__ void __launch_bounds__(PlanesBlock<T, kBits, kTiles>::kWarps * 32)
    codebook_planes(const __grid_constant__ CodebookPlanes planes) {
  PlanesBlock<T, kBits, kTiles>(planes).run();
}

template <class T, int kBits, int kTiles>
int launch_planes(CodebookPlanes s, const Device& device, cudaStream_t stream) {
  using Block = PlanesBlock<T, kBits, kTiles>;
  const auto row_tiles = static_cast<unsigned>((s.rows + Block::kRows - 1) / Block::kRows);
  const auto tiles = [&](int64_t units) { return (s.weight.blocks() + units - 1) / units; };
  const int64_t blocks = tiles(kPlaneMostUnits) * s.weight.groups * row_tiles;
  s.units = blocks * 4 >= device.multiprocessors * int64_t{3} ? kPlaneMostUnits : 1;
  s.output_tiles = static_cast<unsigned>(tiles(s.units));
  const int64_t turns = (s.weight.steps() + 3) / 4;
  const int64_t warps = std::clamp<int64_t>(
      turns, 2,
      std::min(Block::kWarps, (device.shared_bytes - Block::table_bytes()) / Block::warp_bytes()));
  const dim3 grid(s.output_tiles * static_cast<unsigned>(s.weight.groups), row_tiles);
  return launch(codebook_planes<T, kBits, kTiles>, grid, dim3(32, static_cast<unsigned>(warps)),
                static_cast<size_t>(Block::table_bytes() + warps * Block::warp_bytes()), stream, s);
}

template <class T>
int run_planes(const CodebookConv2dParams& p, const Device& device, cudaStream_t stream) {
  const int rows = static_cast<int>(p.batch * p.out_height * p.out_width);
  const bool is_wide =
      p.shape.channels % 4 == 0 && reinterpret_cast<uintptr_t>(p.input) % (4 * sizeof(T)) == 0;
  const CodebookPlanes s = {p, codebook_weight(p.shape, p.bits), rows, 0, 0, is_wide};
  if constexpr (sizeof(T) == 4) {  // three columns each
    if (rows > 2) {
      return (p.bits == 1 ? launch_planes<T, 1, 3> : launch_planes<T, 2, 3>)(s, device, stream);
    }
  }
  return (p.bits == 1 ? launch_planes<T, 1, 1> : launch_planes<T, 2, 1>)(s, device, stream);
}

}  // namespace nncx::cuda
