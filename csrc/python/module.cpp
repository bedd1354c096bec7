// The pybind11 module nncx._C: which path runs, and how this library was built. Loading it
// registers the ops (csrc/torch) with torch's dispatcher.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <vector>

#include "binary_conv2d.h"
#include "codebook_conv2d.h"
#include "cuda/gemm_plan.h"
#include "cuda/gemm_sm90_plan.h"
#include "cuda/gemm_weight.h"
#include "int8_conv2d.h"
#include "isa.h"
#include "prepacked.h"

namespace {

template <class Holds>
std::vector<std::string> names(Holds holds) {
  std::vector<std::string> result;
  for (nncx::Isa isa : nncx::kIsas) {
    if (holds(isa)) result.emplace_back(nncx::isa_name(isa));
  }
  return result;
}

constexpr int64_t kHeaderBytes = sizeof(nncx::PrepackedHeader);

int64_t binary_prepacked_numel(int64_t groups, int64_t out_channels, int64_t taps, int64_t channels,
                               const std::string& device) {
  const nncx::BinaryWeightShape shape = {groups, out_channels, taps, channels};
  if (device == "cuda") {
    const int64_t bytes = nncx::cuda::binary_conv2d_prepacked_bytes(shape);
    return kHeaderBytes + nncx::sized_header("binary", shape, bytes).bytes;
  }
  return kHeaderBytes + NNCX_ON_PATH(nncx::active_isa(), binary_conv2d_prepacked_bytes(shape));
}

int64_t codebook_prepacked_numel(int64_t groups, int64_t out_channels, int64_t taps,
                                 int64_t channels, int bits, const std::string& device) {
  const nncx::Conv2dWeightShape shape = {groups, out_channels, taps, channels};
  if (device == "cuda") {
    const int64_t bytes = nncx::cuda::codebook_conv2d_prepacked_bytes(shape, bits);
    const std::string format = "codebook" + std::to_string(bits);
    return kHeaderBytes + nncx::sized_header(format, shape, bytes).bytes;
  }
  return kHeaderBytes +
         NNCX_ON_PATH(nncx::active_isa(), codebook_conv2d_prepacked_bytes(shape, bits));
}

int64_t int8_prepacked_numel(int64_t groups, int64_t out_channels, int64_t taps, int64_t channels,
                             const std::string& device) {
  const nncx::Conv2dWeightShape shape = {groups, out_channels, taps, channels};
  if (device == "cuda") {
    const int64_t bytes = nncx::cuda::int8_conv2d_prepacked_bytes(shape);
    return kHeaderBytes + nncx::sized_header("int8", shape, bytes).bytes;
  }
  return kHeaderBytes + NNCX_ON_PATH(nncx::active_isa(), int8_conv2d_prepacked_bytes(shape));
}

using Pair = std::array<int64_t, 2>;

// The shape rule of the binary and int8 ops on CUDA, for a shape and a GPU that need not be here.
pybind11::dict gemm_plan(const std::string& op, const std::array<int64_t, 4>& input,
                         int64_t out_channels, const Pair& kernel, const Pair& stride,
                         const Pair& padding, const Pair& dilation, int64_t groups,
                         const std::string& path, int multiprocessors, int shared_bytes,
                         uintptr_t address) {
  using namespace nncx::cuda;
  constexpr const char* kKernels[] = {"skinny", "sm90", "sm80", "cuda_cores"};
  constexpr const char* kLoaders[] = {"tma", "im2col", "gather"};
  const auto out_size = [&](int i) {
    return (input[2 + i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) / stride[i] + 1;
  };
  const nncx::Conv2dWeightShape shape = {groups, out_channels / groups, kernel[0] * kernel[1],
                                         input[1] / groups};
  const nncx::Conv2dGeometry geometry = {
      input[0],   input[2],   input[3],    kernel[0],   kernel[1],   stride[0],  stride[1],
      padding[0], padding[1], dilation[0], dilation[1], out_size(0), out_size(1)};
  const GemmWeight weight = op == "binary" ? binary_gemm_weight(shape) : int8_gemm_weight(shape);
  const GemmProblem problem = {geometry, shape, weight.channel_bytes, address};
  const Device device = {path == "sm90"   ? Path::sm90
                         : path == "sm80" ? Path::sm80
                                          : Path::cuda_cores,
                         multiprocessors, shared_bytes};
  const GemmPlan plan = nncx::cuda::gemm_plan(problem, device);
  pybind11::dict result;
  result["kernel"] = kKernels[static_cast<int>(plan.kernel)];
  result["loader"] =
      plan.kernel == GemmKernel::sm90 ? kLoaders[static_cast<int>(sm90_loader(problem))] : "gather";
  result["piece"] = plan.piece;
  result["tile"] = pybind11::make_tuple(plan.tile_rows, plan.tile_outputs);
  result["tiles"] = gemm_tiles(problem, plan).count();
  result["stages"] = plan.stages;
  result["shared_bytes"] = plan.shared_bytes;
  return result;
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
  m.def(
      "gemm_plan", &gemm_plan, pybind11::arg("op"), pybind11::arg("input"),
      pybind11::arg("out_channels"), pybind11::arg("kernel_size"), pybind11::arg("stride"),
      pybind11::arg("padding"), pybind11::arg("dilation"), pybind11::arg("groups"),
      pybind11::arg("path"), pybind11::arg("multiprocessors"), pybind11::arg("shared_bytes"),
      pybind11::arg("address") = 0,
      "Which kernel a GPU would run a \"binary\" or \"int8\" convolution of an input [N, C, H, W] "
      "with, and how; needs no GPU. `path` is what its code is compiled for: cuda_cores, sm80 or "
      "sm90.");
}
