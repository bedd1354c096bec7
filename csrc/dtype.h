// Number formats at the boundary of the ops, as plain bits: the arithmetic knows no framework.
//
// Every function is `static`, so that the copy compiled with one path's flags is never the
// one another path calls.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

namespace nncx {

enum class Dtype { float32, float16, bfloat16, float64 };

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

static inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

static inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// The sign of this project: 1 for x >= 0 (0 and -0 included), 0 for x < 0 and for NaN.
static constexpr bool is_positive(float x) { return x >= 0; }
static constexpr bool is_positive(double x) { return x >= 0; }
static constexpr bool is_positive(Half x) { return x.bits <= 0x7C00 || x.bits == 0x8000; }
static constexpr bool is_positive(BFloat16 x) {
  return std::bit_cast<float>(uint32_t{x.bits} << 16) >=
         0;  // as torch, also where subnormals are 0
}

// Round to nearest, ties to even; NaN stays NaN, with the payload that the hardware keeps.
static inline void store_float(float x, float* out) { *out = x; }

static inline void store_float(float x, BFloat16* out) {
  const uint32_t bits = float_to_bits(x);
  const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  out->bits = static_cast<uint16_t>(x != x ? (bits >> 16) | 0x40 : rounded);
}

static inline void store_float(float x, Half* out) {
  const uint32_t bits = float_to_bits(x);
  const uint32_t sign = (bits >> 16) & 0x8000;
  const uint32_t magnitude = bits & 0x7FFFFFFF;
  uint32_t half;
  if (magnitude >= 0x47800000) {  // 65536 and above, infinity, NaN
    half = magnitude > 0x7F800000 ? 0x7E00 | (magnitude >> 13 & 0x3FF) : 0x7C00;
  } else if (magnitude < 0x38800000) {  // subnormal: the float adder does the rounding
    half = float_to_bits(bits_to_float(magnitude) + 0.5f) - float_to_bits(0.5f);
  } else {
    half = (magnitude - 0x38000000 + 0xFFF + ((magnitude >> 13) & 1)) >> 13;
  }
  out->bits = static_cast<uint16_t>(sign | half);
}

// As element `at` of an output of that format.
static inline void store_float(float x, Dtype dtype, void* output, int64_t at) {
  switch (dtype) {
    case Dtype::float32:
      return store_float(x, static_cast<float*>(output) + at);
    case Dtype::float16:
      return store_float(x, static_cast<Half*>(output) + at);
    case Dtype::bfloat16:
      return store_float(x, static_cast<BFloat16*>(output) + at);
    case Dtype::float64:
      return;  // out_dtype is never that: the ops refuse it
  }
}

static inline float load_float(float x) { return x; }

static inline float load_float(BFloat16 x) { return bits_to_float(uint32_t{x.bits} << 16); }

static inline float load_float(Half x) {
  const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16;
  const uint32_t magnitude = x.bits & 0x7FFF;
  uint32_t bits;
  if (magnitude >= 0x7C00) {  // infinity, NaN
    bits = 0x7F800000 | magnitude << 13;
  } else if (magnitude < 0x0400) {  // subnormal: the float subtraction normalises
    bits = float_to_bits(bits_to_float(0x38800000 | magnitude << 13) - bits_to_float(0x38800000));
  } else {
    bits = (magnitude << 13) + 0x38000000;
  }
  return bits_to_float(sign | bits);
}

// Element `at` of an input of that format.
static inline float load_float(const void* input, Dtype dtype, int64_t at) {
  switch (dtype) {
    case Dtype::float32:
      return static_cast<const float*>(input)[at];
    case Dtype::float16:
      return load_float(static_cast<const Half*>(input)[at]);
    case Dtype::bfloat16:
      return load_float(static_cast<const BFloat16*>(input)[at]);
    case Dtype::float64:
      return 0;  // the ops that load refuse it
  }
  return 0;
}

}  // namespace nncx
