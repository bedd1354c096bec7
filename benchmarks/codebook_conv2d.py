"""codebook_conv2d on floats against torch's float convolution.

Both multiply floats at the same peak rate, and ours also decodes its weights: 1x is the most to be
had. What is gained is memory. Our input is contiguous or channels_last, as the line says, and the
output has the same format.
"""

from dataclasses import dataclass

import rivals
import torch
from bench import Benchmark, Case, main
from binary_conv2d import RESNET_3X3, ConvShape
from binary_conv2d import SHAPES as CONV_SHAPES
from codebook_linear import PRODUCT_LIMITS, TOLERANCE

from nncx import ops
from nncx.nn.codes import pack_codes
from nncx.ops.codebook_conv2d import codebook_conv2d_reference


@dataclass(frozen=True)
class CodebookConvShape:
    conv: ConvShape
    bits: int
    layout: str
    dtype: str = "float32"

    def __str__(self) -> str:
        dtype = f" {self.dtype}" if self.dtype != "float32" else ""
        return f"{self.conv} bits={self.bits} {self.layout}{dtype}"


SHAPES = {
    "cpu": (
        *(
            CodebookConvShape(conv, 1, layout)
            for conv in CONV_SHAPES["cpu"]
            for layout in ("nchw", "nhwc")
        ),
        *(CodebookConvShape(CONV_SHAPES["cpu"][1], bits, "nhwc") for bits in (2, 4, 5, 8)),
    ),
    "cuda": tuple(
        CodebookConvShape(conv, bits, "nhwc", "float16")
        for conv in RESNET_3X3[:4]
        for bits in (1, 4)
    ),
}


def prepare(shape: CodebookConvShape) -> Case:
    conv, bits = shape.conv, shape.bits
    x = torch.randn(conv.n, conv.c, conv.hw, conv.hw).to(getattr(torch, shape.dtype))
    if shape.layout == "nhwc":
        x = x.to(memory_format=torch.channels_last)
    w = torch.randn(conv.o, conv.c, conv.k, conv.k)
    codes = pack_codes(torch.randint(0, 2**bits, w.shape, dtype=torch.uint8), bits)
    codebook = torch.randn(2**bits)
    weight = ops.codebook_conv2d_prepack(codes, bits, conv.c, conv.o, conv.k)
    arguments = (codebook, bits, conv.c, conv.o, conv.k, conv.stride, conv.padding)
    return Case(
        ours=lambda: ops.codebook_conv2d(x, weight, *arguments),
        rivals=rivals.conv2d(x, w, None, conv.stride, conv.padding),
        reference=lambda: codebook_conv2d_reference(x, codes, *arguments),
        work=conv.macs,
        reads=(x, codes, codebook),
        tolerance=TOLERANCE[shape.dtype],
    )


BENCHMARK = Benchmark(
    "codebook_conv2d", "GMAC/s", "torch float32", SHAPES, prepare, PRODUCT_LIMITS, peak="float16"
)

if __name__ == "__main__":
    raise SystemExit(main(BENCHMARK))
