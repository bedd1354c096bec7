// The numbers that a lane stores at the end of a GEMM: what an epilogue does with them after scale and
// bias (binary_epilogue.h, int8_epilogue.h), and how they lie in memory.
#pragma once

#include "binary_epilogue.h"
#include "cuda/convert.h"
#include "cuda/numbers.h"
#include "int8_epilogue.h"

namespace nncx::cuda {

// Some lines of neighbours, one or four. Where `whole`, they are four and four divides their indices:
// one access. What depends on the epilogue alone is asked once for all of them.
struct Block {
  int64_t at, step;  // of the first line's first number, and to the next line's
  int lines, count;
  bool whole;
};

__device__ inline void store_four(const float (&v)[4], float* to) {
  *reinterpret_cast<float4*>(to) = make_float4(v[0], v[1], v[2], v[3]);
}
__device__ inline void store_four(const float (&v)[4], Half* to) {
  *reinterpret_cast<uint2*>(to) = make_uint2(half_pair(v[0], v[1]), half_pair(v[2], v[3]));
}
__device__ inline void store_four(const float (&v)[4], BFloat16* to) {
  *reinterpret_cast<uint2*>(to) = make_uint2(bfloat16_pair(v[0], v[1]), bfloat16_pair(v[2], v[3]));
}

template <int kLines, int kCount, class T>
__device__ inline void store_block_as(const float (&v)[kLines][kCount], T* to, const Block& b) {
#pragma unroll
  for (int line = 0; line < kLines; ++line) {
    if (line >= b.lines) break;
    T* const first = to + b.at + line * b.step;
    if constexpr (kCount == 4) {
      if (b.whole) {
        store_four(v[line], first);
        continue;
      }
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (i < b.count) from_float(v[line][i], first + i);
    }
  }
}

template <int kLines, int kCount>
__device__ inline void store_block(const float (&v)[kLines][kCount], Dtype dtype, void* output,
                                   const Block& b) {
  if (dtype == Dtype::float32) {
    store_block_as(v, static_cast<float*>(output), b);
  } else if (dtype == Dtype::float16) {
    store_block_as(v, static_cast<Half*>(output), b);
  } else {
    store_block_as(v, static_cast<BFloat16*>(output), b);
  }
}

__device__ inline void load_four(const float* from, float (&v)[4]) {
  const float4 four = *reinterpret_cast<const float4*>(from);
  v[0] = four.x, v[1] = four.y, v[2] = four.z, v[3] = four.w;
}
template <class T>
__device__ inline void load_four(const T* from, float (&v)[4]) {
  const uint2 four = *reinterpret_cast<const uint2*>(from);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    v[i] = to_float(T{static_cast<uint16_t>((i < 2 ? four.x : four.y) >> 16 * (i % 2))});
  }
}
__device__ inline void load_four(const int8_t* from, float (&v)[4]) {
  const uint32_t four = *reinterpret_cast<const uint32_t*>(from);
#pragma unroll
  for (int i = 0; i < 4; ++i) v[i] = static_cast<int8_t>(four >> 8 * i);
}

__device__ inline float to_float(int8_t x) { return x; }

// v += value(number), number by number.
template <int kLines, int kCount, class T, class Value>
__device__ inline void add_block(float (&v)[kLines][kCount], const T* from, const Block& b,
                                 const Value& value) {
#pragma unroll
  for (int line = 0; line < kLines; ++line) {
    if (line >= b.lines) break;
    const T* const first = from + b.at + line * b.step;
    float add[4] = {};
    if (kCount == 4 && b.whole) {
      load_four(first, add);
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (i < b.count) add[i] = to_float(first[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) v[line][i] += value(add[i]);
  }
}

// run(store), once, for numbers of a format.
template <class Finish, class Run>
__device__ inline void run_with_store_four_as(Dtype dtype, void* output, const Finish& finish,
                                              const Run& run) {
  const auto store_as = [&](auto* to) {
    run([=](const float (&v)[4], int64_t at) {
      const float finished[4] = {finish(v[0]), finish(v[1]), finish(v[2]), finish(v[3])};
      store_four(finished, to + at);
    });
  };
  if (dtype == Dtype::float32) {
    store_as(static_cast<float*>(output));
  } else if (dtype == Dtype::float16) {
    store_as(static_cast<Half*>(output));
  } else {
    store_as(static_cast<BFloat16*>(output));
  }
}

// What is the op's own, after scale and bias.
class BinaryNumbers {
 public:
  __device__ explicit BinaryNumbers(const BinaryEpilogue& e) : e_(e) {}

  __device__ bool is_aligned_to_four() const { return is_aligned(e_.output, bytes_of(e_.dtype)); }

  template <int kLines, int kCount>
  __device__ void store(float (&v)[kLines][kCount], const Block& b) const {
    store_block(v, e_.dtype, e_.output, b);
  }

  // Calls run(store), once, where store(v, at) stores four neighbours at an index that four divides;
  // false where they are not stored as simply as that.
  template <class Run>
  __device__ bool run_with_store_four(const Run& run) const {
    run_with_store_four_as(e_.dtype, e_.output, [](float v) { return v; }, run);
    return true;
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

  template <int kLines, int kCount>
  __device__ void store(float (&v)[kLines][kCount], const Block& b) const {
    if (e_.residual) add_residual(v, b);
    if (e_.activation != Activation::none) {
#pragma unroll
      for (int line = 0; line < kLines; ++line) {
#pragma unroll
        for (float& number : v[line]) number = activate(e_.activation, number);
      }
    }
    if (e_.output_is_int8) {
      store_quantized(v, b);
    } else {
      store_block(v, e_.dtype, e_.output, b);
    }
  }

  template <class Run>
  __device__ bool run_with_store_four(const Run& run) const {
    if (e_.residual) return false;
    const auto finish = [this](float v) {
      return e_.activation == Activation::none ? v : activate(e_.activation, v);
    };
    if (e_.output_is_int8) {
      run([&](const float (&v)[4], int64_t at) {
        const float finished[4] = {finish(v[0]), finish(v[1]), finish(v[2]), finish(v[3])};
        *reinterpret_cast<uint32_t*>(static_cast<int8_t*>(e_.output) + at) = quantized(finished);
      });
    } else {
      run_with_store_four_as(e_.dtype, e_.output, finish, run);
    }
    return true;
  }

 private:
  const Int8Epilogue& e_;
  const Int8Scalars scalars_;

  template <int kLines, int kCount>
  __device__ void add_residual(float (&v)[kLines][kCount], const Block& b) const {
    const auto same = [](float x) { return x; };
    if (e_.residual_is_int8) {
      add_block(v, static_cast<const int8_t*>(e_.residual), b, [&](float q) {
        return (q - static_cast<float>(scalars_.residual_zero_point)) * scalars_.residual_scale;
      });
    } else if (e_.residual_dtype == Dtype::float32) {
      add_block(v, static_cast<const float*>(e_.residual), b, same);
    } else if (e_.residual_dtype == Dtype::float16) {
      add_block(v, static_cast<const Half*>(e_.residual), b, same);
    } else {
      add_block(v, static_cast<const BFloat16*>(e_.residual), b, same);
    }
  }

  template <int kCount>
  __device__ uint32_t quantized(const float (&v)[kCount]) const {
    uint32_t word = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float rounded = rintf(v[i] * scalars_.quantizer.inverse_scale);
      const auto q = static_cast<uint8_t>(quantize_rounded(scalars_.quantizer, rounded));
      word |= uint32_t{q} << 8 * i;
    }
    return word;
  }

  template <int kLines, int kCount>
  __device__ void store_quantized(const float (&v)[kLines][kCount], const Block& b) const {
#pragma unroll
    for (int line = 0; line < kLines; ++line) {
      if (line >= b.lines) break;
      auto* const first = static_cast<int8_t*>(e_.output) + b.at + line * b.step;
      const uint32_t word = quantized(v[line]);
      if (kCount == 4 && b.whole) {
        *reinterpret_cast<uint32_t*>(first) = word;
      } else {
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          if (i < b.count) first[i] = static_cast<int8_t>(word >> 8 * i);
        }
      }
    }
  }
};

__device__ inline BinaryNumbers numbers_of(const BinaryEpilogue& e) { return BinaryNumbers(e); }
__device__ inline Int8Numbers numbers_of(const Int8Epilogue& e) { return Int8Numbers(e); }

}  // namespace nncx::cuda
