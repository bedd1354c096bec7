// The pybind11 module nncx._C: which path runs, and how this library was built. Loading it
// registers the ops (csrc/torch) with torch's dispatcher.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "binary_conv2d.h"
#include "codebook_conv2d.h"
#include "int8_conv2d.h"
#include "isa.h"
#include "prepacked.h"
#include "python/cuda_plans.h"
#include "python/entropy_arrays.h"

namespace {

template <class Holds>
std::vector<std::string> names(Holds holds) {
  std::vector<std::string> result;
  for (nncx::Isa isa : nncx::kIsas) {
    if (holds(isa)) result.emplace_back(nncx::isa_name(isa));
  }
  return result;
}

// Elements of a prepacked weight whose bytes, behind the header, are so many on a GPU or else under
// the active path of the CPU.
int64_t prepacked_numel(const std::string& format, const nncx::Conv2dWeightShape& shape,
                        const std::string& device, int64_t on_gpu, int64_t on_cpu) {
  const int64_t bytes = device == "cuda" ? nncx::sized_header(format, shape, on_gpu).bytes : on_cpu;
  return static_cast<int64_t>(sizeof(nncx::PrepackedHeader)) + bytes;
}

int64_t binary_prepacked_numel(int64_t groups, int64_t out_channels, int64_t taps, int64_t channels,
                               const std::string& device) {
  const nncx::BinaryWeightShape shape = {groups, out_channels, taps, channels};
  return prepacked_numel("binary", shape, device, nncx::cuda::binary_conv2d_prepacked_bytes(shape),
                         NNCX_ON_PATH(nncx::active_isa(), binary_conv2d_prepacked_bytes(shape)));
}

int64_t codebook_prepacked_numel(int64_t groups, int64_t out_channels, int64_t taps,
                                 int64_t channels, int bits, const std::string& device) {
  const nncx::Conv2dWeightShape shape = {groups, out_channels, taps, channels};
  return prepacked_numel(
      "codebook" + std::to_string(bits), shape, device,
      nncx::cuda::codebook_conv2d_prepacked_bytes(shape, bits),
      NNCX_ON_PATH(nncx::active_isa(), codebook_conv2d_prepacked_bytes(shape, bits)));
}

int64_t int8_prepacked_numel(int64_t groups, int64_t out_channels, int64_t taps, int64_t channels,
                             const std::string& device) {
  const nncx::Conv2dWeightShape shape = {groups, out_channels, taps, channels};
  return prepacked_numel("int8", shape, device, nncx::cuda::int8_conv2d_prepacked_bytes(shape),
                         NNCX_ON_PATH(nncx::active_isa(), int8_conv2d_prepacked_bytes(shape)));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.attr("version") = NNCX_VERSION;
  m.attr("compiler") = __VERSION__;
  m.attr("cuda_compiler") = NNCX_CUDA_COMPILER;  // empty: built without CUDA
  m.attr("cuda_architectures") = pybind11::str(NNCX_CUDA_ARCHITECTURES).attr("split")();
  m.def("choose_isa", &nncx::choose_isa, "Takes the path NNCX_ISA names, else the best one.");
  m.def(
      "isa", [] { return nncx::isa_name(nncx::active_isa()); },
      "Name of the CPU path that this process uses.");
  m.def(
      "set_isa", &nncx::set_isa, pybind11::arg("name"),
      "Switches the CPU path, for tests; prepacked weights of another path are then refused until "
      "nncx.repack(model).");
  m.def("built_isas", [] { return names(nncx::isa_built); }, "Paths that were compiled.");
  m.def(
      "supported_isas", [] { return names(nncx::isa_supported); },
      "Paths that were compiled and that this CPU has.");
  m.def("binary_prepacked_numel", &binary_prepacked_numel, pybind11::arg("groups"),
        pybind11::arg("out_channels"), pybind11::arg("taps"), pybind11::arg("channels"),
        pybind11::arg("device"),
        "Bytes of a prepacked binary weight: on \"cuda\", or else under the active CPU path; sizes "
        "are those of one group.");
  m.def(
      "codebook_prepacked_numel", &codebook_prepacked_numel, pybind11::arg("groups"),
      pybind11::arg("out_channels"), pybind11::arg("taps"), pybind11::arg("channels"),
      pybind11::arg("bits"), pybind11::arg("device"),
      "Bytes of a prepacked codebook weight: on \"cuda\", or else under the active CPU path; sizes "
      "are those of one group.");
  m.def("int8_prepacked_numel", &int8_prepacked_numel, pybind11::arg("groups"),
        pybind11::arg("out_channels"), pybind11::arg("taps"), pybind11::arg("channels"),
        pybind11::arg("device"),
        "Bytes of a prepacked int8 weight: on \"cuda\", or else under the active CPU path; sizes "
        "are those of one group.");
  bind_cuda_plans(m);
  bind_entropy(m);
}
