// hashed_linear: a linear layer whose weights share few values, found by a hash of their place.
//
//   y[m, o] = activation(bias[o] + sum over k of x[m, k] * v(o, k))
//   v(o, k) = +buckets[h / 2] where h is even, -buckets[h / 2] where it is odd; h = h(seed, o, k)
//
// The weight is in no memory: a path hashes a cache-sized part at a time. hashed_weight writes it
// out; hashed_bucket_sums is the transpose of that, which gradients need.
//
//   sums[b] = sum over (o, k) with h(seed, o, k) / 2 = b of +values[o, k], or - where h is odd
//
// The hash is a contract of the file format: a trained network is worthless under another. Modulo
// 2^64, and 2^32 in hash_place:
//
//   z = output number o of SplitMix64 (Steele et al., 2014) from the state `seed`; a row's two keys
//       are its halves, so that no row is another one shifted
//   x = low(z) + k * 0x9E3779B1
//   x = (x ^ x >> 16) * 0x7FEB352D                 the multipliers of "lowbias32" (Wellons, 2018)
//   x = ((x ^ x >> 15) + high(z)) * 0x846CA68B
//   h = floor(x * places / 2^32),  places = 2 * the number of buckets
//
// The last multiplication, in place of a remainder, has as little bias: a value of h has
// floor(2^32 / places) of the x, or one more, a difference of 1 in 16,384 at 2^17 buckets.
//
// Every path computes the same h, hence the same weights to the bit. Sums over k are float32, in
// the order of k; on CUDA 8 interleaved parts are added in their order. Against the exact sum the
// error is at most K * 2^-23 * sum |x v|. hashed_bucket_sums adds in the order of the rows, the
// same bits on every path.
//
// Input [rows, in_features]: float32 for the paths of the CPU, float16 or bfloat16 too for CUDA.
#pragma once

#include <cstdint>

#include "conv2d.h"
#include "float_epilogue.h"

namespace nncx {

constexpr uint32_t kHashStep = 0x9E3779B1;
constexpr uint32_t kHashMultipliers[] = {0x7FEB352D, 0x846CA68B};

struct HashKeys {  // of a row of the weight
  uint32_t first, second;
};

static constexpr HashKeys hash_keys(uint64_t seed, int64_t o) {
  uint64_t z = seed + (static_cast<uint64_t>(o) + 1) * 0x9E3779B97F4A7C15;
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;
  z = (z ^ z >> 27) * 0x94D049BB133111EB;
  z ^= z >> 31;
  return {static_cast<uint32_t>(z), static_cast<uint32_t>(z >> 32)};
}

static constexpr uint32_t hash_place(HashKeys keys, int64_t k, uint32_t places) {
  uint32_t x = keys.first + static_cast<uint32_t>(k) * kHashStep;
  x = (x ^ x >> 16) * kHashMultipliers[0];
  x = ((x ^ x >> 15) + keys.second) * kHashMultipliers[1];
  return static_cast<uint32_t>(uint64_t{x} * places >> 32);
}

struct HashedWeight {
  const float* buckets;
  uint32_t places;  // 2 * buckets
  uint64_t seed;
  int64_t out_features, in_features;
};

// With the sign of an odd place: without a branch, which half of them would mispredict.
static inline float signed_by(float x, uint32_t place) {
  return bits_to_float(float_to_bits(x) ^ place << 31);
}

static inline float value_at(const HashedWeight& w, uint32_t place) {
  return signed_by(w.buckets[place / 2], place);
}

struct HashedLinearParams {
  HashedWeight weight;
  const void* input;
  Dtype input_dtype;
  int64_t rows;
  FloatEpilogue epilogue;  // output [rows, out_features]
};

constexpr int64_t kHashedBlock = 16;  // outputs

static constexpr int64_t hashed_blocks(const HashedWeight& w) {
  return (w.out_features + kHashedBlock - 1) / kHashedBlock;
}

// Of hashed_linear a tile's pixels are rows, its blocks those of outputs; hashed_weight writes the
// rows [begin, end) of `values` [out_features, in_features]; `sums` are [places / 2].
namespace scalar {
int64_t hashed_linear_scratch_bytes(const HashedLinearParams& params);  // of each call
void hashed_linear(const HashedLinearParams& params, const Conv2dTile& tile, uint8_t* scratch);
void hashed_weight(const HashedWeight& weight, int64_t begin, int64_t end, float* values);
void hashed_bucket_sums(const HashedWeight& weight, const float* values, float* sums);
}  // namespace scalar

namespace avx2 {
int64_t hashed_linear_scratch_bytes(const HashedLinearParams& params);
void hashed_linear(const HashedLinearParams& params, const Conv2dTile& tile, uint8_t* scratch);
void hashed_weight(const HashedWeight& weight, int64_t begin, int64_t end, float* values);
void hashed_bucket_sums(const HashedWeight& weight, const float* values, float* sums);
}  // namespace avx2

// The gather is the limit. With vectors of 16 a Zen 4 took 1.15 to 1.2 times as long.
namespace avx512 {
using avx2::hashed_bucket_sums;
using avx2::hashed_linear;
using avx2::hashed_linear_scratch_bytes;
using avx2::hashed_weight;
}  // namespace avx512

// Enqueues on `stream` (a cudaStream_t) and returns the launch's cudaError_t.
namespace cuda {
int hashed_linear(const HashedLinearParams& params, void* stream);
}

}  // namespace nncx
