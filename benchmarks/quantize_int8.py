"""quantize_int8 against torch.quantize_per_tensor, the same formula in torch, and a copy.

GB/s counts the bytes read, four of five that are moved. torch.quantize_per_tensor keeps the layout
of its input; ours gives channels_last, so that NCHW is transposed too.
"""

import torch
from bench import Benchmark, Case, main
from int8 import quantized_input
from pack_signs import SHAPES

from nncx import ops
from nncx.ops.quantize_int8 import quantize_int8_reference

SCALE, ZERO_POINT = 0.02, 3


def prepare(shape: object) -> Case:
    x = torch.randn(shape.size)
    if shape.layout == "nhwc":
        x = x.to(memory_format=torch.channels_last)
    scale, zero_point = torch.tensor(SCALE), torch.tensor(ZERO_POINT, dtype=torch.int8)
    target = torch.empty_like(x)
    quantized_input(ops.quantize_int8(x, scale, zero_point), SCALE, ZERO_POINT)
    return Case(
        ours=lambda: ops.quantize_int8(x, scale, zero_point),
        rivals={
            "copy:copy_": lambda: target.copy_(x),
            "torch:per_tensor": lambda: torch.quantize_per_tensor(
                x, SCALE, ZERO_POINT + 128, torch.quint8
            ),
            "torch:formula": lambda: (
                x.mul(1 / SCALE).round_().add_(ZERO_POINT).clamp_(-128, 127).to(torch.int8)
            ),
        },
        reference=lambda: quantize_int8_reference(x, scale, zero_point),
        work=x.nbytes,
    )


BENCHMARK = Benchmark("quantize_int8", "GB/s", "torch", SHAPES, prepare)

if __name__ == "__main__":
    raise SystemExit(main(BENCHMARK))
