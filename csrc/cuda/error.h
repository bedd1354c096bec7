// What a cudaError_t means to who uses nncx.
#pragma once

#include <string>

namespace nncx::cuda {

// "<what CUDA says>; <what to do>", the end of a sentence.
std::string error_text(int error);

}  // namespace nncx::cuda
