"""codebook_linear on floats against torch's float32 linear, which reads 32 bits a weight.

One row against a large weight (m=1) is bound by reading it in torch, and by decoding it in ours.
With many rows both multiply floats at the same peak rate and ours also decodes: 1x is the most. So
the limit is the rate of torch.mm; but for 1 bit, one codebook and few rows, where nothing is
multiplied.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from bench import Benchmark, Case, main
from binary_linear import LinearShape

from nncx import ops
from nncx.nn.codes import pack_codes
from nncx.ops.codebook_linear import codebook_linear_reference


@dataclass(frozen=True)
class CodebookLinearShape:
    linear: LinearShape
    bits: int
    per_channel: bool = False

    def __str__(self) -> str:
        kind = " per-channel" if self.per_channel else ""
        return f"{self.linear} bits={self.bits}{kind}"


PRODUCT_LIMITS = {"avx2": 1, "avx512": 1}

SHAPES = (
    *(CodebookLinearShape(LinearShape(1, 4096, 4096), bits) for bits in (1, 2, 4, 5, 8)),
    *(CodebookLinearShape(LinearShape(1, 4096, 4096), bits, True) for bits in (1, 2)),
    *(CodebookLinearShape(LinearShape(8, 4096, 4096), bits) for bits in (1, 2, 4, 8)),
    *(CodebookLinearShape(LinearShape(256, 1024, 1024), bits) for bits in (1, 2, 4, 5, 8)),
    *(CodebookLinearShape(LinearShape(256, 1024, 1024), bits, True) for bits in (1, 8)),
)


def prepare(shape: CodebookLinearShape) -> Case:
    (m, k, o), bits = shape.linear, shape.bits
    x, w = torch.randn(m, k), torch.randn(o, k)
    codes = pack_codes(torch.randint(0, 2**bits, (o, k), dtype=torch.uint8), bits)
    codebook = torch.randn(o, 2**bits) if shape.per_channel else torch.randn(2**bits)
    weight = ops.codebook_linear_prepack(codes, bits, k, o)
    return Case(
        ours=lambda: ops.codebook_linear(x, weight, codebook, bits, k, o),
        rivals={"F.linear": lambda: F.linear(x, w)},
        reference=lambda: codebook_linear_reference(x, codes, codebook, bits, k, o),
        work=m * k * o,
        tolerance=1e-5,
    )


BENCHMARK = Benchmark(
    "codebook_linear", "GMAC/s", "torch float32", SHAPES, prepare, limits=PRODUCT_LIMITS
)

if __name__ == "__main__":
    raise SystemExit(main(BENCHMARK))
