"""Decoding of entropy-coded weights (nncx.save(entropy=True)) against zlib, on one thread.

zlib gets the same codes, one a byte, which suits it best, and the level 9; ours gives them packed,
as `load` wants them. GB/s counts the packed bytes. A line also says how many bits a code takes.

The limit is a chain that no look-up escapes: the table is read where the window says (5 cycles of a
first cache), the window is shifted by the length found there and masked again (3). Codes of 8 bits,
uniform, take one look-up each; the shorter the codes, the more of them a look-up gives.
"""

import zlib
from dataclasses import dataclass

import numpy as np
import torch
from bench import Benchmark, Case, main

from nncx import _entropy
from nncx.nn.codes import pack_codes


@dataclass(frozen=True)
class CodesShape:
    """Codes of so many bits, of which so many percent are not 0.

    `sigma` is that of a normal distribution, in codes; without one the nonzero codes are uniform.
    """

    bits: int
    nonzero: int = 100
    sigma: int = 0
    count: int = 2_000_000

    def __str__(self) -> str:
        sigma = f" sigma={self.sigma}" if self.sigma else ""
        return f"n={self.count} bits={self.bits} nonzero={self.nonzero}{sigma}"

    def codes(self) -> torch.Tensor:
        rng, limit = np.random.default_rng(0), 2**self.bits
        if self.sigma:
            codes = rng.normal(limit / 2, self.sigma, self.count).clip(1, limit - 1)
        else:
            codes = rng.integers(1, limit, self.count)
        codes = codes.astype(np.uint8) * (rng.random(self.count) < self.nonzero / 100)
        return torch.from_numpy(codes)


SHAPES = {
    "cpu": (
        CodesShape(8, sigma=40),
        CodesShape(8, sigma=10),
        CodesShape(5, sigma=5),
        CodesShape(2, nonzero=50),
        CodesShape(2, nonzero=10),
        CodesShape(1, nonzero=10),
        CodesShape(8, nonzero=10),
        CodesShape(5, nonzero=10),
        CodesShape(5, nonzero=4),
    )
}


def prepare(shape: CodesShape) -> Case:
    codes = shape.codes()
    packed = pack_codes(codes, shape.bits)
    payload = _entropy.encode(packed, shape.bits)
    deflated = zlib.compress(codes.numpy(), 9)
    ours, theirs = (f"{8 * len(stream) / shape.count:.2f}" for stream in (payload, deflated))
    return Case(
        ours=lambda: _entropy.decode(payload),
        rivals={f"zlib:{ours} against {theirs} bits a code": lambda: zlib.decompress(deflated)},
        reference=lambda: packed,
        work=packed.nbytes,
        reads=(payload,),
    )


BENCHMARK = Benchmark("entropy", "GB/s", "zlib", SHAPES, prepare)

if __name__ == "__main__":
    raise SystemExit(main(BENCHMARK))
