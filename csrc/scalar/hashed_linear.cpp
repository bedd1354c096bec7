// One row of the weight at a time is hashed and meets all rows of the tile.
#include "hashed_linear.h"

#include <algorithm>

namespace nncx::scalar {
namespace {

void hash_row(const HashedWeight& w, int64_t o, float* values) {
  const HashKeys keys = hash_keys(w.seed, o);
  for (int64_t k = 0; k < w.in_features; ++k) {
    values[k] = value_at(w, hash_place(keys, k, w.places));
  }
}

}  // namespace

int64_t hashed_linear_scratch_bytes(const HashedLinearParams& p) {
  return p.weight.in_features * static_cast<int64_t>(sizeof(float));
}

void hashed_linear(const HashedLinearParams& p, const Conv2dTile& tile, uint8_t* scratch) {
  const HashedWeight& w = p.weight;
  float* values = reinterpret_cast<float*>(scratch);
  const int64_t end = std::min(tile.block_end * kHashedBlock, w.out_features);
  for (int64_t o = tile.block_begin * kHashedBlock; o < end; ++o) {
    hash_row(w, o, values);
    for (int64_t row = tile.pixel_begin; row < tile.pixel_end; ++row) {
      const float* x = static_cast<const float*>(p.input) + row * w.in_features;
      float sum = 0;
      for (int64_t k = 0; k < w.in_features; ++k) sum += x[k] * values[k];
      const FloatEpilogue& e = p.epilogue;
      store_float(finish(e, sum, o), e.dtype, e.output, row * e.stride_n + o);
    }
  }
}

void hashed_weight(const HashedWeight& w, int64_t begin, int64_t end, float* values) {
  for (int64_t o = begin; o < end; ++o) hash_row(w, o, values + o * w.in_features);
}

void hashed_bucket_sums(const HashedWeight& w, const float* values, float* sums) {
  std::fill_n(sums, w.places / 2, 0.0f);
  for (int64_t o = 0; o < w.out_features; ++o, values += w.in_features) {
    const HashKeys keys = hash_keys(w.seed, o);
    for (int64_t k = 0; k < w.in_features; ++k) {
      const uint32_t place = hash_place(keys, k, w.places);
      sums[place / 2] += signed_by(values[k], place);
    }
  }
}

}  // namespace nncx::scalar
