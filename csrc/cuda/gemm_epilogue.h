// The end of the GEMM kernels but sm_90a's (gemm_sm90_epilogue.h): sums in shared memory -> output, as
// binary_epilogue.h and int8_epilogue.h say, each operation rounded on its own.
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

#include "cuda/gemm_numbers.h"
#include "cuda/gemm_ops.h"
#include "cuda/gemm_plan.h"

namespace nncx::cuda {

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
  row.term = Op::term(p, row.n, Op::kCountsBits && row_bits ? row_bits[r] : 0);
  return row;
}

// Of row r, to all lanes that ask for it: the taps that lie in the image.
__device__ inline ChunkRow shuffle_taps(const ChunkRow& row, int r) {
  ChunkRow result{};
  result.is_border = __shfl_sync(kAllLanes, static_cast<int>(row.is_border), r) != 0;
  result.y.begin = __shfl_sync(kAllLanes, row.y.begin, r);
  result.y.end = __shfl_sync(kAllLanes, row.y.end, r);
  result.x.begin = __shfl_sync(kAllLanes, row.x.begin, r);
  result.x.end = __shfl_sync(kAllLanes, row.x.end, r);
  result.term = __shfl_sync(kAllLanes, row.term, r);
  return result;
}

// The dot products of a row, from sums, for the channels from o on, of which `count` exist.
template <class Op, int kCount>
class ChunkChannels {
 public:
  __device__ ChunkChannels(const typename Op::Params& p, int64_t o, int count)
      : tap_sums_(tap_sums_of<Op>(p) + o), count_(count) {
    const int64_t totals = p.shape.taps * p.epilogue.channels;
    for (int i = 0; i < kCount; ++i) {
      offset_[i] = i < count ? Op::offset(p, tap_sums_[totals + i]) : 0;
    }
  }

  // Of a row whose taps all lie in the image.
  __device__ void finish(int32_t term, int32_t (&sums)[kCount]) const {
    for (int i = 0; i < kCount; ++i) sums[i] = Op::dot(sums[i], term, offset_[i]);
  }

  // Then, of any other.
  __device__ void correct(const typename Op::Params& p, const ChunkRow& row,
                          int32_t (&sums)[kCount]) const {
    if (!row.is_border) return;
    uint32_t outside[kCount] = {};
    int taps = 0;
    const auto kernel_w = static_cast<int>(p.kernel_w);
#pragma unroll 1
    for (int y = 0; y < p.kernel_h; ++y) {
      const bool is_inside = row.y.holds(y);
#pragma unroll 1
      for (int x = 0; x < kernel_w; ++x) {
        if (is_inside && x == row.x.begin) x = max(x, row.x.end);
        if (x >= kernel_w) break;
        const int32_t* line = tap_sums_ + (int64_t{y} * kernel_w + x) * p.epilogue.channels;
        ++taps;
        for (int i = 0; i < kCount; ++i) {
          if (i < count_) outside[i] += static_cast<uint32_t>(line[i]);
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
// The three ways out

// A lane's sums of a chunk: with g = lane / 4 and t = lane % 4, [j][i] is of row g + 8 * (i / 2) and
// output 8 * j + 2 * t + i % 2.
constexpr int kFragmentColumns = kChunkOutputs / 8, kHalfColumns = kFragmentColumns / 2;
using Fragment = int32_t[kFragmentColumns][4];
using HalfFragment = int32_t[kHalfColumns][4];

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

// The `outputs` signs of a pixel, from channel o on, word by word of the output. A word that has
// other channels too, which another warp may be writing, is only added to.
__device__ inline void write_signs(const BinaryEpilogue& e, int64_t o, int outputs, int64_t pixel,
                                   uint32_t low, uint32_t high) {
  // 32 bits divide faster, and are enough for what has a weight for each channel
  const auto per_group = static_cast<uint32_t>(e.channels) / static_cast<uint32_t>(e.out_groups);
  const auto out_group = static_cast<uint32_t>(o) / per_group;
  const int64_t group_words = packed_bytes(per_group) / 4;
  auto* words = static_cast<uint32_t*>(e.output) + (pixel * e.out_groups + out_group) * group_words;
  uint32_t channel = static_cast<uint32_t>(o) - out_group * per_group;
  if (channel % kChunkOutputs == 0 &&
      outputs ==
          static_cast<int>(min(per_group - channel, 1u * kChunkOutputs))) {  // two words of our own
    *reinterpret_cast<uint2*>(words + channel / 32) = make_uint2(low, high);
    return;
  }
  const uint64_t signs = uint64_t{high} << 32 | low;
  int count;
  for (int done = 0; done < outputs; done += count) {
    const int bit = static_cast<int>(channel % 32);
    const int left = static_cast<int>(min(per_group - channel, 32u - bit));  // in the word
    count = min(left, outputs - done);
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

template <class Op, int kLines>
struct Chunk {
  const typename Op::Params& p;
  int64_t first_row;
  int rows, group, outputs;
  int64_t o;  // the first output channel, of all groups
  const int32_t* sums;
  int pitch;
  const int32_t* row_bits;

  __device__ void store_channels_last() const {
    const ChunkRow own = chunk_row<Op>(p, first_row, rows, group, row_bits, false);
    const unsigned borders = __ballot_sync(kAllLanes, own.is_border);  // bit r: row r
    if (borders) {
      store_channels_of<1>(own, borders);
    } else {
      store_channels_of<kLines>(own, 0);
    }
  }

  // So many rows at a time for each lane. Only one at a time may be border rows, which take registers.
  template <int kAtATime>
  __device__ void store_channels_of(const ChunkRow& own, unsigned borders) const {
    constexpr int kCount = 4, kLanes = kChunkOutputs / kCount, kAtOnce = 32 / kLanes;
    const auto& e = p.epilogue;
    const auto numbers = numbers_of(e);
    const int lane = threadIdx.x % 32;
    const int column = lane % kLanes * kCount;
    const int count = min(max(outputs - column, 0), kCount);
    const ChunkChannels<Op, kCount> channels(p, o + column, count);
    ChannelScale scales[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) scales[i] = channel_scale(e, o + column + i, i < count);
    Block block{(first_row + lane / kLanes) * e.channels + o + column, kAtOnce * e.channels, 0,
                count,
                count == kCount && (e.channels | o) % kCount == 0 && numbers.is_aligned_to_four()};
#pragma unroll 1
    for (int first = 0; first < rows; first += kAtATime * kAtOnce) {
      const int r = first + lane / kLanes;
      int32_t dots[kAtATime][kCount];
#pragma unroll
      for (int line = 0; line < kAtATime; ++line) {
        read_four(min(r + line * kAtOnce, rows - 1), column, dots[line]);
        channels.finish(__shfl_sync(kAllLanes, own.term, r + line * kAtOnce), dots[line]);
      }
      if constexpr (kAtATime == 1) {
        if (borders >> first & ((1 << kAtOnce) - 1)) {
          channels.correct(p, shuffle_taps(own, r), dots[0]);
        }
      }
      float v[kAtATime][kCount];
#pragma unroll
      for (int line = 0; line < kAtATime; ++line) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          v[line][i] = static_cast<float>(dots[line][i]) * scales[i].scale;
        }
      }
      if (e.input_scale) {
#pragma unroll
        for (int line = 0; line < kAtATime; ++line) {
          const float scale = __shfl_sync(kAllLanes, own.input_scale, r + line * kAtOnce);
#pragma unroll
          for (int i = 0; i < kCount; ++i) v[line][i] *= scale;
        }
      }
#pragma unroll
      for (int line = 0; line < kAtATime; ++line) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) v[line][i] += scales[i].bias;
      }
      block.lines = (rows - r + kAtOnce - 1) / kAtOnce;
      numbers.store(v, block);
      block.at += kAtATime * block.step;
    }
  }

  __device__ void store_pixels_last() const {
    constexpr int kAtOnce = 32 / kChunkRows;
    const auto& e = p.epilogue;
    const auto numbers = numbers_of(e);
    const int r = threadIdx.x % kChunkRows;
    const ChunkRow row = chunk_row<Op>(p, first_row, rows, group, row_bits, true);
    if (r >= rows) return;
    for (int column = threadIdx.x % 32 / kChunkRows; column < outputs; column += kLines * kAtOnce) {
      const int lines = min((outputs - column + kAtOnce - 1) / kAtOnce, kLines);
      float v[kLines][1];
#pragma unroll
      for (int line = 0; line < kLines; ++line) {
        const int at = column + min(line, lines - 1) * kAtOnce;
        int32_t dot[1] = {sums[r * pitch + at]};
        const ChunkChannels<Op, 1> channel(p, o + at, 1);
        channel.finish(row.term, dot);
        channel.correct(p, row, dot);
        v[line][0] = scaled(dot[0], channel_scale(e, o + at, true), row.input_scale);
      }
      numbers.store(v, Block{(row.n * e.channels + o + column) * e.image + row.in_image,
                             kAtOnce * e.image, lines, 1, false});
    }
  }

  // Of sums in shared memory, and rows whose taps all lie in the image.
  __device__ void store_signs() const {
    const int lane = threadIdx.x % 32;
    const SignBounds bounds(p, o, outputs);
    for (int r = 0; r < rows; ++r) {
      uint32_t words[2];
      for (int half = 0; half < 2; ++half) {
        const int32_t value = Op::dot(sums[r * pitch + lane + 32 * half], row_bits[r], 0);
        words[half] = __ballot_sync(kAllLanes, value >= bounds.of[half]) ^ bounds.flips[half];
      }
      if (lane == 0) write_signs(p.epilogue, o, outputs, first_row + r, words[0], words[1]);
    }
  }

  // Of sums as mma.sync and wgmma hold them (Fragment), bits being those of the rows g and g + 8. A
  // sum is compared where it is: through shared memory it would take three times as long.
  // Half a chunk at a time, since beside it a lane may hold the sums of a tile.
  __device__ void store_signs(const Fragment& fragment, const int32_t (&bits)[2]) const {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const ChunkRow own = chunk_row<Op>(p, first_row, rows, group, nullptr, false);
    const bool has_border = __any_sync(kAllLanes, own.is_border);
    const SignBounds bounds(p, o, outputs);
    uint32_t words[2][2];  // [row g or g + 8][low or high]
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      HalfFragment values;
      for (int j = 0; j < kHalfColumns; ++j) {
        for (int i = 0; i < 4; ++i) {
          values[j][i] = Op::dot(fragment[half * kHalfColumns + j][i], bits[i / 2], 0);
        }
      }
      if (has_border) correct(own, half * 32, values);
      uint32_t word[2] = {};  // but for the shift by 2 * t
      for (int j = 0; j < kHalfColumns; ++j) {
        for (int e = 0; e < 2; ++e) {
          const int32_t bound = __shfl_sync(kAllLanes, bounds.of[half], 8 * j + 2 * t + e);
          for (int h = 0; h < 2; ++h) {
            if (values[j][2 * h + e] >= bound) word[h] |= 1u << (8 * j + e);
          }
        }
      }
      for (int h = 0; h < 2; ++h) {
        word[h] <<= 2 * t;
        word[h] |= __shfl_xor_sync(kAllLanes, word[h], 1);
        word[h] |= __shfl_xor_sync(kAllLanes, word[h], 2);
        words[h][half] = word[h] ^ bounds.flips[half];
      }
    }
    const int r = g + 8 * t;
    if (t < 2 && r < rows) {
      write_signs(p.epilogue, o, outputs, first_row + r, t == 0 ? words[0][0] : words[1][0],
                  t == 0 ? words[0][1] : words[1][1]);
    }
  }

  // Adds what the taps outside the image make of the values in border rows, of outputs from `first` on.
  __device__ void correct(const ChunkRow& own, int first, HalfFragment& values) const {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const ChunkRow rows_of_lane[2] = {shuffle_taps(own, g), shuffle_taps(own, g + 8)};
    const int32_t* tap_sums = tap_sums_of<Op>(p) + o;
#pragma unroll 1
    for (int y = 0; y < p.kernel_h; ++y) {
#pragma unroll 1
      for (int x = 0; x < p.kernel_w; ++x, tap_sums += p.epilogue.channels) {
        bool is_outside[2];
        for (int h = 0; h < 2; ++h) {
          const ChunkRow& row = rows_of_lane[h];
          is_outside[h] = row.is_border && !(row.y.holds(y) && row.x.holds(x));
        }
        if (!__any_sync(kAllLanes, is_outside[0] || is_outside[1])) continue;
        for (int j = 0; j < kHalfColumns; ++j) {
          for (int e = 0; e < 2; ++e) {
            const int output = first + 8 * j + 2 * t + e;
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

  __device__ void read_four(int r, int column, int32_t (&four)[4]) const {
    const int4 read = *reinterpret_cast<const int4*>(sums + r * pitch + column);
    four[0] = read.x, four[1] = read.y, four[2] = read.z, four[3] = read.w;
  }
};

// One warp stores `rows` x `outputs` sums, at most 16 x 64: sums[row * pitch + output], in shared
// memory, 16-byte aligned, `pitch` a multiple of 4; of the `rows`, all 64 sums may be read. `group` is
// that of the weight and `first_output` counts in it. row_bits[row] is how many bits of the row of A are
// 1, for ops that count them. Each lane has kLines rows or channels in flight at a time, which hides
// latencies and takes registers. Where signs leave, all taps of the rows must lie in the image.
template <class Op, int kLines>
__device__ inline void store_sums(const typename Op::Params& p, int64_t first_row, int rows,
                                  int group, int64_t first_output, int outputs, const int32_t* sums,
                                  int pitch, const int32_t* row_bits) {
  const Chunk<Op, kLines> chunk{p,     first_row, rows,
                                group, outputs,   group * p.shape.out_channels + first_output,
                                sums,  pitch,     row_bits};
  if constexpr (Op::kHasSigns) {
    if (p.epilogue.threshold) return chunk.store_signs();
  }
  if (p.epilogue.channels_last) return chunk.store_channels_last();
  chunk.store_pixels_last();
}

// The same where signs leave (p.epilogue.threshold) of sums that the lanes hold, with any taps. `bits`
// are those of the rows g and g + 8.
template <class Op>
__device__ inline void store_signs(const typename Op::Params& p, int64_t first_row, int rows,
                                   int group, int64_t first_output, int outputs,
                                   const Fragment& sums, const int32_t (&bits)[2]) {
  const Chunk<Op, 1> chunk{p,       first_row, rows,
                           group,   outputs,   group * p.shape.out_channels + first_output,
                           nullptr, 0,         nullptr};
  chunk.store_signs(sums, bits);
}

}  // namespace nncx::cuda
