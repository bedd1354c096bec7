"""pack_signs against a copy of the same tensor, into new memory (clone) and into old (copy_).

Packing is reading: GB/s counts the bytes of the input. It writes 1/32 of them, a copy writes all.
"""

from dataclasses import dataclass

import torch
from bench import Benchmark, Case, main

from nncx import ops
from nncx.ops.pack_signs import pack_signs_reference


@dataclass(frozen=True)
class PackShape:
    """An image or a matrix of float32; images in one of torch's two memory formats."""

    size: tuple[int, ...]
    layout: str = "nchw"

    def __str__(self) -> str:
        if len(self.size) == 2:
            return "m={} k={}".format(*self.size)
        n, c, hw, _ = self.size
        return f"n={n} c={c} hw={hw} {self.layout}"


SHAPES = (
    *(
        PackShape((1, c, hw, hw), layout)
        for c, hw in ((64, 56), (128, 28), (256, 14), (512, 7), (16, 32))
        for layout in ("nchw", "nhwc")
    ),
    PackShape((1024, 1024)),
    PackShape((1, 4096)),
)


def prepare(shape: PackShape) -> Case:
    x = torch.randn(shape.size)
    if shape.layout == "nhwc":
        x = x.to(memory_format=torch.channels_last)
    target = torch.empty_like(x)
    return Case(
        ours=lambda: ops.pack_signs(x),
        rivals={"clone": x.clone, "copy_": lambda: target.copy_(x)},
        reference=lambda: pack_signs_reference(x),
        work=x.nbytes,
    )


BENCHMARK = Benchmark("pack_signs", "GB/s", "a copy", SHAPES, prepare)

if __name__ == "__main__":
    raise SystemExit(main(BENCHMARK))
