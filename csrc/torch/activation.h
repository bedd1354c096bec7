// The activations that an epilogue may end in, by name.
#pragma once

#include <string_view>

#include "common.h"
#include "float_epilogue.h"

namespace nncx {

inline Activation to_activation(const char* op, std::string_view name) {
  if (name == "none") return Activation::none;
  if (name == "relu") return Activation::relu;
  if (name == "relu6") return Activation::relu6;
  fail(op, ": activation must be none, relu or relu6, got '", name, "'");
}

}  // namespace nncx
