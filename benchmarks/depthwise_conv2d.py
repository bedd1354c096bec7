"""depthwise_conv2d against torch's, by cuDNN and by torch's own kernels.

On a GPU tensors are float16, channels_last, and the limit is the copy's bandwidth or the peak of
float32 arithmetic, whichever is reached first: at 5 x 5 they are near one another.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from bench import Benchmark, Case, main
from torch import Tensor

from nncx import ops


class DepthwiseShape(NamedTuple):
    """A square convolution that pads to keep the size (stride 1) or halve it (stride 2)."""

    n: int
    c: int
    hw: int
    k: int
    stride: int = 1

    @property
    def macs(self) -> int:
        """Those on the padding too, as torch's FLOP counter has it."""
        out_hw = (self.hw + 2 * (self.k // 2) - self.k) // self.stride + 1
        return self.n * self.c * out_hw**2 * self.k**2

    def __str__(self) -> str:
        stride = f" s={self.stride}" if self.stride != 1 else ""
        return f"n={self.n} c={self.c} hw={self.hw} k={self.k}{stride}"


MOBILENET = ((32, 112, 1), (64, 112, 2), (128, 56, 1), (256, 28, 1), (512, 14, 1), (1024, 7, 1))
LARGE_KERNELS = tuple((c, hw, k) for k in (5, 7) for c, hw in ((128, 56), (256, 28), (512, 14)))

SHAPES = {
    "cpu": tuple(DepthwiseShape(1, c, hw, 3, stride) for c, hw, stride in MOBILENET),
    "cuda": (
        *(DepthwiseShape(128, c, hw, 3, stride) for c, hw, stride in MOBILENET),
        *(DepthwiseShape(128, c, hw, k) for c, hw, k in LARGE_KERNELS),
    ),
}


def prepare(shape: DepthwiseShape) -> Case:
    x = torch.randn(shape.n, shape.c, shape.hw, shape.hw)
    x = x.to(memory_format=torch.channels_last)
    weight, bias = torch.randn(shape.c, 1, shape.k, shape.k), torch.randn(shape.c)
    if x.is_cuda:
        x, weight, bias = x.half(), weight.half(), bias.half()
    geometry = (shape.stride, shape.k // 2)

    def torch_conv2d() -> Tensor:
        return F.conv2d(x, weight, bias, *geometry, groups=shape.c)

    def without_cudnn() -> Tensor:
        with torch.backends.cudnn.flags(enabled=False):
            return torch_conv2d()

    on_gpu = {"float16:cudnn": torch_conv2d, "float16:torch": without_cudnn}
    return Case(
        ours=lambda: ops.depthwise_conv2d(x, weight, bias, *geometry),
        rivals=on_gpu if x.is_cuda else {"F.conv2d": torch_conv2d},
        reference=lambda: F.conv2d(
            x.float(), weight.float(), bias.float(), *geometry, groups=shape.c
        ).to(x.dtype),
        work=shape.macs,
        tolerance=1e-3 if x.is_cuda else 1e-5,
        reads=(x, weight, bias),
    )


BENCHMARK = Benchmark("depthwise_conv2d", "GMAC/s", "F.conv2d", SHAPES, prepare, peak="float32")

if __name__ == "__main__":
    raise SystemExit(main(BENCHMARK))
