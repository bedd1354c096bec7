// What the kernels must know of the GPU that they run on. Plain C++.
#pragma once

namespace nncx::cuda {

// What this library has code for on a GPU, which may be less than the GPU has: a library built for
// 7.5 alone runs on any later one, from PTX, on its CUDA cores.
enum class Path { cuda_cores, sm80, sm90 };

struct Device {
  Path path;
  int multiprocessors;
  int shared_bytes;  // a block may have
};

// Of the current GPU. Asks the driver once in each thread; returns a cudaError_t.
int current_device(Device& device);

}  // namespace nncx::cuda
