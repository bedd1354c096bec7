#include "python/cuda_plans.h"

#include <pybind11/stl.h>

#include <array>
#include <string>

#include "cuda/codebook_plan.h"
#include "cuda/gemm_plan.h"
#include "cuda/gemm_sm90_plan.h"
#include "cuda/gemm_weight.h"
#include "cuda/grouped_plan.h"

namespace {

using nncx::Conv2dGeometry;
using nncx::Conv2dWeightShape;
using namespace nncx::cuda;
namespace py = pybind11;

using Pair = std::array<int64_t, 2>;

// Of an input [N, C, H, W], as F.conv2d takes them.
Conv2dGeometry geometry_of(const std::array<int64_t, 4>& input, const Pair& kernel,
                           const Pair& stride, const Pair& padding, const Pair& dilation) {
  const auto out_size = [&](int i) {
    return (input[2 + i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) / stride[i] + 1;
  };
  return {input[0],   input[2],   input[3],    kernel[0],   kernel[1],   stride[0],  stride[1],
          padding[0], padding[1], dilation[0], dilation[1], out_size(0), out_size(1)};
}

Conv2dWeightShape weight_of(int64_t in_channels, int64_t out_channels, const Pair& kernel,
                            int64_t groups) {
  return {groups, out_channels / groups, kernel[0] * kernel[1], in_channels / groups};
}

Device device_of(const std::string& path, int multiprocessors, int shared_bytes) {
  return {path == "sm90"   ? Path::sm90
          : path == "sm80" ? Path::sm80
                           : Path::cuda_cores,
          multiprocessors, shared_bytes};
}

py::dict fields(const TiledMap& map) {
  py::dict result;
  result["size"] = py::make_tuple(map.width, map.height);
  result["row_stride"] = map.row_stride;
  result["box"] = py::make_tuple(map.box_width, map.box_height);
  result["swizzle"] = map.swizzle;
  return result;
}

py::dict fields(const Im2colMap& map) {
  py::dict result;
  result["size"] = py::make_tuple(map.channels, map.width, map.height, map.batch);
  result["strides"] = py::make_tuple(map.stride_w, map.stride_h, map.stride_n);
  result["lower"] = py::make_tuple(map.lower_w, map.lower_h);
  result["upper"] = py::make_tuple(map.upper_w, map.upper_h);
  result["box"] = py::make_tuple(map.channels_per_pixel, map.pixels_per_column);
  result["steps"] = py::make_tuple(map.step_w, map.step_h);
  result["swizzle"] = map.swizzle;
  return result;
}

// How A is loaded on sm90, and the tensor maps.
void describe_loading(const GemmProblem& problem, const GemmWeight& weight, int tile_outputs,
                      py::dict& result) {
  result["weight_map"] = fields(weight_matrix(weight, nullptr, tile_outputs));
  switch (sm90_loader(problem)) {
    case InputLoader::tma:
      result["loader"] = "tma";
      result["input_map"] = fields(input_matrix(problem));
      break;
    case InputLoader::im2col:
      result["loader"] = "im2col";
      result["input_map"] = fields(input_images(problem));
      break;
    case InputLoader::gather:
      result["loader"] = "gather";
  }
}

py::dict gemm_plan_of(const std::string& op, const std::array<int64_t, 4>& input,
                      int64_t out_channels, const Pair& kernel, const Pair& stride,
                      const Pair& padding, const Pair& dilation, int64_t groups,
                      const std::string& path, int multiprocessors, int shared_bytes,
                      uintptr_t address) {
  constexpr const char* kKernels[] = {"skinny", "sm90", "sm80", "cuda_cores"};
  const Conv2dWeightShape shape = weight_of(input[1], out_channels, kernel, groups);
  const GemmWeight weight = op == "binary" ? binary_gemm_weight(shape) : int8_gemm_weight(shape);
  const GemmProblem problem = {geometry_of(input, kernel, stride, padding, dilation), shape,
                               weight.channel_bytes, address};
  const GemmPlan plan = gemm_plan(problem, device_of(path, multiprocessors, shared_bytes));
  py::dict result;
  result["kernel"] = kKernels[static_cast<int>(plan.kernel)];
  result["piece"] = plan.piece;
  result["tile"] = py::make_tuple(plan.tile_rows, plan.tile_outputs);
  result["tiles"] = gemm_tiles(problem, plan).count();
  result["stages"] = plan.stages;
  result["shared_bytes"] = plan.shared_bytes;
  if (plan.kernel == GemmKernel::sm90) {
    describe_loading(problem, weight, plan.tile_outputs, result);
  }
  return result;
}

py::tuple gemm_tile(int64_t row_tiles, int64_t output_tiles, int64_t groups, uint32_t index) {
  const GemmTiles::Tile tile = GemmTiles{row_tiles, output_tiles, groups}.at(index);
  return py::make_tuple(tile.group, tile.row, tile.output);
}

py::dict codebook_plan_of(int bits, bool per_output, const std::array<int64_t, 4>& input,
                          int64_t out_channels, const Pair& kernel, const Pair& stride,
                          const Pair& padding, const Pair& dilation, int64_t groups,
                          const std::string& path, int multiprocessors, int shared_bytes) {
  constexpr const char* kKernels[] = {"tiled", "direct", "values", "sums", "planes"};
  nncx::CodebookConv2dParams p{};
  static_cast<Conv2dGeometry&>(p) = geometry_of(input, kernel, stride, padding, dilation);
  p.shape = weight_of(input[1], out_channels, kernel, groups);
  p.bits = bits;
  p.codebook_stride = per_output ? int64_t{1} << bits : 0;
  const CodebookPlan plan = codebook_plan(p, device_of(path, multiprocessors, shared_bytes));
  py::dict result;
  result["kernel"] = kKernels[static_cast<int>(plan.kernel)];
  result["rows"] = plan.rows;
  result["outputs"] = plan.outputs;
  result["warps"] = plan.warps;
  result["shared_bytes"] = plan.shared_bytes;
  return result;
}

py::dict grouped_plan_of(int64_t shuffle, bool is_float32, bool channels_last,
                         const std::array<int64_t, 4>& input, int64_t out_channels,
                         const Pair& kernel, const Pair& stride, const Pair& padding,
                         const Pair& dilation, int64_t groups, const std::string& path,
                         int multiprocessors, int shared_bytes) {
  nncx::GroupedConv2dParams p{};
  static_cast<Conv2dGeometry&>(p) = geometry_of(input, kernel, stride, padding, dilation);
  p.shape = weight_of(input[1], out_channels, kernel, groups);
  p.shuffle = shuffle;
  p.dtype = is_float32 ? nncx::Dtype::float32 : nncx::Dtype::float16;
  p.channels_last = channels_last;
  const GroupedPlan plan = grouped_plan(p, 0, device_of(path, multiprocessors, shared_bytes));
  py::dict result;
  result["tiles"] = py::make_tuple(plan.pixel_tiles, plan.channel_tiles);
  result["interleaved"] = plan.interleaved;
  result["groups"] = plan.groups;
  result["outputs"] = plan.outputs;
  result["pass_outputs"] = plan.pass_outputs;
  result["chunks"] = py::make_tuple(plan.chunks, plan.chunk_bytes);
  result["piece"] = plan.piece;
  result["pixel_pitch"] = plan.pixel_pitch;
  result["stages"] = plan.stages;
  result["shared_bytes"] = plan.shared_bytes;
  return result;
}

}  // namespace

void bind_cuda_plans(py::module_& m) {
  m.def("gemm_plan", &gemm_plan_of, py::arg("op"), py::arg("input"), py::arg("out_channels"),
        py::arg("kernel_size"), py::arg("stride"), py::arg("padding"), py::arg("dilation"),
        py::arg("groups"), py::arg("path"), py::arg("multiprocessors"), py::arg("shared_bytes"),
        py::arg("address") = 0,
        "Which kernel a GPU would run a \"binary\" or \"int8\" convolution of an input "
        "[N, C, H, W] with, and how; needs no GPU. `path` is what its code is compiled for: "
        "cuda_cores, sm80 or sm90.");
  m.def("gemm_tile", &gemm_tile, py::arg("row_tiles"), py::arg("output_tiles"), py::arg("groups"),
        py::arg("index"), "The tile (group, row, output) that has this number.");
  m.def("codebook_plan", &codebook_plan_of, py::arg("bits"), py::arg("per_output"),
        py::arg("input"), py::arg("out_channels"), py::arg("kernel_size"), py::arg("stride"),
        py::arg("padding"), py::arg("dilation"), py::arg("groups"), py::arg("path"),
        py::arg("multiprocessors"), py::arg("shared_bytes"),
        "The same of a codebook convolution of `bits` bits; `per_output` is whether every output "
        "channel has a codebook of its own.");
  m.def("grouped_plan", &grouped_plan_of, py::arg("shuffle"), py::arg("is_float32"),
        py::arg("channels_last"), py::arg("input"), py::arg("out_channels"), py::arg("kernel_size"),
        py::arg("stride"), py::arg("padding"), py::arg("dilation"), py::arg("groups"),
        py::arg("path"), py::arg("multiprocessors"), py::arg("shared_bytes"),
        "How a grouped convolution is cut into blocks.");
}
