"""codebook_linear on floats against torch's float linear, which reads 32 or 16 bits a weight.

One row against a large weight (m=1) is bound by reading it in torch, and on a CPU by decoding it in
ours. With many rows both multiply floats at the same peak rate and ours also decodes: 1x is the
most. So the limit on a CPU is the rate of torch.mm; but for 1 bit, one codebook and few rows, where
nothing is multiplied.
"""

from dataclasses import dataclass

import rivals
import torch
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
    dtype: str = "float32"

    def __str__(self) -> str:
        kind = " per-channel" if self.per_channel else ""
        dtype = f" {self.dtype}" if self.dtype != "float32" else ""
        return f"{self.linear} bits={self.bits}{kind}{dtype}"


# How far a value may be off, as a share of the largest: rounding of sums, and of float16 outputs.
TOLERANCE = {"float32": 1e-5, "float16": 1e-3}


PRODUCT_LIMITS = {"avx2": 1, "avx512": 1}

SHAPES = {
    "cpu": (
        *(CodebookLinearShape(LinearShape(1, 4096, 4096), bits) for bits in (1, 2, 4, 5, 8)),
        *(CodebookLinearShape(LinearShape(1, 4096, 4096), bits, True) for bits in (1, 2)),
        *(CodebookLinearShape(LinearShape(8, 4096, 4096), bits) for bits in (1, 2, 4, 8)),
        *(CodebookLinearShape(LinearShape(256, 1024, 1024), bits) for bits in (1, 2, 4, 5, 8)),
        *(CodebookLinearShape(LinearShape(256, 1024, 1024), bits, True) for bits in (1, 8)),
    ),
    "cuda": (
        *(
            CodebookLinearShape(LinearShape(m, 8192, 8192), bits, dtype="float16")
            for m in (1, 4, 16)
            for bits in (1, 2, 4, 8)
        ),
        *(
            CodebookLinearShape(LinearShape(1, 8192, 8192), bits, True, "float16")
            for bits in (1, 4)
        ),
        CodebookLinearShape(LinearShape(1, 8192, 8192), 4),
        CodebookLinearShape(LinearShape(1024, 8192, 8192), 4, dtype="float16"),
    ),
}


def prepare(shape: CodebookLinearShape) -> Case:
    (m, k, o), bits = shape.linear, shape.bits
    x, w = torch.randn(m, k).to(getattr(torch, shape.dtype)), torch.randn(o, k)
    codes = pack_codes(torch.randint(0, 2**bits, (o, k), dtype=torch.uint8), bits)
    codebook = torch.randn(o, 2**bits) if shape.per_channel else torch.randn(2**bits)
    weight = ops.codebook_linear_prepack(codes, bits, k, o)
    return Case(
        ours=lambda: ops.codebook_linear(x, weight, codebook, bits, k, o),
        rivals=rivals.linear(x, w),
        reference=lambda: codebook_linear_reference(x, codes, codebook, bits, k, o),
        work=m * k * o,
        reads=(x, codes, codebook),
        tolerance=TOLERANCE[shape.dtype],
    )


BENCHMARK = Benchmark(
    "codebook_linear", "GMAC/s", "torch float32", SHAPES, prepare, PRODUCT_LIMITS, peak="float16"
)

if __name__ == "__main__":
    raise SystemExit(main(BENCHMARK))
