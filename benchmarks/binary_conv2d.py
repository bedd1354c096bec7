"""binary_conv2d on signs that are packed already, against torch's float32 convolution.

The limit of the avx2 path. The kernel is a table GEMM: one `pshufb` looks up 32 counts, each of 4
products of signs, and one `paddb` adds them: 128 MACs for a pair of instructions. Current cores
start two `pshufb` in a cycle (AMD since Zen 2, Intel since Ice Lake), which is 256 MACs a cycle on
paper and 16 times the 2 * 8 of float32 FMA. A loop of nothing but the pair, on registers, runs at
13 times the rate of a loop of nothing but FMA (Zen 3 and Zen 4; 740 against 58 GMAC/s on one core
of the latter): no table GEMM beats that.

The limit of the avx512 path: a 512-bit xor, VPOPCNTQ and add make 512 MACs. A loop of nothing but
the three, on registers, runs at 21 times the rate of the FMA loop (Zen 4; 1240 against 58.6
GMAC/s).

Clocks change and are not to be trusted, so the limits are taken as 13 and 21 times the rate of
torch.mm (512 x 512 x 512) in the same rounds. As torch.mm reaches 80 to 95 % of the FMA peak, that
is a little low, and the share of it a little flattering. Where torch.mm has 512-bit FMA at full
rate (Intel servers, Zen 5) the share is too small instead.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from bench import Benchmark, Case, main

from nncx import ops
from nncx.ops.binary_conv2d import binary_conv2d_reference

BINARY_LIMITS = {"avx2": 13, "avx512": 21}


@dataclass(frozen=True)
class ConvShape:
    """A square convolution that pads to keep the size (stride 1) or halve it (stride 2)."""

    n: int
    c: int
    o: int
    hw: int
    k: int
    stride: int = 1

    @property
    def padding(self) -> int:
        return self.k // 2

    @property
    def macs(self) -> int:
        """Those on the padding too, as torch's FLOP counter has it."""
        out_hw = (self.hw + 2 * self.padding - self.k) // self.stride + 1
        return self.n * self.o * out_hw**2 * self.c * self.k**2

    def __str__(self) -> str:
        out_channels = f" o={self.o}" if self.o != self.c else ""
        stride = f" s={self.stride}" if self.stride != 1 else ""
        return f"n={self.n} c={self.c}{out_channels} hw={self.hw} k={self.k}{stride}"


SHAPES = (
    ConvShape(1, 64, 64, 56, 3),  # the four stages of ResNet-18
    ConvShape(1, 128, 128, 28, 3),
    ConvShape(1, 256, 256, 14, 3),
    ConvShape(1, 512, 512, 7, 3),
    ConvShape(1, 64, 128, 56, 3, stride=2),
    ConvShape(1, 256, 256, 14, 1),
    ConvShape(1, 16, 16, 32, 3),  # the first stage of ResNet-20: little work, much around it
)


def prepare(shape: ConvShape) -> Case:
    x = torch.randn(shape.n, shape.c, shape.hw, shape.hw)
    w = torch.randn(shape.o, shape.c, shape.k, shape.k)
    alpha = w.abs().mean((1, 2, 3))
    packed, signs = ops.pack_signs(x), ops.pack_signs(w)
    weight = ops.binary_conv2d_prepack(signs, shape.c)
    geometry = (shape.c, shape.o, shape.k, shape.stride, shape.padding)
    x_nhwc, w_nhwc = (t.to(memory_format=torch.channels_last) for t in (x, w))
    return Case(
        ours=lambda: ops.binary_conv2d(packed, weight, *geometry, scale=alpha),
        rivals={
            "nchw": lambda: F.conv2d(x, w, None, shape.stride, shape.padding),
            "nhwc": lambda: F.conv2d(x_nhwc, w_nhwc, None, shape.stride, shape.padding),
        },
        reference=lambda: binary_conv2d_reference(packed, signs, *geometry, scale=alpha),
        work=shape.macs,
    )


BENCHMARK = Benchmark(
    "binary_conv2d", "GMAC/s", "torch float32", SHAPES, prepare, limits=BINARY_LIMITS
)

if __name__ == "__main__":
    raise SystemExit(main(BENCHMARK))
