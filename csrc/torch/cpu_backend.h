// The CPU as a Backend.
#pragma once

#include <cstring>

#include "common.h"
#include "isa.h"
#include "prepacked.h"

namespace nncx {

// The path that is active as an op begins: another thread may call set_isa meanwhile.
struct Backend {
  const Isa isa = active_isa();

  explicit Backend(const Tensor&) {}

  void zero(const char*, const Tensor& bytes) const {
    std::memset(bytes.mutable_data_ptr(), 0, bytes.numel());
  }

  PrepackedHeader header(const std::string& format, const Conv2dWeightShape& s,
                         int64_t bytes) const {
    return prepacked_header(format + "/" + std::string(isa_name(isa)), s, bytes);
  }

  void write(const char*, const PrepackedHeader& header, const Tensor& prepacked) const {
    std::memcpy(prepacked.mutable_data_ptr(), &header, sizeof header);
  }

  const Tensor& aligned(const Tensor& weight) const { return weight; }

  // Refuses a weight, of at least a header's size, that was not prepacked as `expected` says.
  void check_weight(const char* op, const PrepackedHeader& expected, const Tensor& weight) const {
    PrepackedHeader header{};
    std::memcpy(&header, weight.const_data_ptr(), sizeof header);
    header.path[sizeof header.path - 1] = 0;
    NNCX_CHECK(std::memcmp(header.path, expected.path, sizeof header.path) == 0, op,
               ": weight must be prepacked for the path of this process, ", expected.path,
               ", got '", header.path, "'; prepack it again (nncx.repack(model))");
    NNCX_CHECK(std::memcmp(&header, &expected, sizeof header) == 0 &&
                   weight.numel() == static_cast<int64_t>(sizeof header) + expected.bytes,
               op, ": weight must be prepacked for ", geometry_text(expected), ", got ",
               header.groups, ", ", header.out_channels, ", ", header.taps, ", ", header.channels);
  }
};

}  // namespace nncx
