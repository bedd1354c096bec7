// Which kernel of codebook_conv2d a shape gets. Plain C++.
//
//   sums     one row of a linear layer (of 1 bit up to 8, one after another), one codebook of 1 or 2
//            bits: looks up sums of 4 or 2 products at a time
//   planes   other linear layers of up to 16 rows and 1 or 2 bits, on tensor cores
//   values   other linear layers of up to 16 rows: looks up weights, and multiplies
//   direct   groups of up to 8 outputs, at least 16 outputs in all: a depthwise convolution
//   tiled    anything else
//
// With few rows the reading of the weight is to be the limit. What the kernels do for each weight of
// each lane, with M rows, in loads from shared memory (of which an SM does one a cycle, for a warp):
// sums M / 4 (1 bit) and M / 2 (2 bits), besides a quarter of that to build the tables; values
// 1 + M / 8. And in instructions (four a cycle): sums 1.3 M and 2.5 M, values 2.4 + M * 9 / 8; planes
// takes 1.2 for 1 bit and 3 for 2 bits, up to 8 rows (of float32: and 1/4 and 3/4 more from 3 rows
// on, where it has 24 columns instead of 8).
#pragma once

#include <algorithm>

#include "cuda/codebook_weight.h"
#include "cuda/device.h"

namespace nncx::cuda {

enum class CodebookKernel { tiled, direct, values, sums, planes };

struct CodebookPlan {
  CodebookKernel kernel;
  // Of values and sums, else 0:
  int rows;     // of a block; there are more blocks for more
  int outputs;  // of a lane, 32 apart
  int warps;    // that share out K
  int shared_bytes;
};

constexpr int kMostRows = 16;
constexpr int kMostWarps = 16;
constexpr int kEntryBytes = 256;  // of a table of values: 64 copies of an entry
constexpr int kSumsPitch = 20;   // of the 32 tables of 16 sums: lanes write theirs without conflict
constexpr int kPieceTerms = 32;  // of the rows, staged for a warp

constexpr bool is_linear(const Conv2dGeometry& g) {
  return g.kernel_h == 1 && g.kernel_w == 1 && g.stride_h == 1 && g.stride_w == 1 &&
         g.padding_h == 0 && g.padding_w == 0;
}

constexpr int codebook_shared_bytes(const CodebookPlan& plan, int bits) {
  constexpr int kLanes = 32, kFloat = 4;
  const int sums = plan.warps * plan.rows * plan.outputs * kLanes * kFloat;
  const int tables = plan.kernel == CodebookKernel::sums
                         ? plan.warps * kLanes * kSumsPitch * kFloat
                         : (kEntryBytes << bits) + plan.warps * plan.rows * kPieceTerms * kFloat;
  return std::max(sums, tables);
}

constexpr CodebookPlan codebook_plan(const CodebookConv2dParams& p, const Device& device) {
  const CodebookWeight weight = codebook_weight(p.shape, p.bits);
  const int64_t rows = p.batch * p.out_height * p.out_width;
  constexpr auto no_rows = [](CodebookKernel kernel) { return CodebookPlan{kernel, 0, 0, 0, 0}; };
  if (rows > kMostRows || !is_linear(p)) {
    const bool is_narrow = weight.outputs <= 8 && weight.groups * weight.outputs >= 16;
    return no_rows(is_narrow ? CodebookKernel::direct : CodebookKernel::tiled);
  }
  const bool has_planes = device.path != Path::cuda_cores && p.bits <= 2 && weight.terms > 0;
  if (has_planes && (rows > 1 || p.codebook_stride > 0)) return no_rows(CodebookKernel::planes);
  const bool sums = p.codebook_stride == 0 && rows <= (p.bits == 1 ? 8 : p.bits == 2 ? 1 : 0);
  CodebookPlan plan = no_rows(sums ? CodebookKernel::sums : CodebookKernel::values);
  plan.rows = sums || rows == 1 ? 1 : rows <= 4 ? 4 : 8;
  // 64 outputs a block where the GPU still has work for every multiprocessor
  plan.outputs = weight.groups * weight.blocks() > device.multiprocessors ? 2 : 1;
  plan.warps = static_cast<int>(std::clamp<int64_t>(weight.steps(), 1, kMostWarps));
  plan.shared_bytes = codebook_shared_bytes(plan, p.bits);
  return plan.shared_bytes > device.shared_bytes ? no_rows(CodebookKernel::tiled) : plan;
}

}  // namespace nncx::cuda
