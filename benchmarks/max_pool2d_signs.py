"""max_pool2d_signs against torch's max-pool of the float images behind the bits.

On a CPU GB/s counts the bytes that the floats would take. On a GPU they are float16.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from bench import Benchmark, Case, main

from nncx import ops
from nncx.ops.max_pool2d_signs import max_pool2d_signs_reference


class PoolShape(NamedTuple):
    n: int
    c: int
    hw: int
    k: int
    stride: int

    def __str__(self) -> str:
        return f"n={self.n} c={self.c} hw={self.hw} k={self.k} s={self.stride}"


SHAPES = {
    "cpu": (
        PoolShape(1, 64, 112, 3, 2),
        PoolShape(1, 128, 56, 2, 2),
        PoolShape(1, 512, 14, 2, 2),
        PoolShape(1, 16, 32, 2, 2),
    ),
    "cuda": (
        PoolShape(128, 64, 112, 3, 2),
        PoolShape(128, 128, 56, 2, 2),
        PoolShape(128, 512, 14, 2, 2),
    ),
}


def prepare(shape: PoolShape) -> Case:
    x = torch.randn(shape.n, shape.c, shape.hw, shape.hw)
    kind = ""
    if x.is_cuda:
        x, kind = x.half(), "float16:"
    x_nhwc = x.to(memory_format=torch.channels_last)
    packed, window = ops.pack_signs(x), (shape.k, shape.stride, shape.k // 2)
    return Case(
        ours=lambda: ops.max_pool2d_signs(packed, *window),
        rivals={
            f"{kind}nchw": lambda: F.max_pool2d(x, *window),
            f"{kind}nhwc": lambda: F.max_pool2d(x_nhwc, *window),
        },
        reference=lambda: max_pool2d_signs_reference(packed, *window),
        work=x.nbytes,
        reads=(packed,),
    )


BENCHMARK = Benchmark("max_pool2d_signs", "GB/s", "torch float32", SHAPES, prepare)

if __name__ == "__main__":
    raise SystemExit(main(BENCHMARK))
