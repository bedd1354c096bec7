#include "cuda/grouped_plan.h"

#include <algorithm>

#include "cuda/pieces.h"

namespace nncx::cuda {
namespace {

constexpr int kMostStages = 3;
constexpr int kFewestChannels = 32;  // to which blocks are cut where there are few

int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t rounded_up(int64_t a, int64_t to) { return divided_up(a, to) * to; }

int number_bytes(const GroupedConv2dParams& p) { return p.dtype == Dtype::float32 ? 4 : 2; }

// `count` in equal parts of at most `most`: of whole eights, if those are not too large.
int equal_part(int64_t count, int64_t most) {
  const int64_t parts = divided_up(count, most), part = divided_up(count, parts);
  const int64_t eights = rounded_up(part, 8);
  return static_cast<int>(parts > 1 && eights <= most ? eights : part);
}

// Blocks of at most `most` output channels.
GroupedPlan cut(const GroupedConv2dParams& p, int64_t most) {
  const Conv2dWeightShape& s = p.shape;
  GroupedPlan plan{};
  plan.pixel_tiles = divided_up(p.batch * p.out_height * p.out_width, kGroupedPixels);
  plan.interleaved = p.channels_last && p.shuffle > 1 && p.shuffle == s.groups && s.groups <= most;
  plan.outputs = equal_part(s.out_channels, plan.interleaved ? most / s.groups : most);
  plan.slices = static_cast<int>(divided_up(s.out_channels, plan.outputs));
  plan.groups = static_cast<int>(plan.interleaved  ? s.groups
                                 : plan.slices > 1 ? 1
                                                   : std::min(most / plan.outputs, s.groups));
  plan.channel_tiles = divided_up(s.groups, plan.groups) * plan.slices;
  return plan;
}

// Blocks as large as fit, or smaller ones for a GPU that would not be busy.
GroupedPlan cut(const GroupedConv2dParams& p, const Device& device) {
  int64_t most = kGroupedPixelBytes / number_bytes(p);
  GroupedPlan plan = cut(p, most);
  while (plan.pixel_tiles * plan.channel_tiles < device.multiprocessors && most > kFewestChannels) {
    most /= 2;
    const GroupedPlan smaller = cut(p, most);
    if (smaller.interleaved != plan.interleaved) break;
    plan = smaller;
  }
  return plan;
}

// Whole pixels that are not whole pieces lie behind one another, so that together they are; others
// are an odd number of pieces apart, so that threads that write 8 pixels do not meet in a bank.
int pixel_pitch(const GroupedConv2dParams& p, const GroupedPlan& plan) {
  const int bytes = plan.groups * plan.outputs * number_bytes(p);
  const bool whole = p.channels_last && plan.channel_tiles == 1;
  return whole && bytes % kWidestPiece != 0 ? bytes : (bytes + 15) / 32 * 32 + 16;
}

}  // namespace

GroupedPlan grouped_plan(const GroupedConv2dParams& p, uint64_t weight, const Device& device) {
  GroupedPlan plan = cut(p, device);
  plan.pass_outputs = equal_part(plan.outputs, kGroupedPassOutputs);

  const int64_t channel_bytes = p.shape.channels * number_bytes(p);
  const int64_t k_bytes = p.shape.taps * channel_bytes;
  plan.chunks = static_cast<int>(divided_up(std::max<int64_t>(k_bytes, 1), kGroupedChunkBytes));
  plan.chunk_bytes =
      static_cast<int>(rounded_up(divided_up(std::max<int64_t>(k_bytes, 1), plan.chunks), 32));
  const int piece = widest_piece(channel_bytes, address_of(p.input), weight);
  plan.piece = p.channels_last && piece >= 4 ? piece : 0;
  plan.weight_piece = plan.piece ? piece : widest_piece(k_bytes, weight);

  plan.pixel_pitch = pixel_pitch(p, plan);
  const int waiting = kGroupedPixels * plan.pixel_pitch;
  const int known = kGroupedPixels * 16 + kGroupedMostOutputs * 4;  // where pixels lie, biases
  const auto shared_bytes = [&](int stages) {
    return stages * plan.stage_bytes() + known + waiting;
  };
  const int64_t steps = plan.groups * divided_up(plan.outputs, plan.pass_outputs) * plan.chunks;
  plan.stages = device.path == Path::cuda_cores
                    ? 1  // without asynchronous copies
                    : static_cast<int>(std::min<int64_t>(kMostStages, steps));
  while (plan.stages > 1 && shared_bytes(plan.stages) > device.shared_bytes) --plan.stages;
  plan.shared_bytes = shared_bytes(plan.stages);
  return plan;
}

}  // namespace nncx::cuda
