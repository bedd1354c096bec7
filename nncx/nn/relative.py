"""Where the few entries of a sparse weight stand: each by its distance from the one before.

Weights are counted in row-major order. The *gap* of an entry is the number of weights between the
entry before it (for the first: the beginning) and itself, in `bits` bits, so at most
`2**bits - 1`. Where two survivors stand further apart, *fillers* are put in: entries of the largest
gap, whose weight is 0. So `E` entries, fillers included, take `E` gaps and `E` values.

Fillers also stand behind the last survivor, so that fewer than `2**bits` weights are left there:
`n < (E + 1) * 2**bits`, whatever the weights are, and a small file cannot ask for much memory.

Paper: Han, Mao and Dally, "Deep Compression", ICLR 2016, section 2.
"""

from numbers import Integral

import torch
from torch import Tensor


def mask_to_gaps(mask: Tensor, bits: int) -> Tensor:
    """The gaps of the entries that are True, and of the fillers before, between and behind them.

    Args:
        mask: bool, any shape, `n` elements.
        bits: width of a gap, 1 to 8.

    Returns:
        uint8 `[E]`, each below `2 ** bits`; `gaps_to_positions` says where the entries stand.

    Raises:
        ValueError: for another dtype or width.
    """
    if mask.dtype != torch.bool:
        raise ValueError(f"mask_to_gaps: mask must be bool, got {mask.dtype}; compare it with 0")
    check_gap_bits(bits)
    count = mask.numel()
    positions = mask.flatten().nonzero().flatten()
    ends = positions.new_tensor([-1]), positions.new_tensor([count])
    zeros = positions.diff(prepend=ends[0], append=ends[1]) - 1
    fillers = zeros >> bits  # each stands for 2**bits weights: its gap, and itself
    survivors = ((fillers + 1).cumsum(0) - 1)[:-1]  # where they are among the entries
    entries = len(positions) + int(fillers.sum())
    gaps = torch.full((entries,), 2**bits - 1, dtype=torch.uint8, device=mask.device)
    gaps[survivors] = (zeros[:-1] & (2**bits - 1)).to(torch.uint8)
    return gaps


def gaps_to_positions(gaps: Tensor, count: int) -> Tensor:
    """Where the entries stand, fillers included: undoes `mask_to_gaps`.

    Args:
        gaps: uint8 `[E]`.
        count: how many weights there are.

    Returns:
        int64 `[E]`, ascending, below `count`.

    Raises:
        ValueError: for another dtype or shape, or if the gaps lead beyond the last weight.
    """
    if gaps.dtype != torch.uint8 or gaps.dim() != 1:
        raise ValueError(
            f"gaps_to_positions: gaps must be uint8 [E], got {gaps.dtype} {list(gaps.shape)};"
            " pass what mask_to_gaps returned"
        )
    positions = (gaps.long() + 1).cumsum(0) - 1
    if len(positions) and int(positions[-1]) >= count:
        raise ValueError(
            f"gaps_to_positions: entries must stand among {count} weights, got one at"
            f" {int(positions[-1])}; the gaps are of another weight"
        )
    return positions


def may_have_entries(count: int, entries: int, bits: int) -> bool:
    """Whether so many weights may have so many entries, whichever of them survive."""
    return entries <= count < (entries + 1) << bits


def check_gap_bits(bits: int) -> None:
    """Raises ValueError for a width that gaps cannot have."""
    if not isinstance(bits, Integral) or not 1 <= bits <= 8:
        raise ValueError(f"the width of a gap must be 1 to 8 bits, got {bits}")
