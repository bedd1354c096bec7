import pytest
import torch
import torch.nn.functional as F

from nncx import ops
from nncx.ops.max_pool2d_signs import max_pool2d_signs_reference

WINDOWS = {
    "2": dict(kernel_size=2),
    "3, stride 2, padding 1": dict(kernel_size=3, stride=2, padding=1),
    "oblong": dict(kernel_size=(3, 1), stride=(1, 2), padding=(1, 0)),
    "dilated": dict(kernel_size=2, stride=1, padding=1, dilation=3),
    "ceil": dict(kernel_size=3, stride=2, ceil_mode=True),
    "ceil, padded": dict(kernel_size=2, stride=3, padding=1, ceil_mode=True),
    "whole": dict(kernel_size=(7, 9), stride=1),
}


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(("channels", "groups"), [(1, 1), (64, 1), (65, 1), (130, 2), (6, 3)])
def test_pooling_commutes_with_the_sign(isa: str, channels: int, groups: int, window: str) -> None:
    x = torch.randn(2, channels, 7, 9)
    x[0, 0] = -1  # a window without any +1
    arguments = WINDOWS[window]
    pooled = ops.max_pool2d_signs(ops.pack_signs(x, groups), **arguments)
    expected = ops.pack_signs(F.max_pool2d(x, **arguments), groups)
    assert torch.equal(pooled, expected)
    reference = max_pool2d_signs_reference(ops.pack_signs(x, groups), **arguments)
    assert torch.equal(reference, expected)


def test_empty_and_non_contiguous(isa: str) -> None:
    x = torch.randn(4, 8, 6, 6)
    packed = ops.pack_signs(x)
    assert ops.max_pool2d_signs(packed[:0], 2).shape == (0, 3, 3, 1, 8)
    out = ops.max_pool2d_signs(packed[::2], 2)
    assert torch.equal(out, ops.pack_signs(F.max_pool2d(x[::2], 2)))


def test_any_address(isa: str) -> None:
    packed = ops.pack_signs(torch.randn(2, 128, 9, 11))
    for offset in (0, 8):
        memory = torch.zeros(offset + packed.numel(), dtype=torch.uint8)
        moved = memory[offset:].view(packed.shape).copy_(packed)
        pooled = max_pool2d_signs_reference(packed, 3, 2, 1)
        assert torch.equal(ops.max_pool2d_signs(moved, 3, 2, 1), pooled)


def test_window_of_more_words_than_int64_counts(isa: str) -> None:
    """Nearly all padding. The estimate of the work overflowed, which only a sanitizer tells."""
    packed = torch.full((1, 1, 1, 1, 2**20), 5, dtype=torch.uint8)
    window = dict(kernel_size=2**22 - 1, stride=1, padding=2**21 - 1)
    assert torch.equal(ops.max_pool2d_signs(packed, **window), packed)


def test_threads_give_the_same_bits(isa: str) -> None:
    packed = ops.pack_signs(torch.randn(8, 256, 40, 40))
    before = torch.get_num_threads()
    try:
        outputs = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outputs.append(ops.max_pool2d_signs(packed, 3, 2, 1))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])
