// Who runs an op: a path of the CPU, or a GPU on its current stream. Each library has one class
// Backend, so that an op differs by device only where it calls its backend.
#pragma once

#ifdef NNCX_DEVICE_CUDA
#include "cuda_backend.h"
#else
#include "cpu_backend.h"
#endif
