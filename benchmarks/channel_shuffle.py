"""channel_shuffle against torch's, in the same layout, and a copy, which no shuffle can beat.

On a CPU GB/s counts the bytes that are read; on a GPU those that are read and written.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from bench import Benchmark, Case, main

from nncx import ops
from nncx.ops.channel_shuffle import channel_shuffle_reference


class ShuffleShape(NamedTuple):
    n: int
    c: int
    hw: int
    groups: int
    layout: str
    dtype: str = "float32"

    def __str__(self) -> str:
        dtype = f" {self.dtype}" if self.dtype != "float32" else ""
        return f"n={self.n} c={self.c} hw={self.hw} g={self.groups} {self.layout}{dtype}"


SHUFFLENET = ((60, 28), (120, 14), (240, 7))  # bottlenecks of ShuffleNet v1, g = 3
SHAPES = {
    "cpu": (
        *(
            ShuffleShape(1, c, hw, groups, layout)
            for c, hw, groups in (
                *((c, hw, 3) for c, hw in SHUFFLENET),
                *((4 * c, hw, 3) for c, hw in SHUFFLENET),
                (116, 28, 2),
                (384, 28, 8),
            )
            for layout in ("nchw", "nhwc")
        ),
    ),
    "cuda": tuple(
        ShuffleShape(128, c, hw, groups, layout, "float16")
        for c, hw, groups, layout in (
            (116, 28, 2, "nhwc"),
            (128, 56, 2, "nhwc"),
            (240, 28, 3, "nhwc"),
            (272, 28, 4, "nhwc"),
            (384, 28, 8, "nhwc"),
            (240, 28, 3, "nchw"),
            (960, 7, 3, "nchw"),
        )
    ),
}


def prepare(shape: ShuffleShape) -> Case:
    x = torch.randn(shape.n, shape.c, shape.hw, shape.hw).to(getattr(torch, shape.dtype))
    if shape.layout == "nhwc":
        x = x.to(memory_format=torch.channels_last)
    target = torch.empty_like(x)
    return Case(
        ours=lambda: ops.channel_shuffle(x, shape.groups),
        rivals={
            "torch:F.channel_shuffle": lambda: F.channel_shuffle(x, shape.groups),
            "a copy:clone": x.clone,
            "a copy:copy_": lambda: target.copy_(x),
        },
        reference=lambda: channel_shuffle_reference(x, shape.groups),
        work=x.nbytes,
        reads=(x,),
    )


BENCHMARK = Benchmark("channel_shuffle", "GB/s", "torch", SHAPES, prepare)

if __name__ == "__main__":
    raise SystemExit(main(BENCHMARK))
