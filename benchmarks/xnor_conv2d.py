"""A frozen nncx.XNORConv2d from floats to floats, against nn.Conv2d: what a user's network gains.

Packing, alpha, bias and the way back to the memory format of the input are included. On a GPU the
input and the output are float16.
"""

from copy import deepcopy
from dataclasses import dataclass

import rivals
import torch
from bench import Benchmark, Case, main
from binary_conv2d import BINARY_LIMITS, RESNET_1X1, RESNET_3X3, ConvShape
from binary_conv2d import SHAPES as CONV_SHAPES

import nncx


@dataclass(frozen=True)
class LayerShape:
    """A convolution, and the memory format of the input of our layer."""

    conv: ConvShape
    layout: str

    def __str__(self) -> str:
        return f"{self.conv} {self.layout}"


GROUPED = (
    *(ConvShape(1, c, c, hw, 3, groups=c) for c, hw in ((64, 56), (512, 14))),
    *(ConvShape(1, 128, 128, 28, 3, groups=groups) for groups in (32, 16, 8)),
)
SHAPES = {
    "cpu": tuple(
        LayerShape(conv, layout)
        for conv in (*CONV_SHAPES["cpu"], *GROUPED)
        for layout in ("nchw", "nhwc")
    ),
    "cuda": (
        *(LayerShape(conv, "nhwc") for conv in (*RESNET_3X3, *RESNET_1X1[:2])),
        *(LayerShape(conv, "nchw") for conv in RESNET_3X3[:2]),
    ),
}


def prepare(shape: LayerShape) -> Case:
    conv = shape.conv
    arguments = (conv.c, conv.o, conv.k, conv.stride, conv.padding, 1, conv.groups)
    trained = nncx.XNORConv2d(*arguments).train()  # in training it computes with torch's kernels
    ours = nncx.freeze(deepcopy(trained).eval())
    x = torch.randn(conv.n, conv.c, conv.hw, conv.hw)
    weight = torch.randn(conv.o, conv.c // conv.groups, conv.k, conv.k)
    bias = torch.randn(conv.o)
    floats = rivals.conv2d(x, weight, bias, conv.stride, conv.padding, conv.groups)
    if shape.layout == "nhwc":
        x = x.to(memory_format=torch.channels_last)
    if x.is_cuda:
        x = x.half()
    return Case(
        ours=lambda: ours(x),
        rivals=floats,
        reference=lambda: trained(x),
        work=conv.macs,
        reads=(x, *ours.state_dict().values()),
    )


BENCHMARK = Benchmark(
    "xnor_conv2d", "GMAC/s", "torch float32", SHAPES, prepare, BINARY_LIMITS, peak="b1"
)

if __name__ == "__main__":
    raise SystemExit(main(BENCHMARK))
