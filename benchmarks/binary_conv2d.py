"""binary_conv2d on signs that are packed already, against torch's float convolution.

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

import rivals
import torch
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
    groups: int = 1

    @property
    def padding(self) -> int:
        return self.k // 2

    @property
    def macs(self) -> int:
        """Those on the padding too, as torch's FLOP counter has it."""
        out_hw = (self.hw + 2 * self.padding - self.k) // self.stride + 1
        return self.n * self.o * out_hw**2 * self.c // self.groups * self.k**2

    def __str__(self) -> str:
        out_channels = f" o={self.o}" if self.o != self.c else ""
        stride = f" s={self.stride}" if self.stride != 1 else ""
        groups = f" g={self.groups}" if self.groups != 1 else ""
        return f"n={self.n} c={self.c}{out_channels} hw={self.hw} k={self.k}{stride}{groups}"


STAGES = ((64, 56), (128, 28), (256, 14), (512, 7))  # channels and size in ResNet-18 and 50
RESNET_3X3 = (
    *(ConvShape(128, c, c, hw, 3) for c, hw in STAGES),
    *(ConvShape(128, c, 2 * c, hw, 3, stride=2) for c, hw in STAGES[:3]),
    *(ConvShape(128, 2 * c, 2 * c, hw, 3, stride=2) for c, hw in STAGES[:3]),
)
RESNET_1X1 = (
    *(ConvShape(128, c, 4 * c, hw, 1) for c, hw in STAGES),
    *(ConvShape(128, 4 * c, c, hw, 1) for c, hw in STAGES),
)

SHAPES = {
    "cpu": (
        *(ConvShape(1, c, c, hw, 3) for c, hw in STAGES),
        ConvShape(1, 64, 128, 56, 3, stride=2),
        ConvShape(1, 256, 256, 14, 1),
        ConvShape(1, 16, 16, 32, 3),  # the first stage of ResNet-20: little work, much around it
    ),
    "cuda": (*RESNET_3X3[:4], *RESNET_1X1[:2]),
}


def prepare(shape: ConvShape) -> Case:
    x = torch.randn(shape.n, shape.c, shape.hw, shape.hw)
    w = torch.randn(shape.o, shape.c, shape.k, shape.k)
    packed, signs = ops.pack_signs(x), ops.pack_signs(w)
    weight = ops.binary_conv2d_prepack(signs, shape.c)
    geometry = (shape.c, shape.o, shape.k, shape.stride, shape.padding)
    out_dtype = torch.float16 if x.is_cuda else torch.float32
    epilogue = {"scale": w.abs().mean((1, 2, 3)), "out_dtype": out_dtype}
    return Case(
        ours=lambda: ops.binary_conv2d(packed, weight, *geometry, **epilogue),
        rivals=rivals.conv2d(x, w, None, shape.stride, shape.padding),
        reference=lambda: binary_conv2d_reference(packed, signs, *geometry, **epilogue),
        work=shape.macs,
        reads=(packed, signs, epilogue["scale"]),
    )


BENCHMARK = Benchmark(
    "binary_conv2d", "GMAC/s", "torch float32", SHAPES, prepare, BINARY_LIMITS, peak="b1"
)

if __name__ == "__main__":
    raise SystemExit(main(BENCHMARK))
