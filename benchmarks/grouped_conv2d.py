"""grouped_conv2d on floats, bias, activation and shuffle in it, against torch's calls one by one.

The shapes are the 1 x 1 convolutions of ShuffleNet v1 (g = 3, of the first two of a unit the first
shuffles) and of MobileNet v1 (g = 1), with the activations that they have there. Both multiply
floats at the same peak rate, so the limit on a CPU is the rate of torch.mm. On a GPU they are
float16, but for one, whose rivals may use TF32.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from bench import Benchmark, Case, main
from torch import Tensor

from nncx import ops
from nncx.ops.grouped_conv2d import grouped_conv2d_reference

ACTIVATE: dict[str, Callable[[Tensor], Tensor]] = {  # in place, as torch's fastest
    "none": lambda y: y,
    "relu": torch.relu_,
    "relu6": lambda y: F.hardtanh_(y, 0, 6),
}


@dataclass(frozen=True)
class GroupedShape:
    n: int
    c: int
    o: int
    hw: int
    groups: int
    shuffle: int
    activation: str
    layout: str
    dtype: str = "float32"

    @property
    def macs(self) -> int:
        return self.n * self.o * self.hw**2 * self.c // self.groups

    def __str__(self) -> str:
        size = f"n={self.n} c={self.c} o={self.o} hw={self.hw} g={self.groups} s={self.shuffle}"
        dtype = f" {self.dtype}" if self.dtype != "float32" else ""
        return f"{size} {self.layout}{dtype}"


LAYERS = (
    *((c, c // 4, hw, 3, 3, "relu") for c, hw in ((240, 28), (480, 14), (960, 7))),
    *((c // 4, c, hw, 3, 1, "none") for c, hw in ((240, 28), (480, 14), (960, 7))),
    *(
        (c, o, hw, 1, 1, "relu6")
        for c, o, hw in (
            (32, 64, 112),
            (64, 128, 56),
            (128, 128, 56),
            (256, 256, 28),
            (512, 512, 14),
            (512, 1024, 7),
            (1024, 1024, 7),
        )
    ),
)
ON_GPU = LAYERS[6:10]  # what the op leaves to torch is not among them
SHAPES = {
    "cpu": tuple(
        GroupedShape(1, *layer, layout) for layer in LAYERS for layout in ("nchw", "nhwc")
    ),
    "cuda": (
        *(GroupedShape(128, *layer, "nhwc", "float16") for layer in (*LAYERS[:6], *ON_GPU)),
        *(GroupedShape(128, *layer, "nchw", "float16") for layer in (LAYERS[0], LAYERS[3])),
        GroupedShape(128, *LAYERS[0], "nhwc"),
    ),
}


def torch_calls(x: Tensor, w: Tensor, b: Tensor, shape: GroupedShape) -> Tensor:
    y = ACTIVATE[shape.activation](F.conv2d(x, w, b, groups=shape.groups))
    return F.channel_shuffle(y, shape.shuffle) if shape.shuffle > 1 else y


def prepare(shape: GroupedShape) -> Case:
    dtype = getattr(torch, shape.dtype)
    x = torch.randn(shape.n, shape.c, shape.hw, shape.hw).to(dtype)
    w = torch.randn(shape.o, shape.c // shape.groups, 1, 1).to(dtype)
    b = torch.randn(shape.o).to(dtype)
    x_nhwc, w_nhwc = (t.to(memory_format=torch.channels_last) for t in (x, w))
    ours = x_nhwc if shape.layout == "nhwc" else x
    arguments = (w, b, 1, 0, 1, shape.groups, shape.shuffle, shape.activation)
    return Case(
        ours=lambda: ops.grouped_conv2d(ours, *arguments),
        rivals={
            "nchw": lambda: torch_calls(x, w, b, shape),
            "nhwc": lambda: torch_calls(x_nhwc, w_nhwc, b, shape),
        },
        reference=lambda: grouped_conv2d_reference(
            ours.float(), w.float(), b.float(), *arguments[2:]
        ).to(dtype),
        work=shape.macs,
        reads=(x, w, b),
        # a sum of so many float32 terms, in another order than the reference adds them
        tolerance=(shape.c // shape.groups) * 2**-23 if shape.dtype == "float32" else 1e-3,
    )


BENCHMARK = Benchmark(
    "grouped_conv2d",
    "GMAC/s",
    "torch",
    SHAPES,
    prepare,
    {"avx2": 1, "avx512": 1},
    peak="float16",
)

if __name__ == "__main__":
    raise SystemExit(main(BENCHMARK))
