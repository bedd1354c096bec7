"""pack_signs against a copy of the same tensor, into new memory (clone) and into old (copy_).

Packing is reading: on a CPU GB/s counts the bytes of the input, of which 1/32 are written, while a
copy writes all.
"""

from dataclasses import dataclass

import torch
from bench import Benchmark, Case, main
from binary_conv2d import STAGES

from nncx import ops
from nncx.ops.pack_signs import pack_signs_reference


@dataclass(frozen=True)
class PackShape:
    """An image or a matrix; images in one of torch's two memory formats."""

    size: tuple[int, ...]
    layout: str = "nchw"
    dtype: str = "float32"

    def __str__(self) -> str:
        dtype = f" {self.dtype}" if self.dtype != "float32" else ""
        if len(self.size) == 2:
            return "m={} k={}".format(*self.size) + dtype
        n, c, hw, _ = self.size
        return f"n={n} c={c} hw={hw} {self.layout}{dtype}"

    def tensor(self) -> torch.Tensor:
        x = torch.randn(self.size).to(getattr(torch, self.dtype))
        return x.to(memory_format=torch.channels_last) if self.layout == "nhwc" else x


SHAPES = {
    "cpu": (
        *(
            PackShape((1, c, hw, hw), layout)
            for c, hw in (*STAGES, (16, 32))
            for layout in ("nchw", "nhwc")
        ),
        PackShape((1024, 1024)),
        PackShape((1, 4096)),
    ),
    "cuda": (
        *(
            PackShape((128, c, hw, hw), layout, dtype)
            for c, hw in ((64, 112), (256, 56), (512, 14))
            for dtype in ("float32", "float16")
            for layout in ("nchw", "nhwc")
        ),
        *(PackShape((16384, 16384), dtype=dtype) for dtype in ("float32", "float16")),
        PackShape((16384, 4095), dtype="float16"),
    ),
}


def prepare(shape: PackShape) -> Case:
    x = shape.tensor()
    target = torch.empty_like(x)
    return Case(
        ours=lambda: ops.pack_signs(x),
        rivals={"clone": x.clone, "copy_": lambda: target.copy_(x)},
        reference=lambda: pack_signs_reference(x),
        work=x.nbytes,
        reads=(x,),
    )


BENCHMARK = Benchmark("pack_signs", "GB/s", "a copy", SHAPES, prepare)

if __name__ == "__main__":
    raise SystemExit(main(BENCHMARK))
