"""Relative index of sparse weights, against a loop that follows the paper."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nncx.nn.relative import gaps_to_positions, mask_to_gaps, may_have_entries


def _reference(mask: np.ndarray, bits: int) -> list[int]:
    """One weight after the other; a filler as soon as the zeros before it fill a gap."""
    gaps, zeros = [], 0
    for survives in mask.ravel():
        if survives or zeros == 2**bits - 1:
            gaps.append(zeros)
            zeros = 0
        else:
            zeros += 1
    return gaps


def _assert_as_reference(mask: torch.Tensor, bits: int) -> None:
    gaps = mask_to_gaps(mask, bits)
    assert gaps.dtype == torch.uint8 and gaps.tolist() == _reference(mask.numpy(), bits)
    positions = gaps_to_positions(gaps, mask.numel())
    stands = np.cumsum(np.array(gaps.tolist(), dtype=np.int64) + 1) - 1
    assert positions.dtype == torch.int64 and positions.tolist() == stands.tolist()
    fillers = ~mask.flatten()[positions]
    assert set(mask.flatten().nonzero().flatten().tolist()) == set(positions[~fillers].tolist())
    assert (gaps[fillers] == 2**bits - 1).all()
    assert may_have_entries(mask.numel(), len(gaps), bits)


@pytest.mark.parametrize("bits", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("extra", [-1, 0, 1])
@pytest.mark.parametrize("fillers", [0, 1, 2, 7])
def test_gaps_at_the_border(fillers, extra, bits):
    """Around what one entry and its fillers reach, before, between and behind survivors."""
    zeros = max((fillers + 1) * 2**bits - 1 + extra, 0)
    mask = torch.zeros(3 * zeros + 2, dtype=torch.bool)
    mask[zeros] = mask[2 * zeros + 1] = True
    _assert_as_reference(mask, bits)
    _assert_as_reference(mask[: 2 * zeros + 2], bits)
    _assert_as_reference(mask[2 * zeros + 1 :], bits)


@given(st.lists(st.integers(0, 600), max_size=12), st.integers(0, 600), st.integers(1, 8))
def test_any_gaps(gaps, tail, bits):
    mask = torch.zeros(sum(gaps) + len(gaps) + tail, dtype=torch.bool)
    mask[torch.tensor(gaps, dtype=torch.int64).add(1).cumsum(0) - 1] = True
    _assert_as_reference(mask, bits)


@given(st.lists(st.booleans(), max_size=300), st.integers(1, 8))
def test_any_mask(bits_of_mask, bits):
    _assert_as_reference(torch.tensor(bits_of_mask, dtype=torch.bool), bits)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (7, 5), (4, 3, 3, 3)])
@pytest.mark.parametrize("fill", [True, False])
def test_nothing_and_everything(fill, shape):
    _assert_as_reference(torch.full(shape, fill), 5)


def test_order_is_that_of_rows_whatever_the_strides():
    mask = torch.rand(5, 7, 3, 2) < 0.3
    strided = mask.contiguous(memory_format=torch.channels_last)
    assert torch.equal(mask_to_gaps(strided, 2), mask_to_gaps(mask, 2))


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="mask_to_gaps: mask must be bool, got torch.float32"):
        mask_to_gaps(torch.ones(3), 5)
    for bits in (0, 9):
        with pytest.raises(ValueError, match=f"a gap must be 1 to 8 bits, got {bits}"):
            mask_to_gaps(torch.ones(3, dtype=torch.bool), bits)
    gaps = torch.tensor([1, 2], dtype=torch.uint8)
    with pytest.raises(ValueError, match="must stand among 4 weights, got one at 4; the gaps"):
        gaps_to_positions(gaps, 4)
    with pytest.raises(ValueError, match=r"gaps must be uint8 \[E\], got torch.int64 \[2\]"):
        gaps_to_positions(gaps.long(), 9)
    with pytest.raises(ValueError, match=r"gaps must be uint8 \[E\], got torch.uint8 \[1, 2\]"):
        gaps_to_positions(gaps[None], 9)


@pytest.mark.parametrize(
    "count, entries, bits, possible",
    [(0, 0, 5, True), (31, 0, 5, True), (32, 0, 5, False), (3, 4, 5, False), (4, 4, 5, True)]
    + [(7, 3, 1, True), (8, 3, 1, False), (10**11, 5, 8, False)],
)
def test_how_many_entries_there_may_be(count, entries, bits, possible):
    assert may_have_entries(count, entries, bits) is possible
