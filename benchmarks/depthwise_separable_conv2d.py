"""depthwise_separable_conv2d against our two ops and torch's two convolutions, one after the other.

The shapes are the 9 that MobileNet's 13 blocks have, with BatchNorm folded and a ReLU behind both
convolutions, which torch applies in place. torch's rivals are in both layouts. 97 % of the products
are pointwise, so the limit is the rate of torch.mm.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from bench import Benchmark, Case, main
from torch import Tensor

from nncx import ops
from nncx.ops.depthwise_separable_conv2d import depthwise_separable_conv2d_reference


class SeparableShape(NamedTuple):
    """A 3 x 3 depthwise convolution that pads by 1, and a pointwise one."""

    n: int
    c: int
    o: int
    hw: int
    stride: int
    layout: str

    @property
    def macs(self) -> int:
        """Those on the padding too, as torch's FLOP counter has it."""
        return self.n * (self.hw // self.stride) ** 2 * self.c * (9 + self.o)

    def __str__(self) -> str:
        return f"n={self.n} c={self.c} o={self.o} hw={self.hw} s={self.stride} {self.layout}"


MOBILENET = (
    *((32, 64, 112, 1), (64, 128, 112, 2), (128, 128, 56, 1), (128, 256, 56, 2), (256, 256, 28, 1)),
    *((256, 512, 28, 2), (512, 512, 14, 1), (512, 1024, 14, 2), (1024, 1024, 7, 1)),
)
SHAPES = {
    "cpu": tuple(
        SeparableShape(1, *block, layout) for layout in ("nhwc", "nchw") for block in MOBILENET
    )
}
FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


def prepare(shape: SeparableShape) -> Case:
    images = torch.randn(shape.n, shape.c, shape.hw, shape.hw)
    x = {name: images.contiguous(memory_format=f) for name, f in FORMATS.items()}
    weights = torch.randn(shape.c, 1, 3, 3), torch.randn(shape.o, shape.c, 1, 1)
    stored = {name: [w.contiguous(memory_format=f) for w in weights] for name, f in FORMATS.items()}
    biases = torch.randn(shape.c), torch.randn(shape.o)
    arguments = (*weights, *biases, shape.stride, 1, 1, "relu", "relu")

    def two_ops() -> Tensor:
        between = ops.depthwise_conv2d(
            x[shape.layout], weights[0], biases[0], shape.stride, 1, activation="relu"
        )
        return ops.grouped_conv2d(between, weights[1], biases[1], activation="relu")

    def torchs(name: str) -> Tensor:
        depthwise, pointwise = stored[name]
        between = F.conv2d(x[name], depthwise, biases[0], shape.stride, 1, groups=shape.c)
        return F.conv2d(between.relu_(), pointwise, biases[1]).relu_()

    return Case(
        ours=lambda: ops.depthwise_separable_conv2d(x[shape.layout], *arguments),
        rivals={
            "two ops:nncx": two_ops,
            **{f"torch:{name}": lambda name=name: torchs(name) for name in FORMATS},
        },
        reference=lambda: depthwise_separable_conv2d_reference(x[shape.layout], *arguments),
        work=shape.macs,
        tolerance=1e-5,
        reads=(images, *weights, *biases),
    )


BENCHMARK = Benchmark(
    "depthwise_separable_conv2d",
    "GMAC/s",
    "two ops, torch",
    SHAPES,
    prepare,
    {"avx2": 1, "avx512": 1},
)

if __name__ == "__main__":
    raise SystemExit(main(BENCHMARK))
