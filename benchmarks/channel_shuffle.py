"""channel_shuffle against torch's, and a copy, which moves the same bytes.

On a CPU GB/s counts the bytes read, half of those that are moved. On a GPU numbers are float16.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from bench import Benchmark, Case, main

from nncx import ops


class ShuffleShape(NamedTuple):
    """The numbers of groups and channels are those of ShuffleNet."""

    n: int
    c: int
    hw: int
    groups: int
    layout: str = "nhwc"

    def __str__(self) -> str:
        return f"n={self.n} c={self.c} hw={self.hw} g={self.groups} {self.layout}"


SHAPES = {
    "cpu": (ShuffleShape(1, 240, 28, 3), ShuffleShape(1, 240, 28, 3, "nchw")),
    "cuda": (
        ShuffleShape(128, 116, 28, 2),
        ShuffleShape(128, 128, 56, 2),
        ShuffleShape(128, 240, 28, 3),
        ShuffleShape(128, 272, 28, 4),
        ShuffleShape(128, 384, 28, 8),
        ShuffleShape(128, 240, 28, 3, "nchw"),
        ShuffleShape(128, 960, 7, 3, "nchw"),
    ),
}


def prepare(shape: ShuffleShape) -> Case:
    x = torch.randn(shape.n, shape.c, shape.hw, shape.hw)
    if shape.layout == "nhwc":
        x = x.to(memory_format=torch.channels_last)
    if x.is_cuda:
        x = x.half()
    target = torch.empty_like(x)
    return Case(
        ours=lambda: ops.channel_shuffle(x, shape.groups),
        rivals={
            "torch:F.channel_shuffle": lambda: F.channel_shuffle(x, shape.groups),
            "copy:copy_": lambda: target.copy_(x),
        },
        reference=lambda: F.channel_shuffle(x, shape.groups),
        work=x.nbytes,
        reads=(x,),
    )


BENCHMARK = Benchmark("channel_shuffle", "GB/s", "torch", SHAPES, prepare)

if __name__ == "__main__":
    raise SystemExit(main(BENCHMARK))
