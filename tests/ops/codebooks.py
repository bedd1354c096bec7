"""Random codebook weights, and what a float sum of theirs may differ from the exact one."""

from typing import NamedTuple

import torch
from torch import Tensor

from nncx.nn.codes import pack_codes

ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


class Weight(NamedTuple):
    codes: Tensor  # dense
    codebook: Tensor
    values: Tensor  # float64, codebook[code]


def random_weight(shape: tuple[int, ...], bits: int, per_channel: bool) -> Weight:
    """Weights `[out channels, ...]`, looked up by torch's own indexing."""
    index = torch.randint(0, 2**bits, shape)
    codebook = torch.randn(shape[0], 2**bits) if per_channel else torch.randn(2**bits)
    rows = torch.arange(shape[0]).view(-1, *[1] * (len(shape) - 1))
    values = codebook[rows, index] if per_channel else codebook[index]
    return Weight(pack_codes(index.to(torch.uint8), bits), codebook, values.double())


def assert_within_bound(out: Tensor, exact: Tensor, magnitude: Tensor, terms: int) -> None:
    """|out - exact| <= terms * 2**-23 * sum |w x|, and one rounding to the output's format."""
    assert out.shape == exact.shape
    bound = terms * 2.0**-23 * magnitude + ROUNDING[out.dtype] * exact.abs() + 2.0**-25
    assert ((out.double() - exact).abs() <= bound).all()
