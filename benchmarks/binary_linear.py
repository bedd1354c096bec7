"""binary_linear on signs that are packed already, against torch's float linear.

The limits are those of binary_conv2d.py: the same kernel. One row against a large weight (m=1) is
bound by reading the weight, where a bit instead of a float saves the most.
"""

from dataclasses import dataclass
from typing import NamedTuple

import rivals
import torch
from bench import Benchmark, Case, main
from binary_conv2d import BINARY_LIMITS

from nncx import ops
from nncx.ops.binary_linear import binary_linear_reference


class LinearShape(NamedTuple):
    m: int
    k: int
    o: int

    def __str__(self) -> str:
        return f"m={self.m} k={self.k} o={self.o}"


@dataclass(frozen=True)
class BinaryLinearShape:
    linear: LinearShape
    out: str = "float32"

    def __str__(self) -> str:
        return str(self.linear) + (f" to {self.out}" if self.out != "float32" else "")


CUBES = tuple(LinearShape(size, size, size) for size in (4096, 8192, 16384))

SHAPES = {
    "cpu": tuple(
        BinaryLinearShape(LinearShape(*size))
        for size in ((1024, 1024, 1024), (1, 4096, 4096), (256, 1024, 1024))
    ),
    "cuda": (
        *(BinaryLinearShape(cube, out) for cube in CUBES for out in ("float32", "float16")),
        *(BinaryLinearShape(LinearShape(m, 8192, 8192), "float16") for m in (1, 16, 128)),
        BinaryLinearShape(LinearShape(1000, 4095, 4097)),
    ),
}


def prepare(shape: BinaryLinearShape) -> Case:
    m, k, o = shape.linear
    x, w = torch.randn(m, k), torch.randn(o, k)
    packed, signs = ops.pack_signs(x), ops.pack_signs(w)
    weight = ops.binary_linear_prepack(signs, k)
    epilogue = {"scale": w.abs().mean(1), "out_dtype": getattr(torch, shape.out)}
    return Case(
        ours=lambda: ops.binary_linear(packed, weight, k, o, **epilogue),
        rivals=rivals.linear(x, w),
        reference=lambda: binary_linear_reference(packed, signs, k, o, **epilogue),
        work=m * k * o,
        reads=(packed, signs, epilogue["scale"]),
    )


BENCHMARK = Benchmark(
    "binary_linear", "GMAC/s", "torch float32", SHAPES, prepare, BINARY_LIMITS, peak="b1"
)

if __name__ == "__main__":
    raise SystemExit(main(BENCHMARK))
