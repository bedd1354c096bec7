"""int8_linear, int8 in and float32 out, against torch's float32, quantized and int8 products.

Activations are "symmetric", with zero point 0 and never negative, or "affine", all 256 codes with
the zero point -128. The quantized rivals give quint8; torch._int_mm gives the sums as int32,
without scale or bias (on CPUs it may be a plain loop).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from bench import Benchmark, Case, main
from binary_linear import LinearShape
from int8 import (
    ANY_SIGN,
    LOWEST,
    NON_NEGATIVE,
    by_engine,
    quantized,
    quantized_input,
    weights,
)

from nncx import ops
from nncx.ops.int8_linear import int8_linear_reference


@dataclass(frozen=True)
class Int8LinearShape:
    linear: LinearShape
    activations: str = "symmetric"

    def __str__(self) -> str:
        return f"{self.linear} {self.activations}"


SHAPES = tuple(
    Int8LinearShape(LinearShape(*size), activations)
    for activations in LOWEST
    for size in ((1024, 1024, 1024), (1, 4096, 4096), (16, 4096, 4096), (33, 1001, 999))
)


def prepare(shape: Int8LinearShape) -> Case:
    (m, k, o), zero_point = shape.linear, LOWEST[shape.activations]
    codes, w_scale = weights(o, k)
    x = torch.randint(zero_point, 128, (m, k)).to(torch.int8)
    x_scale, bias = 0.01, torch.randn(o)
    epilogue = {
        "input_zero_point": torch.tensor(zero_point, dtype=torch.int8),
        "scale": w_scale * x_scale,
        "bias": bias,
    }
    prepacked = ops.int8_linear_prepack(codes)
    float_x, float_w = (x.float() - zero_point) * x_scale, codes.float() * w_scale[:, None]
    quantized_x, quantized_w = quantized_input(x, x_scale, zero_point), quantized(codes, w_scale)

    def prepack():
        packed = torch.ops.quantized.linear_prepack(quantized_w, bias)
        return lambda: torch.ops.quantized.linear(quantized_x, packed, 0.1, 128)

    return Case(
        ours=lambda: ops.int8_linear(x, prepacked, k, o, **epilogue),
        rivals={
            "float32:F.linear": lambda: F.linear(float_x, float_w, bias),
            **by_engine(prepack),
            "_int_mm:_int_mm": lambda: torch._int_mm(x, codes.T),
        },
        reference=lambda: int8_linear_reference(x, codes, k, o, **epilogue),
        work=m * k * o,
        limits=NON_NEGATIVE if shape.activations == "symmetric" else ANY_SIGN,
    )


BENCHMARK = Benchmark("int8_linear", "GMAC/s", "torch", SHAPES, prepare)

if __name__ == "__main__":
    raise SystemExit(main(BENCHMARK))
