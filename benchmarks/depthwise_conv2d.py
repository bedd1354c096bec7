"""depthwise_conv2d against torch's convolution with as many groups as channels.

Every product needs a multiply-add of its own, at the rate of those of torch.mm at best: 1x. The
images of 112 x 112 and 56 x 56 do not fit the L2 cache either. Our input is contiguous or
channels_last, as the line says, and the output has the same format.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from bench import Benchmark, Case, main

from nncx import ops
from nncx.ops.depthwise_conv2d import depthwise_conv2d_reference

PRODUCT_LIMITS = {"avx2": 1, "avx512": 1}


@dataclass(frozen=True)
class DepthwiseShape:
    n: int
    c: int
    hw: int
    k: int
    layout: str
    stride: int = 1

    def __str__(self) -> str:
        stride = f" s={self.stride}" if self.stride != 1 else ""
        return f"n={self.n} c={self.c} hw={self.hw} k={self.k}{stride} {self.layout}"


MOBILENET = ((32, 112, 1), (64, 112, 2), (128, 56, 1), (256, 28, 1), (512, 14, 1), (1024, 7, 1))
SHAPES = {
    "cpu": (
        *(DepthwiseShape(1, c, hw, 3, "nhwc", stride) for c, hw, stride in MOBILENET),
        *(DepthwiseShape(1, c, hw, 3, "nchw", stride) for c, hw, stride in MOBILENET),
        DepthwiseShape(1, 116, 28, 3, "nhwc"),
        DepthwiseShape(1, 256, 14, 5, "nhwc"),
        DepthwiseShape(1, 256, 14, 7, "nhwc"),
    )
}


def prepare(shape: DepthwiseShape) -> Case:
    x = torch.randn(shape.n, shape.c, shape.hw, shape.hw)
    w = torch.randn(shape.c, 1, shape.k, shape.k)
    x_nhwc, w_nhwc = (t.to(memory_format=torch.channels_last) for t in (x, w))
    geometry = (None, shape.stride, shape.k // 2)
    ours = x if shape.layout == "nchw" else x_nhwc
    out_size = (shape.hw - 1) // shape.stride + 1
    return Case(
        ours=lambda: ops.depthwise_conv2d(ours, w, *geometry),
        rivals={
            "nchw": lambda: F.conv2d(x, w, *geometry, 1, shape.c),
            "nhwc": lambda: F.conv2d(x_nhwc, w_nhwc, *geometry, 1, shape.c),
        },
        reference=lambda: depthwise_conv2d_reference(x, w, *geometry),
        work=shape.n * shape.c * (out_size * shape.k) ** 2,
        tolerance=1e-5,
        reads=(ours, w),
    )


BENCHMARK = Benchmark(
    "depthwise_conv2d", "GMAC/s", "torch float32", SHAPES, prepare, limits=PRODUCT_LIMITS
)

if __name__ == "__main__":
    raise SystemExit(main(BENCHMARK))
