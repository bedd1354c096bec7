// What is written to a GPU's memory besides an op's results. Enqueued on `stream` (a cudaStream_t);
// the launch's cudaError_t is returned.
#pragma once

#include <cstdint>

#include "conv2d.h"

namespace nncx::cuda {

int zero(void* memory, int64_t bytes, void* stream);

// Of a prepacked weight.
int write_header(const PrepackedHeader& header, uint8_t* prepacked, void* stream);

}  // namespace nncx::cuda
