"""quantize_int8 against torch.quantize_per_tensor, the same formula in torch, and a copy.

On a CPU GB/s counts the bytes read, four of five that are moved. torch.quantize_per_tensor, a rival
on CPUs, keeps the layout of its input; ours gives channels_last, so that NCHW is transposed too.
"""

import torch
from bench import Benchmark, Case, main
from int8 import quantized_input
from pack_signs import SHAPES

from nncx import ops
from nncx.ops.quantize_int8 import quantize_int8_reference

SCALE, ZERO_POINT = 0.02, 3


def prepare(shape: object) -> Case:
    x = shape.tensor()
    scale, zero_point = torch.tensor(SCALE), torch.tensor(ZERO_POINT, dtype=torch.int8)
    target = torch.empty_like(x)
    rivals = {
        "copy:copy_": lambda: target.copy_(x),
        "torch:formula": lambda: (
            x.mul(1 / SCALE).round_().add_(ZERO_POINT).clamp_(-128, 127).to(torch.int8)
        ),
    }
    if not x.is_cuda:
        quantized_input(ops.quantize_int8(x, scale, zero_point), SCALE, ZERO_POINT)
        rivals["torch:per_tensor"] = lambda: torch.quantize_per_tensor(
            x, SCALE, ZERO_POINT + 128, torch.quint8
        )
    return Case(
        ours=lambda: ops.quantize_int8(x, scale, zero_point),
        rivals=rivals,
        reference=lambda: quantize_int8_reference(x, scale, zero_point),
        work=x.nbytes,
        reads=(x,),
    )


BENCHMARK = Benchmark("quantize_int8", "GB/s", "torch", SHAPES, prepare)

if __name__ == "__main__":
    raise SystemExit(main(BENCHMARK))
