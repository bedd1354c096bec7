// Stand-in for csrc/cuda/convert.h: without cuda_fp16, the functions of dtype.h do it.
#pragma once

#include "cuda_runtime.h"
#include "dtype.h"
