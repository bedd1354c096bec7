// The codec of csrc/entropy.h as functions of nncx._C, on NumPy arrays.
#pragma once

#include <pybind11/pybind11.h>

void bind_entropy(pybind11::module_& m);
