// The header of a prepacked weight, on its way to the GPU.
#pragma once

#include <cstdint>

#include "conv2d.h"

namespace nncx::cuda {

// Enqueues it on `stream` (a cudaStream_t); returns the launch's cudaError_t.
int write_header(const PrepackedHeader& header, uint8_t* prepacked, void* stream);

}  // namespace nncx::cuda
