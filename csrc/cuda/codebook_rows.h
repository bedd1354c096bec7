// codebook_linear of few rows: all of its time should be the reading of the weight, once.
//
// The lanes of a warp are outputs, so that all are at the same k and read a step of codes in one
// piece; the warps of a block have the same outputs and share out K. What a code stands for is looked
// up in shared memory, where no two lanes meet in a bank: in CodebookValues each lane has a copy of the
// codebook, its own or the layer's, in its bank; in CodebookSums a table has 16 entries side by side.
//
// The sums of the warps are added in the order of the warps.
#pragma once

#include "cuda/codebook_plan.h"
#include "cuda/gemm_rows.h"
#include "cuda/launch.h"
#include "cuda/numbers.h"
#include "cuda/ptx_sm80.h"
#include "cuda/rows.h"

namespace nncx::cuda {

struct CodebookRows {
  CodebookConv2dParams params;
  CodebookWeight weight;
  int rows;
  unsigned tiles;  // of 32 * kOutputs outputs, of a group
  bool is_wide;    // 4 terms of a row lie side by side, aligned as one
};

template <int kRows, int kOutputs>
class CodebookRowsBlock {
 protected:
  static constexpr int kLanes = 32;
  static constexpr int kTileOutputs = kOutputs * kLanes;

  const CodebookRows& s_;
  const CodebookConv2dParams& p_;
  const int64_t group_;
  const int64_t first_block_;  // of 32 outputs, in the group
  const int first_row_;
  const int64_t first_element_;  // of the first row, in the group
  // The lane's first step; beyond the last block that of the last one.
  const uint4* codes_[kOutputs];
  float sums_[kRows][kOutputs] = {};

  __device__ explicit CodebookRowsBlock(const CodebookRows& rows)
      : s_(rows),
        p_(rows.params),
        group_(blockIdx.x / rows.tiles),
        first_block_(int64_t{blockIdx.x % rows.tiles} * kOutputs),
        first_row_(static_cast<int>(blockIdx.y) * kRows),
        first_element_((first_row_ * p_.shape.groups + group_) * p_.shape.channels) {
    const CodebookWeight& w = s_.weight;
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) {
      const int64_t block = group_ * w.blocks() + min(first_block_ + i, w.blocks() - 1);
      codes_[i] = reinterpret_cast<const uint4*>(p_.weight + kCodesOffset) +
                  block * (w.block_bytes() / kCodesStepBytes) + lane();
    }
  }

  __device__ static int lane() { return static_cast<int>(threadIdx.x); }
  __device__ static int warp() { return static_cast<int>(threadIdx.y); }
  __device__ static int warps() { return static_cast<int>(blockDim.y); }
  __device__ int terms() const { return static_cast<int>(s_.weight.terms); }
  __device__ int steps() const { return static_cast<int>(s_.weight.steps()); }

  __device__ uint4 codes(int step, int i) const { return __ldg(codes_[i] + step * kLanes); }

  __device__ int64_t row_stride() const { return p_.shape.groups * p_.shape.channels; }

  __device__ int64_t output_of(int at) const {  // in the group
    return first_block_ * kLanes + at;
  }

  __device__ void store() const {
    auto* all = reinterpret_cast<float*>(dynamic_shared_memory());
    constexpr int kSums = kRows * kTileOutputs;
    __syncthreads();  // the tables are not read any more
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int i = 0; i < kOutputs; ++i) {
        all[warp() * kSums + r * kTileOutputs + i * kLanes + lane()] = sums_[r][i];
      }
    }
    __syncthreads();
    const FloatEpilogue& e = p_.epilogue;
    const int image = static_cast<int>(p_.out_height * p_.out_width);
    for (int at = warp() * kLanes + lane(); at < kSums; at += warps() * kLanes) {
      const int row = first_row_ + at / kTileOutputs;
      const int64_t output = output_of(at % kTileOutputs);
      if (row >= s_.rows || output >= p_.shape.out_channels) continue;
      float sum = all[at];
      for (int w = 1; w < warps(); ++w) sum += all[w * kSums + at];
      const int64_t o = group_ * p_.shape.out_channels + output;
      const int n = row / image;
      store_number(finish(e, sum, o), e.dtype, e.output,
                   n * e.stride_n + (row - n * image) * e.stride_pixel + o * e.stride_o);
    }
  }
};

// ------------------------------------------------------------------------------------------------

// Rows are staged for a warp, 32 terms at a time, as floats: 4 of them are one load for all lanes.
template <int kSlotLog2, int kRows, int kOutputs>
class CodebookValues : CodebookRowsBlock<kRows, kOutputs> {
  using Block = CodebookRowsBlock<kRows, kOutputs>;

 public:
  __device__ explicit CodebookValues(const CodebookRows& rows)
      : Block(rows),
        mask_(((1u << p_.bits) - 1) * 0x01010101),
        rows_(reinterpret_cast<float*>(dynamic_shared_memory() + (kEntryBytes << p_.bits)) +
              warp() * kRows * kPieceTerms) {}

  __device__ void run() {
    fill_table();
    __syncthreads();
    multiply();
    store();
  }

 private:
  using Block::codes, Block::first_row_, Block::group_, Block::lane, Block::output_of, Block::p_,
      Block::first_element_, Block::row_stride, Block::s_, Block::steps, Block::store, Block::sums_,
      Block::terms, Block::warp, Block::warps;

  static constexpr int kSlot = 1 << kSlotLog2;
  static constexpr int kWords = kSlot;  // of 32 terms
  static constexpr int kCodes = 32 / kSlot;
  static constexpr int kUnitSteps = kSlot == 8 ? 2 : 1;  // that a warp takes at a time
  static constexpr int kUnitTerms = kUnitSteps * 128 / kSlot;
  const unsigned mask_;  // of 4 codes: a forged code looks up no other memory
  float* const rows_;    // [row][32]
  uint32_t words_[kOutputs][4 * kUnitSteps];
  float fetched_[kRows];

  __device__ void fill_table() const {
    auto* table = reinterpret_cast<float*>(dynamic_shared_memory());
    const int entries = 1 << p_.bits;
    for (int i = 0; i < kOutputs; ++i) {
      const int at = i * 32 + lane();
      const int64_t output = min(output_of(at), p_.shape.out_channels - 1);
      const float* codebook =
          p_.codebook + (group_ * p_.shape.out_channels + output) * p_.codebook_stride;
      for (int e = warp(); e < entries; e += warps())
        table[e * (kEntryBytes / 4) + at] = codebook[e];
    }
  }

  __device__ void fetch_codes(int unit, uint4 (&next)[kOutputs][kUnitSteps]) const {
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) {
#pragma unroll
      for (int j = 0; j < kUnitSteps; ++j) {
        next[i][j] = codes(min(unit * kUnitSteps + j, steps() - 1), i);
      }
    }
  }

  // Zeros beyond the last row and the last term.
  __device__ void fetch_rows(int k) {
    const int rows = k + lane() < terms() ? s_.rows - first_row_ : 0;
    int64_t at = first_element_ + k + lane();
#pragma unroll
    for (int r = 0; r < kRows; ++r, at += row_stride()) {
      fetched_[r] = r < rows ? load_number(p_.input, p_.input_dtype, at) : 0.0f;
    }
  }

  __device__ void multiply() {
    const int units = (terms() + kUnitTerms - 1) / kUnitTerms;
    int unit = warp();
    if (unit >= units) return;
    uint4 next[kOutputs][kUnitSteps];
    fetch_codes(unit, next);
    fetch_rows(unit * kUnitTerms);
    for (; unit < units; unit += warps()) {
#pragma unroll
      for (int i = 0; i < kOutputs; ++i) {
#pragma unroll
        for (int j = 0; j < kUnitSteps; ++j) {
          words_[i][4 * j] = next[i][j].x, words_[i][4 * j + 1] = next[i][j].y;
          words_[i][4 * j + 2] = next[i][j].z, words_[i][4 * j + 3] = next[i][j].w;
        }
      }
      const int next_unit = unit + warps();
      if (next_unit < units) fetch_codes(next_unit, next);
      const int end = min((unit + 1) * kUnitTerms, terms());
#pragma unroll 1
      for (int k = unit * kUnitTerms; k < end; k += kPieceTerms) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) rows_[r * kPieceTerms + lane()] = fetched_[r];
        __syncwarp();
        fetch_rows(k + kPieceTerms < end ? k + kPieceTerms : next_unit * kUnitTerms);
        if (k + kPieceTerms <= end) {
          multiply_piece();
        } else {
          multiply_rest(end - k);
        }
        __syncwarp();
      }
    }
  }

  // The weights of 4 neighbouring codes of a word, from bit `shift` on. An entry of the table has 256
  // bytes, so that an address is a byte of code above a byte of lane.
  __device__ void look_up(uint32_t word, int shift, int i, float (&w)[4]) const {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int bit = shift + j * kSlot;
      const uint32_t bytes = word >> bit % 8 & mask_;  // one shift for all codes that stand so
      w[j] = entry(bytes, bit / 8, i);
    }
  }

  __device__ float entry(uint32_t bytes, int byte, int i) const {
    const uint32_t at = __byte_perm(bytes, static_cast<uint32_t>(lane()) * 4, 0x5504 | byte << 4);
    return *reinterpret_cast<const float*>(dynamic_shared_memory() + i * 128 + at);
  }

  // 32 terms; then the codes of the next 32 are the first ones.
  __device__ void multiply_piece() {
#pragma unroll
    for (int term = 0; term < kPieceTerms; term += 4) {
      float w[kOutputs][4];
#pragma unroll
      for (int i = 0; i < kOutputs; ++i) {
        look_up(words_[i][term / kCodes], term % kCodes * kSlot, i, w[i]);
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float4 x = *reinterpret_cast<const float4*>(rows_ + r * kPieceTerms + term);
#pragma unroll
        for (int i = 0; i < kOutputs; ++i) {
          float sum = sums_[r][i];
          sum = __fmaf_rn(x.x, w[i][0], sum);
          sum = __fmaf_rn(x.y, w[i][1], sum);
          sum = __fmaf_rn(x.z, w[i][2], sum);
          sums_[r][i] = __fmaf_rn(x.w, w[i][3], sum);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) {
#pragma unroll
      for (int j = 0; j + kWords < 4 * kUnitSteps; ++j) words_[i][j] = words_[i][j + kWords];
    }
  }

  // The last terms, fewer than 32. What stands behind them is not even multiplied by 0: its code may
  // stand for an infinity.
  __device__ void multiply_rest(int count) {
#pragma unroll
    for (int word = 0; word < kWords; ++word) {
#pragma unroll 1
      for (int j = 0; j < kCodes && word * kCodes + j < count; ++j) {
#pragma unroll
        for (int i = 0; i < kOutputs; ++i) {
          const float w = entry(words_[i][word] & mask_, 0, i);
          words_[i][word] = words_[i][word] >> (kSlot % 32);
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            sums_[r][i] = __fmaf_rn(rows_[r * kPieceTerms + word * kCodes + j], w, sums_[r][i]);
          }
        }
      }
    }
  }
};

template <int kSlotLog2, int kRows, int kOutputs>
__global__ void __launch_bounds__(32 * kMostWarps, 1)
    codebook_values(const __grid_constant__ CodebookRows rows) {
  CodebookValues<kSlotLog2, kRows, kOutputs>(rows).run();
}

// ------------------------------------------------------------------------------------------------

// One row and one codebook of 1 or 2 bits. For every 4 bits of codes a table has the sum of their
// products, for each combination, so that a load and an addition do the work of 4 or 2 products. A
// warp builds the 32 tables of its step, a lane one of them.
template <int kSlotLog2, int kOutputs>
class CodebookSums : CodebookRowsBlock<1, kOutputs> {
  using Block = CodebookRowsBlock<1, kOutputs>;

 public:
  __device__ explicit CodebookSums(const CodebookRows& rows)
      : Block(rows),
        tables_(ptx::shared_address(dynamic_shared_memory()) +
                static_cast<uint32_t>(warp()) * kTablesBytes) {
    for (int i = 0; i < kEntries; ++i) codebook_[i] = p_.codebook[i];
  }

  __device__ void run() {
    multiply();
    store();
  }

 private:
  using Block::codes, Block::lane, Block::p_, Block::first_element_, Block::s_, Block::steps,
      Block::store, Block::sums_, Block::terms, Block::warp, Block::warps;

  static constexpr int kEntries = 2 << kSlotLog2;
  static constexpr int kTerms = 4 >> kSlotLog2;  // of a table
  static constexpr int kStepTerms = 32 * kTerms;
  static constexpr uint32_t kTablesBytes = 32 * kSumsPitch * 4;
  static_assert(kTablesBytes % 256 == 0, "look_up puts its byte there");

  const uint32_t tables_;  // the warp's, an address in shared memory
  float codebook_[kEntries];
  float x_[kTerms];

  // Zeros beyond the last term.
  __device__ void fetch_row(int step) {
    const int k = step * kStepTerms + lane() * kTerms;
    if (s_.is_wide && k + kTerms <= terms()) {
      if (p_.input_dtype == Dtype::float32) {
        fetch_wide<float>(k);
      } else if (p_.input_dtype == Dtype::float16) {
        fetch_wide<Half>(k);
      } else {
        fetch_wide<BFloat16>(k);
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < kTerms; ++i) {
      x_[i] = k + i < terms() ? load_number(p_.input, p_.input_dtype, first_element_ + k + i) : 0;
    }
  }

  template <class T>
  __device__ void fetch_wide(int k) {
    using Terms = Piece<kTerms * sizeof(T)>;
    const auto* from = static_cast<const T*>(p_.input) + first_element_ + k;
    union {
      Terms piece;
      T numbers[kTerms];
    } x = {*reinterpret_cast<const Terms*>(from)};
#pragma unroll
    for (int i = 0; i < kTerms; ++i) x_[i] = to_float(x.numbers[i]);
  }

  // The sums of the products of one half of the table's terms, for what 2 bits stand for.
  __device__ void half_sums(int half, int k, float (&sums)[4]) const {
    if constexpr (kTerms == 2) {
      const bool exists = k + half < terms();
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[i] = exists ? codebook_[i] * x_[half] : 0.0f;
    } else {
      float products[2][2];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int term = 2 * half + i / 2;
        products[i / 2][i % 2] = k + term < terms() ? codebook_[i % 2] * x_[term] : 0.0f;
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[i] = products[0][i % 2] + products[1][i / 2];
    }
  }

  __device__ void build_table(int step) const {
    const int k = step * kStepTerms + lane() * kTerms;
    float low[4], high[4];
    half_sums(0, k, low);
    half_sums(1, k, high);
    auto* table = reinterpret_cast<float4*>(dynamic_shared_memory() + warp() * kTablesBytes) +
                  lane() * (kSumsPitch / 4);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      table[i] =
          make_float4(low[0] + high[i], low[1] + high[i], low[2] + high[i], low[3] + high[i]);
    }
  }

  // The entry of table `table` that 4 bits of the word stand for: its address is a byte of them, times
  // 4, below the bytes of tables_.
  __device__ float look_up(uint32_t word, int table) const {
    const uint32_t bytes = (table % 2 ? word >> 2 : word << 2) & 0x3C3C3C3C;
    const uint32_t at = __byte_perm(bytes, tables_, 0x7650 | table % 8 / 2);
    return *reinterpret_cast<const float*>(ptx::shared_pointer(at + table * kSumsPitch * 4));
  }

  __device__ void multiply() {
    int step = warp();
    if (step >= steps()) return;
    uint4 next[kOutputs];
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) next[i] = codes(step, i);
    fetch_row(step);
    for (; step < steps(); step += warps()) {
      uint32_t words[kOutputs][4];
#pragma unroll
      for (int i = 0; i < kOutputs; ++i) {
        words[i][0] = next[i].x, words[i][1] = next[i].y;
        words[i][2] = next[i].z, words[i][3] = next[i].w;
      }
      build_table(step);
      __syncwarp();
      if (step + warps() < steps()) {
#pragma unroll
        for (int i = 0; i < kOutputs; ++i) next[i] = codes(step + warps(), i);
        fetch_row(step + warps());
      }
#pragma unroll
      for (int table = 0; table < 32; ++table) {
#pragma unroll
        for (int i = 0; i < kOutputs; ++i) sums_[0][i] += look_up(words[i][table / 8], table);
      }
      __syncwarp();
    }
  }
};

template <int kSlotLog2, int kOutputs>
__global__ void __launch_bounds__(32 * kMostWarps, 1)
    codebook_sums(const __grid_constant__ CodebookRows rows) {
  CodebookSums<kSlotLog2, kOutputs>(rows).run();
}

// ------------------------------------------------------------------------------------------------

using CodebookRowsKernel = void (*)(CodebookRows);

template <int kOutputs>
CodebookRowsKernel sums_kernel(int slot_log2) {
  return slot_log2 == 0 ? codebook_sums<0, kOutputs> : codebook_sums<1, kOutputs>;
}

template <int kSlotLog2>
CodebookRowsKernel values_kernel(const CodebookPlan& plan) {
  if (plan.outputs == 1) {
    return plan.rows == 1   ? codebook_values<kSlotLog2, 1, 1>
           : plan.rows == 4 ? codebook_values<kSlotLog2, 4, 1>
                            : codebook_values<kSlotLog2, 8, 1>;
  }
  return plan.rows == 1   ? codebook_values<kSlotLog2, 1, 2>
         : plan.rows == 4 ? codebook_values<kSlotLog2, 4, 2>
                          : codebook_values<kSlotLog2, 8, 2>;
}

inline CodebookRowsKernel rows_kernel(const CodebookPlan& plan, int slot_log2) {
  if (plan.kernel == CodebookKernel::sums) {
    return plan.outputs == 1 ? sums_kernel<1>(slot_log2) : sums_kernel<2>(slot_log2);
  }
  switch (slot_log2) {
    case 0:
      return values_kernel<0>(plan);
    case 1:
      return values_kernel<1>(plan);
    case 2:
      return values_kernel<2>(plan);
    default:
      return values_kernel<3>(plan);
  }
}

inline int run_few_rows(const CodebookConv2dParams& p, const CodebookPlan& plan,
                        cudaStream_t stream) {
  const CodebookWeight weight = codebook_weight(p.shape, p.bits);
  const auto rows = static_cast<int>(p.batch * p.out_height * p.out_width);
  const int64_t tiles = (weight.blocks() + plan.outputs - 1) / plan.outputs;
  const int element = bytes_of(p.input_dtype);
  const CodebookRows arguments = {p, weight, rows, static_cast<unsigned>(tiles),
                                  p.shape.channels % 4 == 0 && is_aligned(p.input, element)};
  const dim3 grid(static_cast<unsigned>(tiles * weight.groups),
                  static_cast<unsigned>((rows + plan.rows - 1) / plan.rows));
  return launch(rows_kernel(plan, weight.slot_log2), grid,
                dim3(32, static_cast<unsigned>(plan.warps)), plan.shared_bytes, stream, arguments);
}

}  // namespace nncx::cuda
