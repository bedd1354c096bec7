// Stand-in for csrc/cuda/tensor_map.h: a TensorMap holds the arguments that it was made from.
//
// The rules are those of cuTensorMapEncodeTiled and cuTensorMapEncodeIm2col in cuda.h, for bytes as
// elements; breaking one returns CUDA_ERROR_INVALID_VALUE as the driver would.
#pragma once

#include <cstdint>
#include <cstring>

#include "cuda/tensor_boxes.h"

namespace nncx::cuda {

struct alignas(64) TensorMap {
  uint8_t bytes[128];
};

// What the 128 bytes are in the emulator.
struct EncodedMap {
  enum Kind : uint64_t { tiled = 0x7469'6c65'6421, im2col = 0x696d'3263'6f6c } kind;
  union {
    TiledMap tiles;
    Im2colMap images;
  };
};
static_assert(sizeof(EncodedMap) <= sizeof(TensorMap));

namespace map_rules {

inline bool address(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }
inline bool size(uint64_t n) { return 1 <= n && n <= uint64_t{1} << 32; }
inline bool stride(uint64_t bytes) { return bytes % 16 == 0 && bytes < uint64_t{1} << 40; }
inline bool corner(int at) { return -128 <= at && at <= 127; }
inline bool step(uint32_t n) { return 1 <= n && n <= 8; }
inline bool swizzle(uint32_t bytes, uint32_t inner) {
  return bytes == 0 || ((bytes == 32 || bytes == 64 || bytes == 128) && inner <= bytes);
}

}  // namespace map_rules

inline int encode(TensorMap& map, const EncodedMap& encoded, bool valid) {
  if (!valid || reinterpret_cast<uintptr_t>(&map) % 64 != 0) return 1;
  std::memcpy(map.bytes, &encoded, sizeof encoded);
  return 0;
}

inline int encode_tiled(TensorMap& map, const TiledMap& m) {
  using namespace map_rules;
  const bool valid = address(m.address) && size(m.width) && size(m.height) &&
                     stride(m.row_stride) && m.row_stride >= m.width && m.box_width % 16 == 0 &&
                     1 <= m.box_width && m.box_width <= 256 && 1 <= m.box_height &&
                     m.box_height <= 256 && swizzle(m.swizzle, m.box_width);
  return encode(map, {EncodedMap::tiled, {.tiles = m}}, valid);
}

inline int encode_im2col(TensorMap& map, const Im2colMap& m) {
  using namespace map_rules;
  const auto box = [](uint64_t size, int lower, int upper) {
    return static_cast<int64_t>(size) + upper - lower > 0;
  };
  const bool valid = address(m.address) && size(m.channels) && size(m.width) && size(m.height) &&
                     size(m.batch) && stride(m.stride_w) && stride(m.stride_h) &&
                     stride(m.stride_n) && corner(m.lower_w) && corner(m.lower_h) &&
                     corner(m.upper_w) && corner(m.upper_h) && box(m.width, m.lower_w, m.upper_w) &&
                     box(m.height, m.lower_h, m.upper_h) && 1 <= m.channels_per_pixel &&
                     m.channels_per_pixel <= 256 && m.channels_per_pixel % 16 == 0 &&
                     1 <= m.pixels_per_column && m.pixels_per_column <= 1024 && step(m.step_w) &&
                     step(m.step_h) && swizzle(m.swizzle, m.channels_per_pixel);
  return encode(map, {EncodedMap::im2col, {.images = m}}, valid);
}

}  // namespace nncx::cuda
