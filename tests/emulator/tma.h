// TMA: copies of boxes of a tensor into shared memory.
//
// A box lands at once or, as likely, when no thread can run; then its bytes arrive at the barrier.
// Errors: a barrier that the asynchronous proxy was not told of (barrier_fence_init); a TensorMap of the
// other kind; addresses that are not aligned; a block that ends before its boxes have landed.
// Not modelled: stores, clusters, boxes narrower than their swizzle.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "async_proxy.h"
#include "cuda/tensor_map.h"
#include "mbarrier.h"
#include "swizzle.h"

namespace nncx::cuda::ptx {

// Where a box of rows of `width` bytes goes, row by row.
class BoxWriter {
 public:
  BoxWriter(uint8_t* shared, uint32_t width, uint32_t swizzle, Place where)
      : start_(shared_address(shared)), width_(width), swizzle_(swizzle), where_(where) {}

  // Byte `at` of row `row`, 16 at a time; null: outside the tensor, which reads as zeros.
  void write(uint32_t row, uint32_t at, const uint8_t* from, size_t available) {
    uint8_t chunk[16] = {};
    if (from != nullptr) std::memcpy(chunk, from, std::min<size_t>(available, 16));
    uint8_t* to = shared_pointer(swizzled(start_ + row * width_ + at, swizzle_));
    emulator::require(async_view().agrees(to, 16),
                      "TMA writes where ordinary stores were not fenced with fence_async", where_);
    async_view().write(to, chunk, 16);
  }

 private:
  uint64_t start_;
  uint32_t width_, swizzle_;
  Place where_;
};

inline void land(uint8_t* shared, const TiledMap& map, int64_t x, int64_t y, Place where) {
  BoxWriter writer(shared, map.box_width, map.swizzle, where);
  for (uint32_t row = 0; row < map.box_height; ++row) {
    for (uint32_t at = 0; at < map.box_width; at += 16) {
      const int64_t left = static_cast<int64_t>(map.width) - (x + at);
      const bool inside =
          y + row >= 0 && y + row < static_cast<int64_t>(map.height) && x + at >= 0 && left > 0;
      const auto* from = static_cast<const uint8_t*>(map.address) + (y + row) * map.row_stride;
      writer.write(row, at, inside ? from + x + at : nullptr, inside ? left : 0);
    }
  }
}

// A filter's position in the tensor, and its step to the next one: w fastest, then h, then n.
struct FilterBase {
  int64_t w, h, n;
  void advance(const Im2colMap& map) {
    w += map.step_w;
    if (w < static_cast<int64_t>(map.width) + map.upper_w) return;
    w = map.lower_w;
    h += map.step_h;
    if (h < static_cast<int64_t>(map.height) + map.upper_h) return;
    h = map.lower_h;
    ++n;
  }
  bool inside(const Im2colMap& map) const {
    return map.lower_w <= w && w < static_cast<int64_t>(map.width) + map.upper_w &&
           map.lower_h <= h && h < static_cast<int64_t>(map.height) + map.upper_h;
  }
};

inline void land(uint8_t* shared, const Im2colMap& map, int64_t c, FilterBase base, int offset_w,
                 int offset_h, Place where) {
  BoxWriter writer(shared, map.channels_per_pixel, map.swizzle, where);
  for (uint32_t row = 0; row < map.pixels_per_column; ++row, base.advance(map)) {
    const int64_t w = base.w + offset_w, h = base.h + offset_h;
    const bool pixel = 0 <= w && w < static_cast<int64_t>(map.width) && 0 <= h &&
                       h < static_cast<int64_t>(map.height) && 0 <= base.n &&
                       base.n < static_cast<int64_t>(map.batch);
    const auto* from = static_cast<const uint8_t*>(map.address) + w * map.stride_w +
                       h * map.stride_h + base.n * map.stride_n;
    for (uint32_t at = 0; at < map.channels_per_pixel; at += 16) {
      const int64_t left = static_cast<int64_t>(map.channels) - (c + at);
      const bool inside = pixel && c + at >= 0 && left > 0;
      writer.write(row, at, inside ? from + c + at : nullptr, inside ? left : 0);
    }
  }
}

// Checks what all loads have in common and starts `land`.
template <class Land>
void start_load(void* shared, Barrier* barrier, uint32_t width, uint32_t rows, uint32_t swizzle,
                const Land& land, Place where) {
  emulator::require(compiled_for(90), "TMA needs code compiled for 9.0a", where);
  emulator::require_shared(shared, size_t{width} * rows, 128, where);
  emulator::require_dynamic(shared, "TMA", where);
  emulator::require(swizzle == 0 || swizzle == width,
                    "the emulator knows swizzled boxes only as wide as the swizzle", where);
  emulator::require(barrier_state(barrier, where).fenced,
                    "TMA needs an mbarrier made visible with barrier_fence_init", where);
  const auto land_and_complete = [=, bytes = static_cast<int>(width * rows)] {
    land();
    complete_bytes(barrier, bytes, where);
  };
  if (emulator::early()) return land_and_complete();
  emulator::later(land_and_complete, "a TMA load", where);
}

inline EncodedMap decode(const TensorMap* map, EncodedMap::Kind kind, Place where) {
  EncodedMap encoded;
  std::memcpy(&encoded, map->bytes, sizeof encoded);
  emulator::require(encoded.kind == kind, "the TensorMap must be of the load's kind", where);
  emulator::require(reinterpret_cast<uintptr_t>(map) % 64 == 0, "a TensorMap must be aligned to 64",
                    where);
  return encoded;
}

inline void tma_load_2d(void* shared, const TensorMap* map, Barrier* barrier, int x, int y,
                        NNCX_PLACE) {
  const TiledMap tiles = decode(map, EncodedMap::tiled, where).tiles;
  const auto run = [=] { land(static_cast<uint8_t*>(shared), tiles, x, y, where); };
  start_load(shared, barrier, tiles.box_width, tiles.box_height, tiles.swizzle, run, where);
}

inline void tma_load_im2col(void* shared, const TensorMap* map, Barrier* barrier, int c, int w,
                            int h, int n, uint16_t offset_w, uint16_t offset_h, NNCX_PLACE) {
  const Im2colMap images = decode(map, EncodedMap::im2col, where).images;
  const FilterBase base = {w, h, n};
  emulator::require(base.inside(images), "the filter's base must be in the map's box", where);
  emulator::require(offset_w < 256 && offset_h < 256, "im2col offsets go up to 255", where);
  const auto run = [=] {
    land(static_cast<uint8_t*>(shared), images, c, base, offset_w, offset_h, where);
  };
  start_load(shared, barrier, images.channels_per_pixel, images.pixels_per_column, images.swizzle,
             run, where);
}

inline void tma_prefetch(const TensorMap*) {}

}  // namespace nncx::cuda::ptx
