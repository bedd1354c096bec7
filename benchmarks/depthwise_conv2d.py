"""depthwise_conv2d against torch's convolution with as many groups as channels.

On a CPU the rivals are torch's in both layouts; ours has the layout that the line says, and every
product needs a multiply-add of its own, at the rate of those of torch.mm at best. On a GPU tensors
are float16, channels_last, the rivals are cuDNN and torch's own kernels, and the limit is the
copy's bandwidth or the peak of float32 arithmetic, whichever is reached first: at 5 x 5 they are
near one another.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from bench import Benchmark, Case, main
from torch import Tensor

from nncx import ops
from nncx.ops.depthwise_conv2d import depthwise_conv2d_reference


class DepthwiseShape(NamedTuple):
    """A square convolution that pads to keep the size (stride 1) or halve it (stride 2)."""

    n: int
    c: int
    hw: int
    k: int
    stride: int = 1
    layout: str = "nhwc"

    @property
    def macs(self) -> int:
        """Those on the padding too, as torch's FLOP counter has it."""
        out_hw = (self.hw + 2 * (self.k // 2) - self.k) // self.stride + 1
        return self.n * self.c * out_hw**2 * self.k**2

    def __str__(self) -> str:
        stride = f" s={self.stride}" if self.stride != 1 else ""
        return f"n={self.n} c={self.c} hw={self.hw} k={self.k}{stride} {self.layout}"


MOBILENET = ((32, 112, 1), (64, 112, 2), (128, 56, 1), (256, 28, 1), (512, 14, 1), (1024, 7, 1))
LARGE_KERNELS = tuple((c, hw, k) for k in (5, 7) for c, hw in ((128, 56), (256, 28), (512, 14)))

SHAPES = {
    "cpu": (
        *(
            DepthwiseShape(1, c, hw, 3, stride, layout)
            for layout in ("nhwc", "nchw")
            for c, hw, stride in MOBILENET
        ),
        DepthwiseShape(1, 116, 28, 3),
        DepthwiseShape(1, 256, 14, 5),
        DepthwiseShape(1, 256, 14, 7),
    ),
    "cuda": (
        *(DepthwiseShape(128, c, hw, 3, stride) for c, hw, stride in MOBILENET),
        *(DepthwiseShape(128, c, hw, k) for c, hw, k in LARGE_KERNELS),
    ),
}


def rivals(
    x: Tensor, weight: Tensor, bias: Tensor, geometry: tuple[int, int]
) -> dict[str, Callable[[], Tensor]]:
    def convolve(x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, bias, *geometry, groups=x.shape[1])

    def without_cudnn() -> Tensor:
        with torch.backends.cudnn.flags(enabled=False):
            return convolve(x, weight)

    if x.is_cuda:
        return {"float16:cudnn": lambda: convolve(x, weight), "float16:torch": without_cudnn}
    formats = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
    stored = {
        name: [t.contiguous(memory_format=f) for t in (x, weight)] for name, f in formats.items()
    }
    return {name: lambda pair=pair: convolve(*pair) for name, pair in stored.items()}


def prepare(shape: DepthwiseShape) -> Case:
    x = torch.randn(shape.n, shape.c, shape.hw, shape.hw)
    if shape.layout == "nhwc":
        x = x.to(memory_format=torch.channels_last)
    weight, bias = torch.randn(shape.c, 1, shape.k, shape.k), torch.randn(shape.c)
    if x.is_cuda:
        x, weight, bias = x.half(), weight.half(), bias.half()
    geometry = (shape.stride, shape.k // 2)
    return Case(
        ours=lambda: ops.depthwise_conv2d(x, weight, bias, *geometry),
        rivals=rivals(x, weight, bias, geometry),
        reference=lambda: depthwise_conv2d_reference(
            x.float(), weight.float(), bias.float(), *geometry
        ).to(x.dtype),
        work=shape.macs,
        tolerance=1e-3 if x.is_cuda else 1e-5,
        reads=(x, weight, bias),
    )


BENCHMARK = Benchmark(
    "depthwise_conv2d",
    "GMAC/s",
    "torch float32",
    SHAPES,
    prepare,
    {"avx2": 1, "avx512": 1},
    peak="float32",
)

if __name__ == "__main__":
    raise SystemExit(main(BENCHMARK))
