"""A frozen nncx.XNORConv2d from floats to floats, against nn.Conv2d: what a user's network gains.

Packing, alpha, bias and the way back to the memory format of the input are included.
"""

from copy import deepcopy
from dataclasses import dataclass

import torch
from bench import Benchmark, Case, main
from binary_conv2d import BINARY_LIMITS, ConvShape
from binary_conv2d import SHAPES as CONV_SHAPES
from torch import nn

import nncx


@dataclass(frozen=True)
class LayerShape:
    """A convolution, and the memory format of the input of our layer."""

    conv: ConvShape
    layout: str

    def __str__(self) -> str:
        return f"{self.conv} {self.layout}"


SHAPES = tuple(LayerShape(conv, layout) for conv in CONV_SHAPES for layout in ("nchw", "nhwc"))


def prepare(shape: LayerShape) -> Case:
    conv = shape.conv
    arguments = (conv.c, conv.o, conv.k, conv.stride, conv.padding)
    trained = nncx.XNORConv2d(*arguments).train()  # in training it computes with torch's kernels
    ours = nncx.freeze(deepcopy(trained).eval())
    float_nchw = nn.Conv2d(*arguments).eval()
    float_nhwc = deepcopy(float_nchw).to(memory_format=torch.channels_last)
    x_nchw = torch.randn(conv.n, conv.c, conv.hw, conv.hw)
    x_nhwc = x_nchw.to(memory_format=torch.channels_last)
    x = x_nchw if shape.layout == "nchw" else x_nhwc
    return Case(
        ours=lambda: ours(x),
        rivals={"nchw": lambda: float_nchw(x_nchw), "nhwc": lambda: float_nhwc(x_nhwc)},
        reference=lambda: trained(x),
        work=conv.macs,
    )


BENCHMARK = Benchmark(
    "xnor_conv2d", "GMAC/s", "nn.Conv2d float32", SHAPES, prepare, limits=BINARY_LIMITS
)

if __name__ == "__main__":
    raise SystemExit(main(BENCHMARK))
