#include "codebook_conv2d.h"
#include "cuda/codebook_direct.h"
#include "cuda/codebook_plan.h"
#include "cuda/codebook_planes.h"
#include "cuda/codebook_rows.h"
#include "cuda/codebook_tiled.h"

namespace nncx::cuda {
namespace {

constexpr int kPrepackThreads = 256;

// A thread writes the 16 bytes of a step of an output.
__global__ void __launch_bounds__(kPrepackThreads)
    prepack_steps(const Conv2dWeightShape s, const CodebookWeight w, int bits, const uint8_t* codes,
                  uint8_t* prepacked) {
  const int64_t piece = int64_t{blockIdx.x} * kPrepackThreads + threadIdx.x;
  const int64_t step_index = piece / kCodesBlock;
  const int64_t block = step_index / w.steps(), step = step_index % w.steps();
  const int64_t group = block / w.blocks();
  const int64_t output = block % w.blocks() * kCodesBlock + piece % kCodesBlock;
  if (group >= w.groups || output >= w.outputs) return;  // zeros are there already
  const int64_t first = (group * w.outputs + output) * w.terms;
  auto* words = reinterpret_cast<uint32_t*>(prepacked + kCodesOffset + piece * kCodesStepBytes);
  int64_t k = step * w.step_terms();
  for (int i = 0; i < kCodesStepBytes / 4; ++i) {
    uint32_t word = 0;
    for (int shift = 0; shift < 32 && k < w.terms; shift += 1 << w.slot_log2, ++k) {
      const int64_t at = first + k % s.channels * s.taps + k / s.channels;
      word |= uint32_t{code_at(codes, at, bits)} << shift;
    }
    words[i] = word;
  }
}

template <class T>
int run(const CodebookConv2dParams& p, const CodebookPlan& plan, const Device& device,
        cudaStream_t stream) {
  switch (plan.kernel) {
    case CodebookKernel::sums:
    case CodebookKernel::values:
      return run_few_rows(p, plan, stream);
    case CodebookKernel::planes:
      return run_planes<T>(p, device, stream);
    case CodebookKernel::direct:
      return run_direct<T>(p, stream);
    case CodebookKernel::tiled:
      return run_tiled<T>(p, stream);
  }
  return cudaErrorNotSupported;
}

}  // namespace

int codebook_conv2d_prepack(const Conv2dWeightShape& s, int bits, const uint8_t* codes,
                            uint8_t* prepacked, void* stream) {
  const CodebookWeight w = codebook_weight(s, bits);
  const int64_t pieces = (w.bytes() - kCodesOffset) / kCodesStepBytes;
  const auto blocks = static_cast<unsigned>((pieces + kPrepackThreads - 1) / kPrepackThreads);
  return launch(prepack_steps, blocks, kPrepackThreads, 0, static_cast<cudaStream_t>(stream), s, w,
                bits, codes, prepacked);
}

int codebook_conv2d(const CodebookConv2dParams& p, void* stream) {
  auto* cuda_stream = static_cast<cudaStream_t>(stream);
  Device device;
  if (const int error = current_device(device)) return error;
  const CodebookPlan plan = codebook_plan(p, device);
  switch (p.input_dtype) {
    case Dtype::float32:
      return run<float>(p, plan, device, cuda_stream);
    case Dtype::float16:
      return run<Half>(p, plan, device, cuda_stream);
    case Dtype::bfloat16:
      return run<BFloat16>(p, plan, device, cuda_stream);
    case Dtype::float64:
      break;  // the op refuses it
  }
  return cudaErrorInvalidValue;
}

}  // namespace nncx::cuda
