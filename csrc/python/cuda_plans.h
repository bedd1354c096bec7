// The shape rules of the CUDA ops as functions of nncx._C: what would run for a shape, on a GPU that
// need not be here.
#pragma once

#include <pybind11/pybind11.h>

void bind_cuda_plans(pybind11::module_& m);
