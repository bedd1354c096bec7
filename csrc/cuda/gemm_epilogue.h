// The end of every GEMM kernel: sums in shared memory -> output, as binary_epilogue.h and
// int8_epilogue.h say, each operation rounded on its own.
//
// A warp stores a chunk: up to 16 rows (neighbouring output pixels) x 64 outputs of one group. What
// belongs to a row is computed once, by one lane, and shuffled; what belongs to an output channel is
// loaded once. Who takes what depends on the layout of the output:
//
//   channels innermost   16 lanes a row, 4 neighbouring channels each
//   pixels innermost     16 lanes a channel, one row each
//   signs                straight from the registers of mma, where a lane has 16 outputs of two rows;
//                        four lanes put the words of a row together
#pragma once

#include "cuda/gemm_ops.h"
#include "cuda/gemm_plan.h"

namespace nncx::cuda {

constexpr unsigned kAllLanes = 0xFFFFFFFF;

// ------------------------------------------------------------------------------------------------
// Rows and channels

struct ChunkRow {
  int32_t term;  // gemm_ops.h
  float input_scale;
  bool is_border;  // some of its taps lie outside the image, and that matters
  TapRange y, x;   // only where it is
  int64_t n, in_image;
};

// Each lane knows the row `lane % 16`; beyond the last one it repeats that. The pixel's position
// costs divisions, so it is computed only where something depends on it.
template <class Op>
__device__ inline ChunkRow chunk_row(const typename Op::Params& p, int64_t first_row, int rows,
                                     int group, const int32_t* row_bits, bool wants_position) {
  const int r = min(static_cast<int>(threadIdx.x % kChunkRows), rows - 1);
  const bool is_padded = (p.padding_h | p.padding_w) != 0 && Op::corrects_borders(p);
  ChunkRow row{0, 1.0f, false, {}, {}, 0, 0};
  if (wants_position || is_padded || p.epilogue.input_scale || Op::term_is_of_image(p)) {
    const OutputPixel at = output_pixel(p, first_row + r);
    row.n = at.n;
    row.in_image = at.in_image;
    if (p.epilogue.input_scale) {
      row.input_scale = p.epilogue.input_scale[Op::input_scale_index(p, at, group)];
    }
    if (is_padded && !is_interior(p, at)) {
      row.is_border = true;
      row.y = valid_taps_y(p, at);
      row.x = valid_taps_x(p, at);
    }
  }
  row.term = Op::term(p, row.n, row_bits ? row_bits[r] : 0);
  return row;
}

// That of row r, for all lanes, which may ask for different ones. `borders` tells of each row whether
// it is one; the ranges come with shuffle_border, which few chunks need.
__device__ inline ChunkRow shuffle_row(const ChunkRow& row, int r, unsigned borders,
                                       bool has_input_scale) {
  ChunkRow result{__shfl_sync(kAllLanes, row.term, r), 1.0f, (borders >> r & 1) != 0, {}, {}, 0, 0};
  if (has_input_scale) result.input_scale = __shfl_sync(kAllLanes, row.input_scale, r);
  return result;
}

__device__ inline void shuffle_border(const ChunkRow& row, int r, ChunkRow& result) {
  result.y.begin = __shfl_sync(kAllLanes, row.y.begin, r);
  result.y.end = __shfl_sync(kAllLanes, row.y.end, r);
  result.x.begin = __shfl_sync(kAllLanes, row.x.begin, r);
  result.x.end = __shfl_sync(kAllLanes, row.x.end, r);
}

// The dot products of a row, from sums, for `Count` channels `kStep` apart from o on, of which
// `count` exist.
template <class Op, int kCount, int kStep>
class ChunkChannels {
 public:
  __device__ ChunkChannels(const typename Op::Params& p, int64_t o, int count)
      : tap_sums_(tap_sums_of<Op>(p) + o), count_(count) {
    const int64_t totals = p.shape.taps * p.epilogue.channels;
    for (int i = 0; i < kCount; ++i) {
      offset_[i] = i < count ? Op::offset(p, tap_sums_[totals + i * kStep]) : 0;
    }
  }

  __device__ void finish(const ChunkRow& row, int32_t (&sums)[kCount]) const {
    for (int i = 0; i < kCount; ++i) sums[i] = Op::dot(sums[i], row.term, offset_[i]);
  }

  // The same of a border row, for those that finish() has gone over.
  __device__ void correct(const typename Op::Params& p, const ChunkRow& row,
                          int32_t (&sums)[kCount]) const {
    uint32_t outside[kCount] = {};
    int taps = 0;
    const auto kernel_w = static_cast<int>(p.kernel_w);
    for (int y = 0; y < p.kernel_h; ++y) {
      const bool is_inside = row.y.holds(y);
      for (int x = 0; x < kernel_w; ++x) {
        if (is_inside && x == row.x.begin) x = max(x, row.x.end);
        if (x >= kernel_w) break;
        const int32_t* line = tap_sums_ + (int64_t{y} * kernel_w + x) * p.epilogue.channels;
        ++taps;
        for (int i = 0; i < kCount; ++i) {
          if (i < count_) outside[i] += static_cast<uint32_t>(line[i * kStep]);
        }
      }
    }
    for (int i = 0; i < kCount; ++i) {
      sums[i] = Op::correct(p, sums[i], row.term, taps, static_cast<int32_t>(outside[i]));
    }
  }

 private:
  const int32_t* tap_sums_;
  int count_;
  uint32_t offset_[kCount];
};

// The neutral numbers where there is no scale or bias: x * 1 = x, and x + -0 = x, also for -0.
struct ChannelScale {
  float scale, bias;
};

template <class Epilogue>
__device__ inline ChannelScale channel_scale(const Epilogue& e, int64_t o, bool exists) {
  return {exists && e.scale ? e.scale[o] : 1.0f, exists && e.bias ? e.bias[o] : -0.0f};
}

__device__ inline float scaled(int32_t dot, const ChannelScale& c, float input_scale) {
  return static_cast<float>(dot) * c.scale * input_scale + c.bias;
}

// ------------------------------------------------------------------------------------------------
// Numbers: one, or four neighbours at an index that four divides

// Whether four neighbours are one access, of a tensor whose numbers have `bytes`.
__device__ inline bool is_aligned(const void* tensor, int bytes) {
  return reinterpret_cast<uintptr_t>(tensor) % (4 * bytes) == 0;
}

__device__ inline int bytes_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

__device__ inline void store_number(float v, Dtype dtype, void* output, int64_t at) {
  if (dtype == Dtype::float32) {
    static_cast<float*>(output)[at] = v;
  } else if (dtype == Dtype::float16) {
    from_float(v, static_cast<Half*>(output) + at);
  } else {
    from_float(v, static_cast<BFloat16*>(output) + at);
  }
}

__device__ inline void store_four(const float (&v)[4], Dtype dtype, void* output, int64_t at) {
  if (dtype == Dtype::float32) {
    static_cast<float4*>(output)[at / 4] = make_float4(v[0], v[1], v[2], v[3]);
  } else if (dtype == Dtype::float16) {
    static_cast<uint2*>(output)[at / 4] = make_uint2(half_pair(v[0], v[1]), half_pair(v[2], v[3]));
  } else {
    static_cast<uint2*>(output)[at / 4] =
        make_uint2(bfloat16_pair(v[0], v[1]), bfloat16_pair(v[2], v[3]));
  }
}

__device__ inline float load_number(const void* input, Dtype dtype, int64_t at) {
  if (dtype == Dtype::float32) return static_cast<const float*>(input)[at];
  if (dtype == Dtype::float16) return to_float(static_cast<const Half*>(input)[at]);
  return to_float(static_cast<const BFloat16*>(input)[at]);
}

// What is the op's own, after scale and bias.
class BinaryNumbers {
 public:
  __device__ explicit BinaryNumbers(const BinaryEpilogue& e) : e_(e) {}

  __device__ bool is_aligned_to_four() const { return is_aligned(e_.output, bytes_of(e_.dtype)); }

  __device__ void store(float v, int64_t at) const { store_number(v, e_.dtype, e_.output, at); }
  __device__ void store_four_of(const float (&v)[4], int64_t at) const {
    store_four(v, e_.dtype, e_.output, at);
  }

 private:
  const BinaryEpilogue& e_;
};

class Int8Numbers {
 public:
  __device__ explicit Int8Numbers(const Int8Epilogue& e) : e_(e), scalars_(read_scalars(e)) {}

  __device__ bool is_aligned_to_four() const {
    return is_aligned(e_.output, e_.output_is_int8 ? 1 : bytes_of(e_.dtype)) &&
           is_aligned(e_.residual, e_.residual_is_int8 ? 1 : bytes_of(e_.residual_dtype));
  }

  __device__ void store(float v, int64_t at) const {
    if (e_.residual) {
      v += e_.residual_is_int8 ? residual(static_cast<const int8_t*>(e_.residual)[at])
                               : load_number(e_.residual, e_.residual_dtype, at);
    }
    v = activate(e_.activation, v);
    if (e_.output_is_int8) {
      static_cast<int8_t*>(e_.output)[at] = quantized(v);
    } else {
      store_number(v, e_.dtype, e_.output, at);
    }
  }

  __device__ void store_four_of(const float (&v)[4], int64_t at) const {
    float y[4] = {v[0], v[1], v[2], v[3]};
    if (e_.residual) add_residual(y, at);
    for (float& number : y) number = activate(e_.activation, number);
    if (e_.output_is_int8) {
      uint32_t word = 0;
      for (int i = 0; i < 4; ++i) word |= uint32_t{static_cast<uint8_t>(quantized(y[i]))} << 8 * i;
      static_cast<uint32_t*>(e_.output)[at / 4] = word;
    } else {
      store_four(y, e_.dtype, e_.output, at);
    }
  }

 private:
  const Int8Epilogue& e_;
  const Int8Scalars scalars_;

  __device__ int8_t quantized(float v) const {
    return quantize_rounded(scalars_.quantizer, rintf(v * scalars_.quantizer.inverse_scale));
  }

  __device__ float residual(int32_t q) const {
    return static_cast<float>(q - scalars_.residual_zero_point) * scalars_.residual_scale;
  }

  __device__ void add_residual(float (&v)[4], int64_t at) const {
    if (e_.residual_is_int8) {
      const uint32_t word = static_cast<const uint32_t*>(e_.residual)[at / 4];
      for (int i = 0; i < 4; ++i) v[i] += residual(static_cast<int8_t>(word >> 8 * i));
    } else if (e_.residual_dtype == Dtype::float32) {
      const float4 r = static_cast<const float4*>(e_.residual)[at / 4];
      v[0] += r.x, v[1] += r.y, v[2] += r.z, v[3] += r.w;
    } else {
      const uint2 r = static_cast<const uint2*>(e_.residual)[at / 4];
      for (int i = 0; i < 4; ++i) {
        const auto bits = static_cast<uint16_t>((i < 2 ? r.x : r.y) >> 16 * (i % 2));
        v[i] +=
            e_.residual_dtype == Dtype::float16 ? to_float(Half{bits}) : to_float(BFloat16{bits});
      }
    }
  }
};

__device__ inline BinaryNumbers numbers_of(const BinaryEpilogue& e) { return BinaryNumbers(e); }
__device__ inline Int8Numbers numbers_of(const Int8Epilogue& e) { return Int8Numbers(e); }

// ------------------------------------------------------------------------------------------------
// The three ways out

// A lane's sums of a chunk: with g = lane / 4 and t = lane % 4, [j][i] is of row g + 8 * (i / 2) and
// output 8 * j + 2 * t + i % 2.
constexpr int kFragmentColumns = kChunkOutputs / 8;
using Fragment = int32_t[kFragmentColumns][4];

// From which value of 4 * sum - 2 * bits on the sign of an output is set (binary_epilogue.h), before
// the flips. A lane knows the outputs `lane` and `lane + 32` of a chunk.
struct SignBounds {
  int32_t of[2];
  uint32_t flips[2];  // of all

  __device__ SignBounds(const BinaryConv2dParams& p, int64_t first, int outputs) {
    const BinaryEpilogue& e = p.epilogue;
    const int32_t* totals = tap_sums_of<BinaryGemm>(p) + p.shape.taps * e.channels;
    for (int i = 0; i < 2; ++i) {
      const int output = threadIdx.x % 32 + 32 * i;
      const int64_t o = first + output;
      const bool exists = output < outputs;
      of[i] = INT32_MAX;  // which no value reaches
      if (exists) {
        const int64_t offset = static_cast<int32_t>(BinaryGemm::offset(p, totals[o]));
        of[i] = static_cast<int32_t>(
            min(max(e.threshold[o] - offset, int64_t{INT32_MIN}), int64_t{INT32_MAX}));
      }
      flips[i] = __ballot_sync(kAllLanes, exists && e.flip[o]);
    }
  }
};

template <class Op>
struct Chunk {
  const typename Op::Params& p;
  int64_t first_row;
  int rows, group, outputs;
  int64_t o;  // the first output channel, of all groups
  const int32_t* sums;
  int pitch;
  const int32_t* row_bits;

  __device__ void store_channels_last() const {
    constexpr int kCount = 4, kLanes = kChunkOutputs / kCount, kRows = 32 / kLanes;
    const auto& e = p.epilogue;
    const auto numbers = numbers_of(e);
    const int lane = threadIdx.x % 32;
    const int column = lane % kLanes * kCount;
    const int count = min(max(outputs - column, 0), kCount);
    const bool is_whole =
        count == kCount && (e.channels | o) % kCount == 0 && numbers.is_aligned_to_four();
    const ChunkRow own = chunk_row<Op>(p, first_row, rows, group, row_bits, false);
    const unsigned borders = __ballot_sync(kAllLanes, own.is_border);
    const ChunkChannels<Op, kCount, 1> channels(p, o + column, count);
    ChannelScale scales[kCount];
    for (int i = 0; i < kCount; ++i) scales[i] = channel_scale(e, o + column + i, i < count);
    int64_t at = (first_row + lane / kLanes) * e.channels + o + column;
    for (int first = 0; first < rows; first += kRows, at += kRows * e.channels) {
      const int r = first + lane / kLanes;
      ChunkRow row = shuffle_row(own, r, borders, e.input_scale != nullptr);
      const int4 four = *reinterpret_cast<const int4*>(sums + r * pitch + column);
      int32_t dots[kCount] = {four.x, four.y, four.z, four.w};
      channels.finish(row, dots);
      if (borders >> first & ((1u << kRows) - 1)) {
        shuffle_border(own, r, row);
        if (row.is_border) channels.correct(p, row, dots);
      }
      float v[kCount];
      for (int i = 0; i < kCount; ++i) v[i] = scaled(dots[i], scales[i], row.input_scale);
      if (r >= rows) continue;
      if (is_whole) {
        numbers.store_four_of(v, at);
      } else {
        for (int i = 0; i < kCount; ++i) {
          if (i < count) numbers.store(v[i], at + i);
        }
      }
    }
  }

  __device__ void store_pixels_last() const {
    constexpr int kCount = 4;
    const auto& e = p.epilogue;
    const auto numbers = numbers_of(e);
    const int r = threadIdx.x % kChunkRows;
    const ChunkRow row = chunk_row<Op>(p, first_row, rows, group, row_bits, true);
    if (r >= rows) return;
    for (int column = threadIdx.x % 32 / kChunkRows * kCount; column < outputs;
         column += 32 / kChunkRows * kCount) {
      const int count = min(outputs - column, kCount);
      const ChunkChannels<Op, kCount, 1> channels(p, o + column, count);
      const int4 four = *reinterpret_cast<const int4*>(sums + r * pitch + column);
      int32_t dots[kCount] = {four.x, four.y, four.z, four.w};
      channels.finish(row, dots);
      if (row.is_border) channels.correct(p, row, dots);
      const int64_t at = (row.n * e.channels + o + column) * e.image + row.in_image;
      for (int i = 0; i < kCount; ++i) {
        if (i >= count) break;
        numbers.store(scaled(dots[i], channel_scale(e, o + column + i, true), row.input_scale),
                      at + i * e.image);
      }
    }
  }

  __device__ void store_signs() const {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    Fragment fragment;
    int32_t bits[2];
    for (int h = 0; h < 2; ++h) {
      const int r = min(g + 8 * h, rows - 1);
      bits[h] = row_bits[r];
      for (int j = 0; j < kFragmentColumns; ++j) {
        const int2 two = *reinterpret_cast<const int2*>(sums + r * pitch + 8 * j + 2 * t);
        fragment[j][2 * h] = two.x;
        fragment[j][2 * h + 1] = two.y;
      }
    }
    store_signs(fragment, bits);
  }

  // Of sums as mma.sync and wgmma hold them (Fragment), bits being those of the rows g and g + 8. A
  // sum is compared where it is: through shared memory it would take three times as long.
  __device__ void store_signs(const Fragment& sums, const int32_t (&bits)[2]) const {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    Fragment values;
    for (int j = 0; j < kFragmentColumns; ++j) {
      for (int i = 0; i < 4; ++i) values[j][i] = Op::dot(sums[j][i], bits[i / 2], 0);
    }
    const ChunkRow own = chunk_row<Op>(p, first_row, rows, group, nullptr, false);
    if (__any_sync(kAllLanes, own.is_border)) correct(own, values);
    const SignBounds bounds(p, o, outputs);
    uint32_t words[2][2] = {};  // [row g or g + 8][low or high], but for the shift by 2 * t
    for (int j = 0; j < kFragmentColumns; ++j) {
      for (int e = 0; e < 2; ++e) {
        const int32_t bound = __shfl_sync(kAllLanes, bounds.of[j / 4], 8 * (j % 4) + 2 * t + e);
        for (int h = 0; h < 2; ++h) {
          if (values[j][2 * h + e] >= bound) words[h][j / 4] |= 1u << (8 * (j % 4) + e);
        }
      }
    }
    for (int h = 0; h < 2; ++h) {
      for (int half = 0; half < 2; ++half) {
        uint32_t& word = words[h][half];
        word <<= 2 * t;
        word |= __shfl_xor_sync(kAllLanes, word, 1);
        word |= __shfl_xor_sync(kAllLanes, word, 2);
        word ^= bounds.flips[half];
      }
    }
    const int r = g + 8 * t;
    if (t < 2 && r < rows) {
      write_signs(first_row + r, t == 0 ? words[0][0] : words[1][0],
                  t == 0 ? words[0][1] : words[1][1]);
    }
  }

  // Adds what the taps outside the image make of the values in border rows.
  __device__ void correct(const ChunkRow& own, Fragment& values) const {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    ChunkRow rows_of_lane[2];
    for (int h = 0; h < 2; ++h) {
      rows_of_lane[h].is_border = __shfl_sync(kAllLanes, int{own.is_border}, g + 8 * h) != 0;
      shuffle_border(own, g + 8 * h, rows_of_lane[h]);
    }
    const int32_t* tap_sums = tap_sums_of<Op>(p) + o;
    for (int y = 0; y < p.kernel_h; ++y) {
      for (int x = 0; x < p.kernel_w; ++x, tap_sums += p.epilogue.channels) {
        bool is_outside[2];
        for (int h = 0; h < 2; ++h) {
          const ChunkRow& row = rows_of_lane[h];
          is_outside[h] = row.is_border && !(row.y.holds(y) && row.x.holds(x));
        }
        if (!__any_sync(kAllLanes, is_outside[0] || is_outside[1])) continue;
        for (int j = 0; j < kFragmentColumns; ++j) {
          for (int e = 0; e < 2; ++e) {
            const int output = 8 * j + 2 * t + e;
            const int32_t tap_sum = output < outputs ? tap_sums[output] : 0;
            for (int h = 0; h < 2; ++h) {
              int32_t& value = values[j][2 * h + e];
              if (is_outside[h]) value = Op::correct(p, value, 0, 1, tap_sum);
            }
          }
        }
      }
    }
  }

  // The `outputs` signs of a pixel, from channel o on, word by word of the output. A word that has
  // other channels too, which another warp may be writing, is only added to.
  __device__ void write_signs(int64_t pixel, uint32_t low, uint32_t high) const {
    const BinaryEpilogue& e = p.epilogue;
    const bool is_whole = e.out_groups == 1;
    const int64_t per_group = is_whole ? e.channels : e.channels / e.out_groups;
    const int64_t out_group = is_whole ? 0 : o / per_group;
    const int64_t group_words = packed_bytes(per_group) / 4;
    auto* words =
        static_cast<uint32_t*>(e.output) + (pixel * e.out_groups + out_group) * group_words;
    int64_t channel = o - out_group * per_group;
    if (channel % kChunkOutputs == 0 &&
        outputs == min(per_group - channel, int64_t{kChunkOutputs})) {  // two words of our own
      *reinterpret_cast<uint2*>(words + channel / 32) = make_uint2(low, high);
      return;
    }
    const uint64_t signs = uint64_t{high} << 32 | low;
    int count;
    for (int done = 0; done < outputs; done += count) {
      const int bit = static_cast<int>(channel % 32);
      const int64_t left = min(per_group - channel, int64_t{32} - bit);  // of the word's channels
      count = static_cast<int>(min(left, int64_t{outputs} - done));
      const auto some = static_cast<uint32_t>(signs >> done) & 0xFFFFFFFFu >> (32 - count);
      if (bit == 0 && count == left) {
        words[channel / 32] = some;
      } else {
        atomicOr(words + channel / 32, some << bit);
      }
      channel += count;
      if (channel == per_group) {
        channel = 0;
        words += group_words;
      }
    }
  }
};

// One warp stores `rows` x `outputs` sums, at most 16 x 64: sums[row * pitch + output], in shared
// memory, 16-byte aligned, `pitch` a multiple of 4; rows may be read to their 64th output, and the row
// behind the last one. `group` is that of the weight and `first_output` counts in it. row_bits[row] is
// how many bits of the row of A are 1, for ops that count them.
template <class Op>
__device__ inline void store_sums(const typename Op::Params& p, int64_t first_row, int rows,
                                  int group, int64_t first_output, int outputs, const int32_t* sums,
                                  int pitch, const int32_t* row_bits) {
  const Chunk<Op> chunk{p,     first_row, rows,
                        group, outputs,   group * p.shape.out_channels + first_output,
                        sums,  pitch,     row_bits};
  if constexpr (Op::kHasSigns) {
    if (p.epilogue.threshold) return chunk.store_signs();
  }
  if (p.epilogue.channels_last) return chunk.store_channels_last();
  chunk.store_pixels_last();
}

// The same of sums that the lanes hold, where signs leave: p.epilogue.threshold is there. `bits` are
// those of the rows g and g + 8.
template <class Op>
__device__ inline void store_signs(const typename Op::Params& p, int64_t first_row, int rows,
                                   int group, int64_t first_output, int outputs,
                                   const Fragment& sums, const int32_t (&bits)[2]) {
  const Chunk<Op> chunk{p,       first_row, rows,
                        group,   outputs,   group * p.shape.out_channels + first_output,
                        nullptr, 0,         nullptr};
  chunk.store_signs(sums, bits);
}

}  // namespace nncx::cuda
