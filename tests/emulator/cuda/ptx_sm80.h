// Stand-in for csrc/cuda/ptx_sm80.h: cp.async, ldmatrix and mma.sync after the PTX manual.
//
// A cp.async lands at once or, as likely, at the wait for its group. Errors: an address that is not
// shared or not aligned; a thread that returns before its copies have landed; mma in code that is
// compiled for less than 8.0.
#pragma once

#include <cstdint>
#include <cstring>
#include <deque>
#include <vector>

#include "cuda_runtime.h"
#include "products.h"
#include "swizzle.h"

namespace nncx::cuda::ptx {

using emulator::Place;

// What the running code was compiled for: 75, 80 or 90, and whether that is at least so much.
inline bool compiled_for(int architecture) {
  return emulator::current_gpu().architecture >= architecture;
}

inline void prefetch(const void*) {}

// ------------------------------------------------------------------------------------------------
// cp.async

// What cp.async has written to shared memory, until someone asks (async_proxy.h).
struct Landed {
  uint8_t* at;
  int bytes;
};

inline std::vector<Landed>& landed() { return emulator::block_state<std::vector<Landed>>(); }

struct Copy {
  void* to;
  const void* from;  // null: zeros
  int bytes;
  Place where;

  void land() const {
    if (from == nullptr) {
      std::memset(to, 0, bytes);
    } else {
      std::memcpy(to, from, bytes);
    }
    landed().push_back({static_cast<uint8_t*>(to), bytes});
  }
};

// A thread's copies that have not landed, in order.
struct CopyQueue {
  std::deque<Copy> copies;
  std::deque<uint64_t> groups;  // how many copies were issued when each was committed
  uint64_t landed = 0;

  uint64_t issued() const { return landed + copies.size(); }
  void land_until(uint64_t count) {
    for (; landed < count; ++landed) {
      copies.front().land();
      copies.pop_front();
    }
  }
  void at_block_end() const {
    if (!copies.empty()) emulator::fail("cp.async was never waited for", copies.front().where);
  }
};

template <int Bytes>
void cp_async(void* shared, const void* global, bool valid, NNCX_PLACE) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
  emulator::require_shared(shared, Bytes, Bytes, where);
  emulator::require(!valid || reinterpret_cast<uintptr_t>(global) % Bytes == 0,
                    "the global address of cp.async must be aligned", where);
  const Copy copy = {shared, valid ? global : nullptr, Bytes, where};
  if (!compiled_for(80) || emulator::early()) return copy.land();
  emulator::thread_state<CopyQueue>().copies.push_back(copy);
}

inline void cp_async_commit() {
  auto& queue = emulator::thread_state<CopyQueue>();
  queue.groups.push_back(queue.issued());
}

template <int Pending>
void cp_async_wait() {
  auto& queue = emulator::thread_state<CopyQueue>();
  while (queue.groups.size() > Pending) {
    queue.land_until(queue.groups.front());
    queue.groups.pop_front();
  }
}

// ------------------------------------------------------------------------------------------------
// ldmatrix

struct MatrixRows {
  const void* row;
  uint32_t registers[4];
};

// Lane i gives row i % 8 of matrix i / 8; its register m is word i % 4 of row i / 4 of matrix m.
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, NNCX_PLACE) {
  emulator::require_shared(row, 16, 16, where);
  const auto distribute = [](MatrixRows* const* lanes) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int matrix = 0; matrix < 4; ++matrix) {
        const auto* source = static_cast<const uint8_t*>(lanes[matrix * 8 + lane / 4]->row);
        std::memcpy(&lanes[lane]->registers[matrix], source + lane % 4 * 4, 4);
      }
    }
  };
  const auto result =
      emulator::meet<MatrixRows>(0xFFFFFFFF, {row, {}}, distribute, "ldmatrix", where);
  std::memcpy(r, result.registers, sizeof r);
}

// ------------------------------------------------------------------------------------------------
// mma.sync: d[16][8] += a[16][32 bytes] . b[8][32 bytes], a byte being 8 bits or one int8.
//
// With g = lane / 4 and t = lane % 4, in words of 4 bytes:
//   a  register i: row g + 8 * (i % 2), word t + 4 * (i / 2)
//   b  register i: column g, word t + 4 * i
//   d  register i: row g + 8 * (i / 2), column 2 * t + i % 2

template <class Sum>
struct MmaOperands {
  Sum* d;
  const uint32_t* a;
  const uint32_t* b;
};

template <auto Dot, class Sum>
void mma(Sum (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Place where) {
  emulator::require(compiled_for(80), "mma.sync needs code compiled for 8.0", where);
  const auto multiply = [](MmaOperands<Sum>* const* lanes) {
    uint32_t rows[16][8], columns[8][8];
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < 4; ++i) rows[g + 8 * (i % 2)][t + 4 * (i / 2)] = lanes[lane]->a[i];
      for (int i = 0; i < 2; ++i) columns[g][t + 4 * i] = lanes[lane]->b[i];
    }
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < 4; ++i) {
        lanes[lane]->d[i] += Dot(rows[g + 8 * (i / 2)], columns[2 * t + i % 2]);
      }
    }
  };
  emulator::meet<MmaOperands<Sum>>(0xFFFFFFFF, {d, a, b}, multiply, "mma", where);
}

inline void mma_b1_and(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                       NNCX_PLACE) {
  mma<emulator::dot_b1>(d, a, b, where);
}

inline void mma_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], NNCX_PLACE) {
  mma<emulator::dot_s8>(d, a, b, where);
}

// The GPU rounds the sum of a product's terms in a way of its own; here it is rounded once.
inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], NNCX_PLACE) {
  mma<emulator::dot_16_bits<BFloat16>>(d, a, b, where);
}

inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], NNCX_PLACE) {
  mma<emulator::dot_16_bits<Half>>(d, a, b, where);
}

}  // namespace nncx::cuda::ptx
