"""hashed_linear against torch's float linear: on the weight in memory, and writing it out first.

The limit: before a weight is multiplied it costs a hash and a look-up, some 20 instructions and a
gather for 8 of them. What that comes to on a machine is the third contender, `hashed_weight`, which
does nothing else but write the weight: "0.8x hashes alone" is 80 % of the limit for one row, where
that stays in a cache. With one row torch reads 4 bytes a weight instead, from a cache or from
memory; with many both multiply at the same rate, ours after hashing. So it is slower than
`F.linear` wherever the weight is in memory anyway. What it saves is that memory.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from bench import Benchmark, Case, main
from binary_linear import LinearShape
from torch import Tensor

from nncx import ops
from nncx.ops.hashed_linear import hashed_linear_reference


@dataclass(frozen=True)
class HashedLinearShape:
    linear: LinearShape
    buckets: int

    def __str__(self) -> str:
        return f"{self.linear} b={self.buckets}"


SHAPES = {
    "cpu": tuple(
        HashedLinearShape(LinearShape(m, k, o), k * o // share)
        for k, o, share in ((784, 1000, 8), (784, 1000, 64), (4096, 4096, 8), (4096, 4096, 64))
        for m in (1, 8, 256)
    ),
    "cuda": tuple(
        HashedLinearShape(LinearShape(m, 8192, 8192), 8192 * 8192 // share)
        for share in (8, 64)
        for m in (1, 16, 256)
    ),
}


def prepare(shape: HashedLinearShape) -> Case:
    m, k, o = shape.linear
    x, buckets = torch.randn(m, k), torch.randn(shape.buckets)
    write_out = partial(ops.hashed_weight, buckets, 0, k, o)
    return Case(
        ours=lambda: ops.hashed_linear(x, buckets, 0, k, o),
        rivals=_rivals(x, write_out),
        reference=lambda: hashed_linear_reference(x, buckets, 0, k, o),
        work=m * k * o,
        reads=(x, buckets),
        tolerance=1e-5,
    )


def _rivals(x: Tensor, write_out: Callable[[], Tensor]) -> dict[str, Callable[[], Tensor]]:
    weight = write_out()
    return {
        "in memory:F.linear": partial(F.linear, x, weight),
        "written out first:F.linear": lambda: F.linear(x, write_out()),
        "hashes alone:hashed_weight": write_out,
    }


BENCHMARK = Benchmark("hashed_linear", "GMAC/s", "torch float32", SHAPES, prepare, peak="float32")

if __name__ == "__main__":
    raise SystemExit(main(BENCHMARK))
