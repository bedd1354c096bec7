// The end of the sm_90a kernel's tiles: sums in the registers of a warpgroup -> output, as
// binary_epilogue.h and int8_epilogue.h say, each operation rounded on its own.
//
// What belongs to an output channel waits in shared memory (ChannelTable), also what the taps outside
// the image make of it: a line for each class of pixels (BorderClasses). So an inner pixel and one at
// the border take the same steps. A warp has 16 rows of the tile; their sums leave
//
//   as numbers   straight from the registers, where four neighbours of a row are one access; else
//                through shared memory, 32 outputs at a time
//   as signs     straight from the registers, 64 outputs at a time: four lanes put together the words
//                of a row
#pragma once

#include "cuda/gemm_epilogue.h"
#include "cuda/gemm_sm90_plan.h"

namespace nncx::cuda {

// Lines of kOutputs numbers in shared memory. Where numbers leave: scales, biases, then offsets of
// each class. Where signs leave: flips (a bit for each output), an unused line, then the bounds.
template <class Op, int kOutputs>
class ChannelTable {
 public:
  using Params = typename Op::Params;

  __device__ ChannelTable(int32_t* memory, const Sm90Borders& borders)
      : memory_(memory), borders_(borders) {}

  // Of the output channels from `first` on, of which `outputs` exist, by `threads` threads that all
  // take part.
  __device__ void fill(const Params& p, int64_t first, int outputs, int thread, int threads) const {
    const bool has_signs = leaves_signs(p);
    if (has_signs) {
      fill_flips(p, first, outputs, thread);
    } else if (thread < kOutputs) {
      const ChannelScale of = channel_scale(p.epilogue, first + thread, thread < outputs);
      reinterpret_cast<float*>(memory_)[thread] = of.scale;
      reinterpret_cast<float*>(memory_)[kOutputs + thread] = of.bias;
    }
    for (int i = thread; i < borders_.classes() * kOutputs; i += threads) {
      const int output = i % kOutputs;
      int32_t value = has_signs ? INT32_MAX : 0;  // which no sum reaches
      if (output < outputs) {
        const uint32_t offset = offset_of(p, i / kOutputs, first + output);
        value = has_signs ? bound_of(p, first + output, offset) : static_cast<int32_t>(offset);
      }
      memory_[2 * kOutputs + i] = value;
    }
  }

  __device__ const float* scales() const { return reinterpret_cast<const float*>(memory_); }
  __device__ const float* biases() const { return scales() + kOutputs; }
  __device__ uint32_t flips(int word) const { return static_cast<uint32_t>(memory_[word]); }
  __device__ const int32_t* line(int pixel_class) const {
    return memory_ + (2 + pixel_class) * kOutputs;
  }

  __device__ static bool leaves_signs(const Params& p) {
    if constexpr (Op::kHasSigns) return p.epilogue.threshold != nullptr;
    return false;
  }

 private:
  int32_t* const memory_;
  const Sm90Borders& borders_;

  __device__ void fill_flips(const Params& p, int64_t first, int outputs, int thread) const {
    if constexpr (Op::kHasSigns) {
      if (thread >= kOutputs) return;  // whole warps
      const uint32_t flips =
          __ballot_sync(kAllLanes, thread < outputs && p.epilogue.flip[first + thread]);
      if (thread % 32 == 0) memory_[thread / 32] = static_cast<int32_t>(flips);
    }
  }

  // Of a channel, for pixels of a class.
  __device__ uint32_t offset_of(const Params& p, int pixel_class, int64_t o) const {
    const int32_t* tap_sums = tap_sums_of<Op>(p) + o;
    const int64_t channels = p.epilogue.channels;
    const uint32_t all = Op::offset(p, tap_sums[p.shape.taps * channels]);
    if ((p.padding_h | p.padding_w) == 0 || !Op::corrects_borders(p)) return all;
    const OutputPixel pixel = borders_.pixel(p, pixel_class);
    const TapRange inside_y = valid_taps_y(p, pixel), inside_x = valid_taps_x(p, pixel);
    uint32_t outside = 0;
    int taps = 0;
    for (int y = 0; y < p.kernel_h; ++y) {
      for (int x = 0; x < p.kernel_w; ++x, tap_sums += channels) {
        if (inside_y.holds(y) && inside_x.holds(x)) continue;
        outside += static_cast<uint32_t>(*tap_sums);
        ++taps;
      }
    }
    return Op::offset_without(p, all, taps, outside);
  }

  // From which value of dot(sum, term, 0) on the sign is set, before the flips.
  __device__ static int32_t bound_of(const Params& p, int64_t o, uint32_t offset) {
    if constexpr (Op::kHasSigns) {
      const int64_t bound = int64_t{p.epilogue.threshold[o]} - static_cast<int32_t>(offset);
      return static_cast<int32_t>(min(max(bound, int64_t{INT32_MIN}), int64_t{INT32_MAX}));
    }
    return 0;
  }
};

// A warp's 16 rows of a tile. `scratch` is its own part of shared memory.
template <class Op, int kOutputs>
class TileEnd {
 public:
  using Params = typename Op::Params;
  using Table = ChannelTable<Op, kOutputs>;
  using Sums = int32_t[kOutputs / 2];  // as wgmma holds them: [8 columns each][4], gemm_epilogue.h

  // Of `rows` rows from first_row on (at least one) and the channels from o on, of which `outputs`
  // exist. row_bits: of ops that count them.
  __device__ TileEnd(const Params& p, const Table& table, const Sm90Borders& borders,
                     int64_t first_row, int rows, int group, int64_t o, int outputs,
                     int32_t* scratch, const int32_t* row_bits)
      : p_(p),
        table_(table),
        first_row_(first_row),
        rows_(rows),
        o_(o),
        outputs_(outputs),
        scratch_(scratch) {
    const int r = min(lane() % kChunkRows, rows - 1);
    const bool has_classes = borders.classes() > 1;
    const bool wants_position = !p.epilogue.channels_last && !Table::leaves_signs(p);
    if (has_classes || wants_position || p.epilogue.input_scale || Op::term_is_of_image(p)) {
      const OutputPixel at = output_pixel(p, first_row + r);
      n_ = at.n;
      in_image_ = at.in_image;
      if (has_classes) class_ = borders.class_of(p, at);
      if (p.epilogue.input_scale) {
        input_scale_ = p.epilogue.input_scale[Op::input_scale_index(p, at, group)];
      }
    }
    term_ = Op::term(p, n_, Op::kCountsBits ? row_bits[r] : 0);
  }

  __device__ void store(const Sums& sums) const {
    if constexpr (Op::kHasSigns) {
      if (Table::leaves_signs(p_)) return store_signs(sums);
    }
    if (!p_.epilogue.channels_last) return store_pixels_last(sums);
    const auto numbers = numbers_of(p_.epilogue);
    const bool fours =
        (p_.epilogue.channels | o_ | outputs_) % 4 == 0 && numbers.is_aligned_to_four() &&
        numbers.run_with_store_four([&](const auto& store) { store_fours(sums, store); });
    if (!fours) store_channels_last(sums);
  }

 private:
  static constexpr int kPart =
      kSm90ScratchOutputs;  // outputs that pass through shared memory at a time
  static constexpr int kPitch = kSm90ScratchPitch;

  const Params& p_;
  const Table& table_;
  const int64_t first_row_;
  const int rows_;
  const int64_t o_;
  const int outputs_;
  int32_t* const scratch_;
  // Of the row `lane % 16`; beyond the last one those of the last.
  int64_t n_ = 0, in_image_ = 0;
  int32_t term_;
  int class_ = 0;
  float input_scale_ = 1.0f;

  __device__ static int lane() { return static_cast<int>(threadIdx.x) % 32; }

  // Of rows g and g + 8 a lane has two neighbours in each column of eight. Two columns at a time,
  // lanes next to each other give each other one of them, and have four neighbours in the other.
  template <class Store>
  __device__ void store_fours(const Sums& sums, const Store& store) const {
    const int g = lane() / 4, t = lane() % 4;
    const bool is_odd = t % 2 != 0;
    const int column = t / 2 * 4 + (is_odd ? 8 : 0);
    int32_t terms[2];
    const int32_t* offsets[2];
    float input_scales[2];
    int64_t at[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int r = g + 8 * h;
      terms[h] = __shfl_sync(kAllLanes, term_, r);
      offsets[h] = table_.line(__shfl_sync(kAllLanes, class_, r)) + column;
      input_scales[h] = __shfl_sync(kAllLanes, input_scale_, r);
      at[h] = (first_row_ + r) * p_.epilogue.channels + o_ + column;
    }
#pragma unroll
    for (int first = 0; first < kOutputs; first += 16) {
      if (first >= outputs_) break;
      float scale[4], bias[4];
      read_four(table_.scales() + first + column, scale);
      read_four(table_.biases() + first + column, bias);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        int32_t sum[4], offset[4];
        exchange(sums + first / 8 * 4 + 2 * h, is_odd, sum);
        read_four(offsets[h] + first, offset);
        float v[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int32_t dot = Op::dot(sum[i], terms[h], static_cast<uint32_t>(offset[i]));
          v[i] = static_cast<float>(dot) * scale[i] * input_scales[h] + bias[i];
        }
        if (g + 8 * h < rows_ && first + column < outputs_) store(v, at[h] + first);
      }
    }
  }

  // pair[0], pair[1] in one column, pair[4], pair[5] in the next.
  __device__ static void exchange(const int32_t* pair, bool is_odd, int32_t (&four)[4]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int32_t kept = is_odd ? pair[4 + i] : pair[i];
      const int32_t got = __shfl_xor_sync(kAllLanes, is_odd ? pair[i] : pair[4 + i], 1);
      four[i] = is_odd ? got : kept;
      four[2 + i] = is_odd ? kept : got;
    }
  }

  // Four neighbouring channels of four rows for each lane.
  __device__ void store_channels_last(const Sums& sums) const {
    constexpr int kCount = 4, kLanes = kPart / kCount, kAtOnce = 32 / kLanes;
    constexpr int kLines = kChunkRows / kAtOnce;
    const auto& e = p_.epilogue;
    const auto numbers = numbers_of(e);
    const int column = lane() % kLanes * kCount, row = lane() / kLanes;
    int32_t terms[kLines];
    const int32_t* offsets[kLines];
    float input_scales[kLines];
#pragma unroll
    for (int line = 0; line < kLines; ++line) {
      const int r = row + line * kAtOnce;
      terms[line] = __shfl_sync(kAllLanes, term_, r);
      offsets[line] = table_.line(__shfl_sync(kAllLanes, class_, r)) + column;
      input_scales[line] = __shfl_sync(kAllLanes, input_scale_, r);
    }
    const bool divides = (e.channels | o_) % kCount == 0 && numbers.is_aligned_to_four();
    Block block{(first_row_ + row) * e.channels + o_ + column, kAtOnce * e.channels,
                (rows_ - row + kAtOnce - 1) / kAtOnce, 0, false};
#pragma unroll 1
    for (int first = 0; first < outputs_; first += kPart, block.at += kPart) {
      put_part(first / kPart, sums);
      float scale[kCount], bias[kCount];
      read_four(table_.scales() + first + column, scale);
      read_four(table_.biases() + first + column, bias);
      float v[kLines][kCount];
#pragma unroll
      for (int line = 0; line < kLines; ++line) {
        int32_t sum[kCount], offset[kCount];
        read_four(scratch_ + (row + line * kAtOnce) * kPitch + column, sum);
        read_four(offsets[line] + first, offset);
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          const int32_t dot = Op::dot(sum[i], terms[line], static_cast<uint32_t>(offset[i]));
          v[line][i] = static_cast<float>(dot) * scale[i] * input_scales[line] + bias[i];
        }
      }
      block.count = min(max(outputs_ - first - column, 0), kCount);
      block.whole = divides && block.count == kCount;
      numbers.store(v, block);
    }
  }

  // A row for each lane, and every other channel.
  __device__ void store_pixels_last(const Sums& sums) const {
    constexpr int kLines = 4, kAtOnce = 32 / kChunkRows;
    const auto& e = p_.epilogue;
    const auto numbers = numbers_of(e);
    const int r = lane() % kChunkRows;
    const int32_t* const offsets = table_.line(class_);
#pragma unroll 1
    for (int first = 0; first < outputs_; first += kPart) {
      put_part(first / kPart, sums);
      const int count = min(outputs_ - first, kPart);
#pragma unroll 1
      for (int column = lane() / kChunkRows; column < count; column += kLines * kAtOnce) {
        float v[kLines][1];
#pragma unroll
        for (int line = 0; line < kLines; ++line) {
          const int at = min(column + line * kAtOnce, kPart - 1);
          const int32_t dot =
              Op::dot(scratch_[r * kPitch + at], term_, static_cast<uint32_t>(offsets[first + at]));
          v[line][0] = static_cast<float>(dot) * table_.scales()[first + at] * input_scale_ +
                       table_.biases()[first + at];
        }
        const int lines = r < rows_ ? (count - column + kAtOnce - 1) / kAtOnce : 0;
        numbers.store(v, Block{(n_ * e.channels + o_ + first + column) * e.image + in_image_,
                               kAtOnce * e.image, lines, 1, false});
      }
    }
  }

  __device__ void store_signs(const Sums& sums) const {
    const int g = lane() / 4, t = lane() % 4;
    const int32_t* bounds[2];
    int32_t bits[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      bounds[h] = table_.line(__shfl_sync(kAllLanes, class_, g + 8 * h)) + 2 * t;
      bits[h] = __shfl_sync(kAllLanes, term_, g + 8 * h);
    }
    const int r = g + 8 * t;
#pragma unroll
    for (int first = 0; first < kOutputs; first += kChunkOutputs) {
      if (first >= outputs_) break;
      uint32_t words[2][2];  // [row g or g + 8][low or high]
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int column = first + half * 32;
          const uint32_t flips = table_.flips(column / 32);
          words[h][half] = word_of(sums, column, h, bits[h], bounds[h]) ^ flips;
        }
      }
      if (t < 2 && r < rows_) {
        write_signs(p_.epilogue, o_ + first, min(outputs_ - first, kChunkOutputs), first_row_ + r,
                    t == 0 ? words[0][0] : words[1][0], t == 0 ? words[0][1] : words[1][1]);
      }
    }
  }

  // The signs of 32 outputs of row g + 8 * h, before the flips, for the four lanes that hold it.
  __device__ static uint32_t word_of(const Sums& sums, int column, int h, int32_t bits,
                                     const int32_t* bounds) {
    uint32_t word = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int2 bound = *reinterpret_cast<const int2*>(bounds + column + 8 * j);
      const int32_t* pair = sums + (column / 8 + j) * 4 + 2 * h;
      if (Op::dot(pair[0], bits, 0) >= bound.x) word |= 1u << 8 * j;
      if (Op::dot(pair[1], bits, 0) >= bound.y) word |= 2u << 8 * j;
    }
    word <<= 2 * (lane() % 4);
    word |= __shfl_xor_sync(kAllLanes, word, 1);
    return word | __shfl_xor_sync(kAllLanes, word, 2);
  }

  // Registers have no run-time index: the part that is asked for is one of those known here.
  __device__ void put_part(int wanted, const Sums& sums) const {
    int32_t* to = scratch_ + lane() / 4 * kPitch + lane() % 4 * 2;
    __syncwarp();
#pragma unroll
    for (int part = 0; part < kOutputs / kPart; ++part) {
      if (part != wanted) continue;
#pragma unroll
      for (int j = 0; j < kPart / 8; ++j) {
        const int32_t* four = sums + (part * kPart / 8 + j) * 4;
        *reinterpret_cast<int2*>(to + j * 8) = make_int2(four[0], four[1]);
        *reinterpret_cast<int2*>(to + j * 8 + 8 * kPitch) = make_int2(four[2], four[3]);
      }
    }
    __syncwarp();
  }

  __device__ static void read_four(const int32_t* from, int32_t (&to)[4]) {
    const int4 four = *reinterpret_cast<const int4*>(from);
    to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
  }
  __device__ static void read_four(const float* from, float (&to)[4]) { load_four(from, to); }
};

}  // namespace nncx::cuda
