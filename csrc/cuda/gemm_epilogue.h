// The end of every GEMM kernel: sums in shared memory -> output, as binary_epilogue.h and
// int8_epilogue.h say, each operation rounded on its own.
//
// A warp stores a chunk: up to 16 rows (neighbouring output pixels) x 64 outputs of one group. What
// belongs to a row is computed once, by one lane, and shuffled; what belongs to an output channel is
// loaded once. Who takes what depends on the layout of the output:
//
//   channels innermost   16 lanes a row, 4 neighbouring channels each
//   pixels innermost     16 lanes a channel, one row each
//   signs                a lane has the channels `lane` and `lane + 32`, a ballot makes their words,
//                        and a lane of each row writes them
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
  if (wants_position || is_padded || p.epilogue.input_scale || !Op::kCountsBits) {
    const OutputPixel at = output_pixel(p, first_row + r);
    row.n = at.n;
    row.in_image = at.in_image;
    if (p.epilogue.input_scale) {
      row.input_scale = p.epilogue.input_scale[Op::input_scale_index(p, at, group)];
    }
    if (is_padded) {
      const ValidTaps taps(p, at);
      row.is_border = !taps.all(p);
      row.y = taps.y;
      row.x = taps.x;
    }
  }
  row.term = Op::term(p, row.n, Op::kCountsBits ? row_bits[r] : 0);
  return row;
}

// That of row r, to all lanes that ask for it.
__device__ inline ChunkRow shuffle_row(const ChunkRow& row, int r, bool has_border,
                                       bool has_input_scale) {
  ChunkRow result{__shfl_sync(kAllLanes, row.term, r), 1.0f, false, {}, {}, 0, 0};
  if (has_input_scale) result.input_scale = __shfl_sync(kAllLanes, row.input_scale, r);
  if (has_border) {
    result.is_border = __shfl_sync(kAllLanes, static_cast<int>(row.is_border), r) != 0;
    result.y.begin = __shfl_sync(kAllLanes, row.y.begin, r);
    result.y.end = __shfl_sync(kAllLanes, row.y.end, r);
    result.x.begin = __shfl_sync(kAllLanes, row.x.begin, r);
    result.x.end = __shfl_sync(kAllLanes, row.x.end, r);
  }
  return result;
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

  __device__ void finish(const typename Op::Params& p, const ChunkRow& row,
                         int32_t (&sums)[kCount]) const {
    for (int i = 0; i < kCount; ++i) sums[i] = Op::dot(sums[i], row.term, offset_[i]);
    if (row.is_border) correct(p, row, sums);
  }

 private:
  const int32_t* tap_sums_;
  int count_;
  uint32_t offset_[kCount];

  __device__ void correct(const typename Op::Params& p, const ChunkRow& row,
                          int32_t (&sums)[kCount]) const {
    uint32_t outside[kCount] = {};
    int taps = 0;
    const int32_t* line = tap_sums_;
    for (int y = 0; y < p.kernel_h; ++y) {
      for (int x = 0; x < p.kernel_w; ++x, line += p.epilogue.channels) {
        if (row.y.holds(y) && row.x.holds(x)) continue;
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
    constexpr int kCount = 4, kLanes = kChunkOutputs / kCount;
    const auto& e = p.epilogue;
    const auto numbers = numbers_of(e);
    const int lane = threadIdx.x % 32;
    const int column = lane % kLanes * kCount;
    const int count = min(max(outputs - column, 0), kCount);
    const bool is_whole =
        count == kCount && (e.channels | o) % kCount == 0 && numbers.is_aligned_to_four();
    const ChunkRow own = chunk_row<Op>(p, first_row, rows, group, row_bits, false);
    const bool has_border = __any_sync(kAllLanes, own.is_border);
    const ChunkChannels<Op, kCount, 1> channels(p, o + column, count);
    ChannelScale scales[kCount];
    for (int i = 0; i < kCount; ++i) scales[i] = channel_scale(e, o + column + i, i < count);
    int64_t at = (first_row + lane / kLanes) * e.channels + o + column;
    for (int r = lane / kLanes; r - lane / kLanes < rows; r += 32 / kLanes) {
      const ChunkRow row = shuffle_row(own, r, has_border, e.input_scale != nullptr);
      const int4 four = *reinterpret_cast<const int4*>(sums + r * pitch + column);
      int32_t dots[kCount] = {four.x, four.y, four.z, four.w};
      channels.finish(p, row, dots);
      float v[kCount];
      for (int i = 0; i < kCount; ++i) v[i] = scaled(dots[i], scales[i], row.input_scale);
      if (r < rows) {
        if (is_whole) {
          numbers.store_four_of(v, at);
        } else {
          for (int i = 0; i < kCount; ++i) {
            if (i < count) numbers.store(v[i], at + i);
          }
        }
      }
      at += 32 / kLanes * e.channels;
    }
  }

  __device__ void store_pixels_last() const {
    const auto& e = p.epilogue;
    const auto numbers = numbers_of(e);
    const int r = threadIdx.x % kChunkRows;
    const ChunkRow row = chunk_row<Op>(p, first_row, rows, group, row_bits, true);
    if (r >= rows) return;
    for (int column = threadIdx.x % 32 / kChunkRows; column < outputs; column += 32 / kChunkRows) {
      const int64_t channel = o + column;
      int32_t dot[1] = {sums[r * pitch + column]};
      ChunkChannels<Op, 1, 1>(p, channel, 1).finish(p, row, dot);
      numbers.store(scaled(dot[0], channel_scale(e, channel, true), row.input_scale),
                    (row.n * e.channels + channel) * e.image + row.in_image);
    }
  }

  __device__ void store_signs() const {
    const BinaryEpilogue& e = p.epilogue;
    const int lane = threadIdx.x % 32;
    const int count = lane + 32 < outputs ? 2 : lane < outputs ? 1 : 0;
    const ChunkRow own = chunk_row<Op>(p, first_row, rows, group, row_bits, false);
    const bool has_border = __any_sync(kAllLanes, own.is_border);
    const ChunkChannels<Op, 2, 32> channels(p, o + lane, count);
    int32_t threshold[2] = {};
    bool flip[2] = {};
    for (int i = 0; i < 2; ++i) {
      if (i < count) threshold[i] = e.threshold[o + lane + 32 * i];
      if (i < count) flip[i] = e.flip[o + lane + 32 * i];
    }
    uint64_t signs = 0;  // of row `lane`
    for (int r = 0; r < rows; ++r) {
      const ChunkRow row = shuffle_row(own, r, has_border, false);
      int32_t dots[2] = {sums[r * pitch + lane], sums[r * pitch + lane + 32]};
      channels.finish(p, row, dots);
      const bool low = count > 0 && (dots[0] >= threshold[0]) != flip[0];
      const bool high = count > 1 && (dots[1] >= threshold[1]) != flip[1];
      const uint64_t words =
          uint64_t{__ballot_sync(kAllLanes, high)} << 32 | __ballot_sync(kAllLanes, low);
      if (r == lane) signs = words;
    }
    if (lane < rows) write_signs(first_row + lane, signs);
  }

  // The `outputs` signs of a pixel, from channel o on, word by word of the output. A word that has
  // other channels too, which another warp may be writing, is only added to.
  __device__ void write_signs(int64_t pixel, uint64_t signs) const {
    const BinaryEpilogue& e = p.epilogue;
    const int64_t per_group = e.channels / e.out_groups;
    const int64_t group_words = packed_bytes(per_group) / 4;
    auto* words =
        static_cast<uint32_t*>(e.output) + (pixel * e.out_groups + o / per_group) * group_words;
    int64_t channel = o % per_group;
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
// memory, 16-byte aligned, `pitch` a multiple of 4; all 16 x 64 may be read. `group` is that of the
// weight and `first_output` counts in it. row_bits[row] is how many bits of the row of A are 1, for
// ops that count them, else it is not read.
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

}  // namespace nncx::cuda
