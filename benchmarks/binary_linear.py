"""binary_linear on signs that are packed already, against torch's float32 linear.

The limits are those of binary_conv2d.py: the same kernel. One row against a large weight (m=1) is
bound by reading the weight, where a bit instead of a float saves the most.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
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


SHAPES = (
    LinearShape(1024, 1024, 1024),
    LinearShape(1, 4096, 4096),
    LinearShape(256, 1024, 1024),
)


def prepare(shape: LinearShape) -> Case:
    x, w = torch.randn(shape.m, shape.k), torch.randn(shape.o, shape.k)
    alpha = w.abs().mean(1)
    packed, signs = ops.pack_signs(x), ops.pack_signs(w)
    weight = ops.binary_linear_prepack(signs, shape.k)
    return Case(
        ours=lambda: ops.binary_linear(packed, weight, shape.k, shape.o, scale=alpha),
        rivals={"F.linear": lambda: F.linear(x, w)},
        reference=lambda: binary_linear_reference(packed, signs, shape.k, shape.o, scale=alpha),
        work=shape.m * shape.k * shape.o,
    )


BENCHMARK = Benchmark(
    "binary_linear", "GMAC/s", "torch float32", SHAPES, prepare, limits=BINARY_LIMITS
)

if __name__ == "__main__":
    raise SystemExit(main(BENCHMARK))
