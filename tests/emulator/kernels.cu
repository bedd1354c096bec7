// Small kernels for test_emulator.py: what the emulator must compute, and mistakes that it must
// find. A kernel whose first number `mistake` is 0 is right; other values leave something out.
#include <array>
#include <stdexcept>

#include "cuda/launch.h"
#include "cuda/ptx_sm80.h"
#include "cuda/ptx_sm90.h"

namespace nncx::cuda {
namespace {

struct Arguments {
  const uint8_t* in;
  uint8_t* out;
  std::array<int64_t, 8> numbers;
  TensorMap map;

  int mistake() const { return static_cast<int>(numbers[0]); }
};

// ------------------------------------------------------------------------------------------------
// Threads, warps and shared memory.

__global__ void uninitialized(const Arguments p) {
  __shared__ uint8_t fixed[64];
  const int i = threadIdx.x;
  p.out[blockIdx.x * 128 + i] = fixed[i];
  p.out[blockIdx.x * 128 + 64 + i] = dynamic_shared_memory()[i];
  __syncthreads();
  fixed[i] = dynamic_shared_memory()[i] = 0;
}

// Mistake 1: no __syncthreads between the store and another thread's load.
__global__ void reversed(const Arguments p) {
  __shared__ uint8_t shared[256];
  shared[threadIdx.x] = p.in[threadIdx.x];
  if (p.mistake() != 1) __syncthreads();
  p.out[threadIdx.x] = shared[255 - threadIdx.x];
}

__global__ void out_of_bounds(const Arguments p) {
  if (threadIdx.x == 0) dynamic_shared_memory()[p.numbers[1]] = 0;
}

__global__ void null_pointer(const Arguments p) {
  if (threadIdx.x == 5) *static_cast<volatile uint8_t*>(nullptr) = p.in[0];
}

__global__ void misaligned(const Arguments p) {
  *reinterpret_cast<uint2*>(p.out) = *reinterpret_cast<const uint2*>(p.in + p.numbers[1]);
}

int endless(int n) {
  volatile char page[4096];
  page[n % 4096] = 1;
  return endless(n + 1) + page[0];
}
__global__ void stack_overflow(const Arguments p) {
  p.out[0] = static_cast<uint8_t>(endless(p.mistake()));
}

// Mistake 1: half of the threads meet elsewhere. 2: at a barrier that never fills.
__global__ void barriers(const Arguments p) {
  const bool half = threadIdx.x < 32;
  if (p.mistake() == 1 && half) {
    __syncthreads();
  } else if (p.mistake() == 2 && half) {
    ptx::named_barrier(1, 64);
  } else {
    __syncthreads();
  }
  p.out[threadIdx.x] = 1;
}

// Mistake 1: a lane does not come. 2: lanes come to two places. 3: a lane reads one outside the
// mask.
__global__ void warp(const Arguments p) {
  const unsigned lane = threadIdx.x;
  const unsigned mask = 0xFFFFFFFF;
  if (p.mistake() == 1 && lane == 7) return;
  unsigned votes;
  if (p.mistake() == 2 && lane == 7) {
    votes = __ballot_sync(mask, true);
  } else {
    votes = __ballot_sync(mask, lane % 3 == 0);
  }
  unsigned sum = lane;
  for (int bits = 16; bits > 0; bits /= 2) sum += __shfl_xor_sync(mask, sum, bits);
  unsigned half = 0;
  if (lane < 16)
    half = __shfl_down_sync(0xFFFF, lane, p.mistake() == 3 ? 3 : 2, p.mistake() == 3 ? 32 : 16);
  const unsigned results[] = {votes, sum, half, __shfl_up_sync(mask, lane, 5),
                              __shfl_sync(mask, lane, 3, 8)};
  for (int i = 0; i < 5; ++i) reinterpret_cast<unsigned*>(p.out)[i * 32 + lane] = results[i];
}

// ------------------------------------------------------------------------------------------------
// sm_80

// Copies blocks of 1024 bytes through two stages. Mistake 1: no wait. 2: waits for one group too
// few. 3: a stage is filled again while others read it.
__global__ void staged_copy(const Arguments p) {
  __shared__ __align__(16) uint8_t stages[2][1024];
  const int blocks = static_cast<int>(p.numbers[1]);
  const auto load = [&](int block) {
    if (block < blocks) {
      const bool valid = block % 3 != 2;  // others read as zeros
      ptx::cp_async<16>(stages[block % 2] + threadIdx.x * 16,
                        p.in + block * 1024 + threadIdx.x * 16, valid);
    }
    ptx::cp_async_commit();
  };
  load(0);
  for (int block = 0; block < blocks; ++block) {
    load(block + 1);
    if (p.mistake() == 2) {
      ptx::cp_async_wait<2>();
    } else if (p.mistake() != 1) {
      ptx::cp_async_wait<1>();
    }
    __syncthreads();
    for (int i = threadIdx.x; i < 1024; i += 64)
      p.out[block * 1024 + i] = stages[block % 2][1023 - i];
    if (p.mistake() != 3) __syncthreads();
  }
}

// out[16][8] = 1 + a[16][32] . b[8][32], the fragments as in the manual's tables, element by element,
// each kWidth bits.
template <int kWidth, class Sum, auto Multiply>
__global__ void fragments(const Arguments p) {
  constexpr int kElements = 32 / kWidth;  // of a register
  const uint8_t *a = p.in, *b = p.in + 16 * 32;
  const int group = threadIdx.x >> 2, in_group = threadIdx.x % 4;
  const auto element = [](const uint8_t* row, int k) -> uint32_t {
    if (kWidth == 1) return row[k / 8] >> (k % 8) & 1;
    return kWidth == 8 ? row[k] : row[2 * k] | row[2 * k + 1] << 8;
  };
  uint32_t x[4] = {}, y[2] = {};
  for (int i = 0; i < 4 * kElements; ++i) {
    const int part = i / kElements;
    const int row = part == 0 || part == 2 ? group : group + 8;
    const int col = in_group * kElements + i % kElements + (part < 2 ? 0 : 4 * kElements);
    x[part] |= element(a + row * 32, col) << (i % kElements * kWidth);
  }
  for (int i = 0; i < 2 * kElements; ++i) {
    const int row = in_group * kElements + i % kElements + (i < kElements ? 0 : 4 * kElements);
    y[i / kElements] |= element(b + group * 32, row) << (i % kElements * kWidth);
  }
  Sum d[4] = {1, 1, 1, 1};
  Multiply(d, x, y);
  for (int i = 0; i < 4; ++i) {
    const int row = i < 2 ? group : group + 8, col = in_group * 2 + (i & 1);
    reinterpret_cast<Sum*>(p.out)[row * 8 + col] = d[i];
  }
}

// out[32][4] words: what each lane gets of four 8 x 16 byte matrices. Mistake 1: unaligned rows.
__global__ void matrices(const Arguments p) {
  __shared__ __align__(16) uint8_t shared[32 * 16 + 16];
  for (int i = 0; i < 16; ++i) shared[threadIdx.x * 16 + i] = p.in[threadIdx.x * 16 + i];
  __syncwarp();
  uint32_t r[4];
  ptx::ldmatrix_x4(r, shared + threadIdx.x * 16 + (p.mistake() == 1 ? 8 : 0));
  for (int i = 0; i < 4; ++i) reinterpret_cast<uint32_t*>(p.out)[threadIdx.x * 4 + i] = r[i];
}

// ------------------------------------------------------------------------------------------------
// sm_90a

// Loads one box, which its map describes, and writes out shared memory as it is. Mistakes 1: the
// barrier is not made visible to TMA. 2: it expects too few bytes. 3: too many. 4: nobody waits for
// it. 5: ordinary stores before it are not fenced. 6: more arrivals than it was made for. 7: no
// barrier.
__global__ void load_box(const __grid_constant__ Arguments p) {
  const auto& [mistake, bytes, images, x, y, z, n, offsets] = p.numbers;
  uint8_t* shared = dynamic_shared_memory();
  auto* barrier = reinterpret_cast<ptx::Barrier*>(shared + bytes);
  if (threadIdx.x == 0) {
    if (mistake != 7) ptx::barrier_init(barrier, 1);
    if (mistake != 1) ptx::barrier_fence_init();
    if (mistake == 5) shared[0] = 7;
    const int wrong = mistake == 2 ? -16 : mistake == 3 ? 16 : 0;
    ptx::barrier_arrive_expect(barrier, static_cast<int>(bytes) + wrong);
    if (mistake == 6) ptx::barrier_arrive(barrier);
    const int at[] = {static_cast<int>(x), static_cast<int>(y), static_cast<int>(z),
                      static_cast<int>(n)};
    if (images) {
      ptx::tma_load_im2col(shared, &p.map, barrier, at[0], at[1], at[2], at[3],
                           static_cast<uint16_t>(offsets % 256),
                           static_cast<uint16_t>(offsets / 256));
    } else {
      ptx::tma_load_2d(shared, &p.map, barrier, at[0], at[1]);
    }
  }
  __syncthreads();
  if (mistake == 4) return;
  ptx::barrier_wait(barrier, 0);
  for (int64_t i = threadIdx.x; i < bytes; i += 32) p.out[i] = shared[i];
}

// One wgmma of a warpgroup on a picture of shared memory, by the descriptors in numbers[2] and [3].
// Mistakes 1: no fence_async after the stores. 2: no wgmma_fence. 3: registers read before the
// wait. 4: no wait. 5: threads have different descriptors. 6: shared memory changes before the
// wait. 7: the picture comes by cp.async, and fence_async before it has landed.
template <bool Bits, int N>
__global__ void multiply(const Arguments p) {
  const auto& [mistake, bytes, a, b, unused0, unused1, unused2, unused3] = p.numbers;
  uint8_t* shared = dynamic_shared_memory();
  for (int64_t i = threadIdx.x * 16; i < bytes; i += 128 * 16) {
    if (mistake == 7) {
      ptx::cp_async<16>(shared + i, p.in + i, true);
    } else {
      *reinterpret_cast<uint4*>(shared + i) = *reinterpret_cast<const uint4*>(p.in + i);
    }
  }
  if (mistake != 1) ptx::fence_async();
  __syncthreads();
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncthreads();
  int32_t d[N / 2] = {};
  if (mistake != 2) ptx::wgmma_fence();
  const uint64_t own = a + (mistake == 5 && threadIdx.x == 77 ? 1 : 0);
  for (int i = 0; i < 2; ++i) {
    if (Bits) {
      ptx::wgmma_b1_and<N>(d, own, b, i == 1);
    } else {
      ptx::wgmma_s8<N>(d, own, b, i == 1);
    }
    if (mistake == 6) shared[threadIdx.x] = 0;
  }
  ptx::wgmma_commit();
  const int early = d[0];
  if (mistake != 4) ptx::wgmma_wait<0>();
  const int thread = threadIdx.x;
  for (int i = 0; i < N / 2; ++i) {
    const int row = 16 * (thread / 32) + thread % 32 / 4 + (i % 4 < 2 ? 0 : 8);
    const int col = 8 * (i / 4) + 2 * (thread % 4) + (i & 1);
    reinterpret_cast<int32_t*>(p.out)[row * N + col] = mistake == 3 && i == 0 ? early : d[i];
  }
}

// Sums of 1024 products of int8 in a pipeline: a producer thread loads boxes of 64 x 128 bytes, a
// warpgroup multiplies each with itself. Mistakes 1: the producer does not wait until a stage is
// free. 2: a stage is freed before wgmma is done with it. 3: a full stage is not waited for.
__global__ void pipeline(const __grid_constant__ Arguments p) {
  constexpr int kStages = 2, kBytes = 64 * 128;
  uint8_t* shared = dynamic_shared_memory();
  auto* full = reinterpret_cast<ptx::Barrier*>(shared + kStages * kBytes);
  auto* empty = full + kStages;
  const int steps = static_cast<int>(p.numbers[1]), mistake = p.mistake();
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      ptx::barrier_init(full + i, 1);
      ptx::barrier_init(empty + i, 128);
    }
    ptx::barrier_fence_init();
  }
  __syncthreads();
  if (threadIdx.x >= 128) {
    if (threadIdx.x > 128) return;
    for (int step = 0; step < steps; ++step) {
      const int stage = step % kStages, parity = step / kStages % 2;
      if (mistake != 1) ptx::barrier_wait(empty + stage, parity ^ 1);
      ptx::barrier_arrive_expect(full + stage, kBytes);
      ptx::tma_load_2d(shared + stage * kBytes, &p.map, full + stage, step * 128, 0);
    }
    return;
  }
  int32_t d[32] = {};
  for (int step = 0; step < steps; ++step) {
    const int stage = step % kStages, parity = step / kStages % 2;
    if (mistake != 3) ptx::barrier_wait(full + stage, parity);
    ptx::wgmma_fence();
    for (int k = 0; k < 128; k += 32) {
      const uint64_t start = __cvta_generic_to_shared(shared + stage * kBytes + k) >> 4;
      const uint64_t descriptor = start | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
      ptx::wgmma_s8<64>(d, descriptor, descriptor, true);
    }
    ptx::wgmma_commit();
    if (mistake == 2) ptx::barrier_arrive(empty + stage);
    ptx::wgmma_wait<0>();
    if (mistake != 2) ptx::barrier_arrive(empty + stage);
  }
  for (int i = 0; i < 32; ++i) {
    const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + i / 2 % 2 * 8;
    const int col = i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2;
    reinterpret_cast<int32_t*>(p.out)[row * 64 + col] = d[i];
  }
}

struct Named {
  const char* name;
  void (*kernel)(Arguments);
};
constexpr Named kKernels[] = {
    {"uninitialized", uninitialized},
    {"reversed", reversed},
    {"out_of_bounds", out_of_bounds},
    {"null_pointer", null_pointer},
    {"misaligned", misaligned},
    {"stack_overflow", stack_overflow},
    {"barriers", barriers},
    {"warp", warp},
    {"staged_copy", staged_copy},
    {"fragments_b1",
     fragments<1, int32_t, [](auto&... operands) { ptx::mma_b1_and(operands...); }>},
    {"fragments_s8", fragments<8, int32_t, [](auto&... operands) { ptx::mma_s8(operands...); }>},
    {"fragments_f16", fragments<16, float, [](auto&... operands) { ptx::mma_f16(operands...); }>},
    {"fragments_bf16", fragments<16, float, [](auto&... operands) { ptx::mma_bf16(operands...); }>},
    {"matrices", matrices},
    {"load_box", load_box},
    {"multiply_b1_8", multiply<true, 8>},
    {"multiply_b1_256", multiply<true, 256>},
    {"multiply_s8_24", multiply<false, 24>},
    {"multiply_s8_128", multiply<false, 128>},
    {"pipeline", pipeline},
};

}  // namespace
}  // namespace nncx::cuda

using namespace nncx::cuda;

// Called by Python. The map is of sizes[0] numbers: of TiledMap, of Im2colMap, or none.
extern "C" __attribute__((visibility("default"))) const char* run_kernel(
    const char* name, int device, int blocks, int threads, int shared_bytes, const uint8_t* in,
    uint8_t* out, const int64_t* numbers, const int64_t* map, int map_numbers) {
  static std::string error;
  error.clear();
  Arguments p{in, out, {}, {}};
  std::copy_n(numbers, p.numbers.size(), p.numbers.begin());
  const auto u32 = [&](int i) { return static_cast<uint32_t>(map[i]); };
  const auto u64 = [&](int i) { return static_cast<uint64_t>(map[i]); };
  const auto i32 = [&](int i) { return static_cast<int>(map[i]); };
  int code = cudaSetDevice(device);
  if (map_numbers == 6) {
    code |= encode_tiled(p.map, {in, u64(0), u64(1), u64(2), u32(3), u32(4), u32(5)});
  } else if (map_numbers > 0) {
    code |= encode_im2col(
        p.map, {in, u64(0), u64(1), u64(2), u64(3), u64(4), u64(5), u64(6), i32(7), i32(8), i32(9),
                i32(10), u32(11), u32(12), u32(13), u32(14), u32(15)});
  }
  if (code != 0) return "the driver refuses the map";
  for (const Named& known : kKernels) {
    if (std::string(known.name) != name) continue;
    try {
      if (launch(known.kernel, blocks, threads, shared_bytes, nullptr, p) != cudaSuccess)
        return "refused";
    } catch (const std::exception& thrown) {
      error = thrown.what();
    }
    return error.c_str();
  }
  return "no such kernel";
}
