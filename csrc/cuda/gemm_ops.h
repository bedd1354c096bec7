// What the GEMM kernels must know of an op: how bytes multiply, and what a sum of products becomes.
//
//   sum = sum over k of A[m, k] * B[o, k]      popcount(a & b) of bits, or the product of int8
//
// A row of A brings a `term`, an output channel an `offset`, the taps that lie outside the image a
// correction; all arithmetic on them is modulo 2^32. Then numbers leave as the op's epilogue says.
#pragma once

#include "binary_conv2d.h"
#include "cuda/convert.h"
#include "cuda/gemm_rows.h"
#include "cuda/gemm_weight.h"
#include "cuda/ptx_sm80.h"
#include "int8_conv2d.h"

namespace nncx::cuda {

// Bits a, b of signs. Over the valid taps V positions are real, and
//   dot = V - 2 popcount(a xor b) = V - 2 popcount(a) - 2 popcount(b) + 4 popcount(a & b)
// since a is 0 outside the image. There pad_value * (2 popcount(b) - channels) is added for each tap.
struct BinaryGemm {
  using Params = BinaryConv2dParams;
  static constexpr bool kCountsBits = true;  // of the rows of A: their terms
  static constexpr bool kHasSigns = true;    // the epilogue may make packed signs

  static constexpr GemmWeight weight(const Conv2dWeightShape& s) { return binary_gemm_weight(s); }

  __device__ static void mma(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    ptx::mma_b1_and(d, a, b);
  }
  __device__ static int32_t add_products(uint32_t a, uint32_t b, int32_t sum) {
    return sum + __popc(a & b);
  }

  static constexpr bool corrects_borders(const Params& p) { return p.pad_value != -1; }

  static constexpr bool term_is_of_image(const Params&) { return false; }
  __device__ static int32_t term(const Params&, int64_t, int32_t bits) { return bits; }

  static constexpr uint32_t offset(const Params& p, int32_t tap_sums) {
    return static_cast<uint32_t>(p.shape.taps * p.shape.channels) -
           2 * static_cast<uint32_t>(tap_sums);
  }

  static constexpr int32_t dot(int32_t sum, int32_t term, uint32_t offset) {
    return static_cast<int32_t>(4 * static_cast<uint32_t>(sum) - 2 * static_cast<uint32_t>(term) +
                                offset);
  }

  // `taps` lie outside; their tap sums add up to `tap_sums`.
  static constexpr int32_t correct(const Params& p, int32_t dot, int32_t, int32_t taps,
                                   int32_t tap_sums) {
    const uint32_t missing = 2 * static_cast<uint32_t>(tap_sums) -
                             static_cast<uint32_t>(p.shape.channels) * static_cast<uint32_t>(taps);
    return static_cast<int32_t>(static_cast<uint32_t>(dot) +
                                static_cast<uint32_t>(1 + p.pad_value) * missing);
  }

  // The offset where `taps` lie outside, whose tap sums add up to `tap_sums`.
  static constexpr uint32_t offset_without(const Params& p, uint32_t offset, int32_t taps,
                                           uint32_t tap_sums) {
    return static_cast<uint32_t>(
        correct(p, static_cast<int32_t>(offset), 0, taps, static_cast<int32_t>(tap_sums)));
  }

  // Of input_scale: for the image n, the pixel in it and the group.
  static constexpr int64_t input_scale_index(const Params& p, const OutputPixel& at,
                                             int64_t group) {
    return (at.n * p.shape.groups + group) * p.epilogue.image + at.in_image;
  }
};

// int8 a, b. The zero point z of the input is subtracted afterwards:
//   sum over valid taps of (a - z) * b = sum - z * (sum of the b there)
struct Int8Gemm {
  using Params = Int8Conv2dParams;
  static constexpr bool kCountsBits = false;
  static constexpr bool kHasSigns = false;

  static constexpr GemmWeight weight(const Conv2dWeightShape& s) { return int8_gemm_weight(s); }

  __device__ static void mma(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    ptx::mma_s8(d, a, b);
  }
  __device__ static int32_t add_products(uint32_t a, uint32_t b, int32_t sum) {
    return __dp4a(static_cast<int>(a), static_cast<int>(b), sum);
  }

  static constexpr bool corrects_borders(const Params& p) { return p.zero_point != nullptr; }

  static constexpr bool term_is_of_image(const Params& p) {
    return p.zero_point != nullptr && p.zero_point_per_image;
  }
  __device__ static int32_t term(const Params& p, int64_t n, int32_t) {
    return zero_point_of(p, n);
  }

  static constexpr uint32_t offset(const Params&, int32_t tap_sums) {
    return static_cast<uint32_t>(tap_sums);
  }

  static constexpr int32_t dot(int32_t sum, int32_t term, uint32_t offset) {
    return static_cast<int32_t>(static_cast<uint32_t>(sum) - static_cast<uint32_t>(term) * offset);
  }

  static constexpr int32_t correct(const Params&, int32_t dot, int32_t term, int32_t,
                                   int32_t tap_sums) {
    return static_cast<int32_t>(static_cast<uint32_t>(dot) +
                                static_cast<uint32_t>(term) * static_cast<uint32_t>(tap_sums));
  }

  static constexpr uint32_t offset_without(const Params&, uint32_t offset, int32_t,
                                           uint32_t tap_sums) {
    return offset - tap_sums;
  }

  static constexpr int64_t input_scale_index(const Params&, const OutputPixel& at, int64_t) {
    return at.n;
  }
};

// The parts of the prepacked weight, and the input as bytes.
template <class Op>
__device__ inline const uint8_t* gemm_rows_of(const typename Op::Params& p) {
  return p.weight + kGemmRowsOffset;
}

template <class Op>
__device__ inline const int32_t* tap_sums_of(const typename Op::Params& p) {
  return reinterpret_cast<const int32_t*>(p.weight + Op::weight(p.shape).sums_offset());
}

template <class Op>
__device__ inline const uint8_t* input_of(const typename Op::Params& p) {
  return reinterpret_cast<const uint8_t*>(p.input);
}

}  // namespace nncx::cuda
