#include "hashed_linear.h"

#include "activation.h"
#include "conv2d_ops.h"

namespace nncx {
namespace {

constexpr int64_t kMostBuckets = std::numeric_limits<int32_t>::max();

// Without the buckets' values.
HashedWeight read_weight(const char* op, int64_t buckets, int64_t seed, int64_t in_features,
                         int64_t out_features) {
  read_weight_shape(op, in_features, out_features);  // checks it
  NNCX_CHECK(buckets >= 1 && buckets <= kMostBuckets, op, ": buckets must be 1 to ", kMostBuckets,
             ", got ", buckets);
  return {nullptr, static_cast<uint32_t>(2 * buckets), static_cast<uint64_t>(seed), out_features,
          in_features};
}

void check_buckets(const char* op, const Tensor& buckets) {
  NNCX_CHECK(buckets.scalar_type() == ScalarType::Float && buckets.dim() == 1, op,
             ": buckets must be float32 of one dimension, got ", tensor_text(buckets));
}

#ifdef NNCX_DEVICE_CUDA

// The format that the sums read: any.
ScalarType read_type(const Tensor& input) { return input.scalar_type(); }

void run(const char* op, const HashedLinearParams& p, const Tensor& input) {
  const Backend backend(input);
  backend.check(op, cuda::hashed_linear(p, backend.stream()));
}

#else

ScalarType read_type(const Tensor&) { return ScalarType::Float; }

// Splits the outputs over torch's threads, so that each hashes its own weights; where there are too
// few, the rows too.
void run(const char*, const HashedLinearParams& p, const Tensor& input) {
  const Isa isa = Backend(input).isa;
  constexpr double kMinProducts = 1 << 18;  // per thread; a hash counts as 10
  constexpr int64_t kRows = 48;             // per part at least
  const int64_t blocks = hashed_blocks(p.weight);
  const double products = static_cast<double>(p.rows + 10) *
                          static_cast<double>(p.weight.out_features) *
                          static_cast<double>(p.weight.in_features);
  const int64_t threads = threads_for(products / kMinProducts);
  const int64_t block_parts = std::min(threads, blocks);
  const int64_t row_parts =
      std::clamp<int64_t>(p.rows / kRows, 1, (threads + block_parts - 1) / block_parts);
  const int64_t scratch_bytes = NNCX_ON_PATH(isa, hashed_linear_scratch_bytes(p));
  run_tiles(input, {0, p.rows, 0, blocks}, row_parts, block_parts, scratch_bytes,
            [&](const Conv2dTile& tile, uint8_t* scratch) {
              NNCX_ON_PATH(isa, hashed_linear(p, tile, scratch));
            });
}

#endif

Tensor hashed_linear(const Tensor& input, const Tensor& buckets, int64_t seed, int64_t in_features,
                     int64_t out_features, std::optional<Tensor> bias, std::string activation,
                     std::optional<ScalarType> out_dtype) {
  constexpr const char* op = "hashed_linear";
  check_buckets(op, buckets);
  HashedLinearParams p{};
  p.weight = read_weight(op, buckets.numel(), seed, in_features, out_features);
  check_input_dtype(op, input);
  NNCX_CHECK(input.dim() == 2 && input.size(1) == in_features, op, ": input must be [M, ",
             in_features, "], got shape ", shape_text(input));
  p.rows = input.size(0);
  p.epilogue.activation = to_activation(op, activation);
  const EpilogueTensor values(op, "buckets", input, buckets, {buckets.numel()});
  const EpilogueTensor biases(op, "bias", input, bias, {out_features});
  const ScalarType type = check_out_dtype(op, out_dtype.value_or(input.scalar_type()));
  const Tensor output = new_tensor(input, {p.rows, out_features}, type);
  if (output.numel() == 0) return output;
  const Tensor rows = torch::stable::contiguous(torch::stable::to(input, read_type(input)));
  p.weight.buckets = values.data();
  p.input = rows.const_data_ptr();
  p.input_dtype = to_dtype(rows.scalar_type(), op, "input");
  p.epilogue.bias = biases.data();
  p.epilogue.output = output.mutable_data_ptr();
  p.epilogue.dtype = to_dtype(type, op, "output");
  p.epilogue.stride_n = out_features;
  run(op, p, rows);
  return output;
}

#ifndef NNCX_DEVICE_CUDA

Tensor hashed_weight(const Tensor& buckets, int64_t seed, int64_t in_features,
                     int64_t out_features) {
  constexpr const char* op = "hashed_weight";
  check_buckets(op, buckets);
  HashedWeight w = read_weight(op, buckets.numel(), seed, in_features, out_features);
  const Tensor output = new_tensor(buckets, {out_features, in_features}, ScalarType::Float);
  if (output.numel() == 0) return output;
  const Tensor values = dense(buckets);
  w.buckets = static_cast<const float*>(values.const_data_ptr());
  float* weights = static_cast<float*>(output.mutable_data_ptr());
  const Isa isa = Backend(buckets).isa;
  constexpr int64_t kWeights = 1 << 15;  // per task at least: about 10 us
  const int64_t grain = std::max<int64_t>(1, kWeights / in_features);
  parallel_for(0, out_features, grain, [&](int64_t begin, int64_t end) {
    NNCX_ON_PATH(isa, hashed_weight(w, begin, end, weights));
  });
  return output;
}

// On one thread: then a sum has one order, whatever the number of threads.
Tensor hashed_bucket_sums(const Tensor& values, int64_t seed, int64_t buckets) {
  constexpr const char* op = "hashed_bucket_sums";
  NNCX_CHECK(values.scalar_type() == ScalarType::Float && values.dim() == 2, op,
             ": values must be float32 of two dimensions, got ", tensor_text(values));
  const HashedWeight w = read_weight(op, buckets, seed, values.size(1), values.size(0));
  const Tensor output = new_tensor(values, {buckets}, ScalarType::Float);
  const Tensor rows = dense(values);
  const auto* numbers = static_cast<const float*>(rows.const_data_ptr());
  float* sums = static_cast<float*>(output.mutable_data_ptr());
  NNCX_ON_PATH(Backend(values).isa, hashed_bucket_sums(w, numbers, sums));
  return output;
}

#endif

}  // namespace

NNCX_SCHEMAS(library) {
  library.def(
      "hashed_linear(Tensor input, Tensor buckets, int seed, int in_features, int out_features, "
      "Tensor? bias=None, str activation=\"none\", ScalarType? out_dtype=None) -> Tensor");
  library.def(
      "hashed_weight(Tensor buckets, int seed, int in_features, int out_features) -> Tensor");
  library.def("hashed_bucket_sums(Tensor values, int seed, int buckets) -> Tensor");
}

NNCX_KERNELS(library) {
  library.impl("hashed_linear", TORCH_BOX(&hashed_linear));
#ifndef NNCX_DEVICE_CUDA
  library.impl("hashed_weight", TORCH_BOX(&hashed_weight));
  library.impl("hashed_bucket_sums", TORCH_BOX(&hashed_bucket_sums));
#endif
}

}  // namespace nncx
