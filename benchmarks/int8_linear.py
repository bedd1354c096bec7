"""int8_linear, int8 in and float32 out, against torch's float, quantized and int8 products.

Activations are "symmetric", with zero point 0 and never negative, or "affine", all 256 codes with
the zero point -128. The quantized rivals, on CPUs, give quint8; torch._int_mm gives the sums as
int32, without scale or bias (on CPUs it may be a plain loop).
"""

from dataclasses import dataclass

import rivals
import torch
from bench import Benchmark, Case, main
from binary_linear import CUBES, LinearShape
from int8 import (
    ANY_SIGN,
    LOWEST,
    NON_NEGATIVE,
    by_engine,
    quantized,
    quantized_input,
    weights,
    with_kinds,
)

from nncx import ops
from nncx.ops.int8_linear import int8_linear_reference


@dataclass(frozen=True)
class Int8LinearShape:
    linear: LinearShape
    activations: str = "symmetric"

    def __str__(self) -> str:
        return f"{self.linear} {self.activations}"


SHAPES = {
    "cpu": tuple(
        Int8LinearShape(LinearShape(*size), activations)
        for activations in LOWEST
        for size in ((1024, 1024, 1024), (1, 4096, 4096), (16, 4096, 4096), (33, 1001, 999))
    ),
    "cuda": (
        *(Int8LinearShape(cube) for cube in CUBES),
        *(Int8LinearShape(cube, "affine") for cube in CUBES[:2]),
        *(Int8LinearShape(LinearShape(size, size, size)) for size in (4095, 4097, 8191)),
        *(Int8LinearShape(LinearShape(m, 8192, 8192)) for m in (1, 4, 16, 17, 64)),
        *(Int8LinearShape(LinearShape(m, 16384, 16384), "affine") for m in (1, 16)),
    ),
}


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

    def prepack():
        packed = torch.ops.quantized.linear_prepack(quantized(codes, w_scale), bias)
        quantized_x = quantized_input(x, x_scale, zero_point)
        return lambda: torch.ops.quantized.linear(quantized_x, packed, 0.1, 128)

    return Case(
        ours=lambda: ops.int8_linear(x, prepacked, k, o, **epilogue),
        rivals={
            **with_kinds(rivals.linear(float_x, float_w, bias)),
            **({} if x.is_cuda else by_engine(prepack)),
            **rivals.int_mm(x, codes),
        },
        reference=lambda: int8_linear_reference(x, codes, k, o, **epilogue),
        work=m * k * o,
        reads=(x, codes, w_scale, bias),
        limits=NON_NEGATIVE if shape.activations == "symmetric" else ANY_SIGN,
    )


BENCHMARK = Benchmark("int8_linear", "GMAC/s", "torch", SHAPES, prepare, peak="int8")

if __name__ == "__main__":
    raise SystemExit(main(BENCHMARK))
