"""codebook_conv2d on floats against torch's float32 convolution.

Both multiply floats at the same peak rate, and ours also decodes its weights: 1x is the most to be
had. What is gained is memory. Our input is contiguous or channels_last, as the line says, and the
output has the same format.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from bench import Benchmark, Case, main
from binary_conv2d import SHAPES as CONV_SHAPES
from binary_conv2d import ConvShape
from codebook_linear import PRODUCT_LIMITS

from nncx import ops
from nncx.nn.codes import pack_codes
from nncx.ops.codebook_conv2d import codebook_conv2d_reference


@dataclass(frozen=True)
class CodebookConvShape:
    conv: ConvShape
    bits: int
    layout: str

    def __str__(self) -> str:
        return f"{self.conv} bits={self.bits} {self.layout}"


SHAPES = (
    *(CodebookConvShape(conv, 1, layout) for conv in CONV_SHAPES for layout in ("nchw", "nhwc")),
    *(CodebookConvShape(CONV_SHAPES[1], bits, "nhwc") for bits in (2, 4, 5, 8)),
)


def prepare(shape: CodebookConvShape) -> Case:
    conv, bits = shape.conv, shape.bits
    x, w = (
        torch.randn(conv.n, conv.c, conv.hw, conv.hw),
        torch.randn(conv.o, conv.c, conv.k, conv.k),
    )
    x_nhwc, w_nhwc = (t.to(memory_format=torch.channels_last) for t in (x, w))
    ours = x if shape.layout == "nchw" else x_nhwc
    codes = pack_codes(torch.randint(0, 2**bits, w.shape, dtype=torch.uint8), bits)
    codebook = torch.randn(2**bits)
    weight = ops.codebook_conv2d_prepack(codes, bits, conv.c, conv.o, conv.k)
    arguments = (codebook, bits, conv.c, conv.o, conv.k, conv.stride, conv.padding)
    return Case(
        ours=lambda: ops.codebook_conv2d(ours, weight, *arguments),
        rivals={
            "nchw": lambda: F.conv2d(x, w, None, conv.stride, conv.padding),
            "nhwc": lambda: F.conv2d(x_nhwc, w_nhwc, None, conv.stride, conv.padding),
        },
        reference=lambda: codebook_conv2d_reference(x, codes, *arguments),
        work=conv.macs,
        tolerance=1e-5,
    )


BENCHMARK = Benchmark(
    "codebook_conv2d", "GMAC/s", "torch float32", SHAPES, prepare, limits=PRODUCT_LIMITS
)

if __name__ == "__main__":
    raise SystemExit(main(BENCHMARK))
