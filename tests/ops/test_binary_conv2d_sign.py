import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nncx import ops
from nncx.ops.binary_conv2d_sign import binary_conv2d_sign_reference


def sign(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x >= 0, 1.0, -1.0).double()


def native(x, w, threshold, flip, groups=1, out_groups=1, **geometry) -> torch.Tensor:
    weight = ops.binary_conv2d_prepack(ops.pack_signs(w), x.shape[1], groups)
    sizes = (x.shape[1], w.shape[0], tuple(w.shape[2:]))
    return ops.binary_conv2d_sign(
        *(ops.pack_signs(x, groups), weight, threshold, flip, *sizes),
        groups=groups,
        out_groups=out_groups,
        **geometry,
    )


def expected(x, w, threshold, flip, groups=1, out_groups=1, **geometry) -> torch.Tensor:
    """By torch's own float64 convolution of the signs, and comparisons; packed by the tested op."""
    dots = F.conv2d(sign(x), sign(w), groups=groups, **geometry)
    positive = (dots >= threshold[:, None, None]) != flip[:, None, None]
    return ops.pack_signs(positive.double() - 0.5, out_groups)


def thresholds(out_channels: int, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Around the dot products, and such that no or every dot product reaches."""
    threshold = torch.randint(-most, most + 1, (out_channels,), dtype=torch.int32)
    threshold[::5] = torch.iinfo(torch.int32).min
    threshold[1::7] = torch.iinfo(torch.int32).max
    return threshold, torch.rand(out_channels) > 0.5


@pytest.mark.parametrize("out_channels", [1, 7, 8, 9, 31, 32, 33, 63, 64, 65, 130])
@pytest.mark.parametrize("channels", [3, 64, 65])
def test_channels(isa: str, channels: int, out_channels: int) -> None:
    x, w = torch.randn(2, channels, 5, 6), torch.randn(out_channels, channels, 3, 3)
    threshold, flip = thresholds(out_channels, 20)
    arguments = (x, w, threshold, flip)
    assert torch.equal(native(*arguments, padding=1), expected(*arguments, padding=1))


@pytest.mark.parametrize(
    ("out_channels", "groups", "out_groups"),
    [
        (64, 2, 1),  # bits of two groups of outputs in one group
        (64, 1, 2),
        (128, 2, 4),
        (48, 2, 3),  # groups that share bytes but not words
        (12, 4, 1),  # groups that share bytes
        (12, 1, 4),
        (24, 24, 24),
        (66, 3, 2),
    ],
)
def test_groups(isa: str, out_channels: int, groups: int, out_groups: int) -> None:
    x = torch.randn(2, 2 * groups, 6, 5)
    w = torch.randn(out_channels, 2, 3, 3)
    arguments = (x, w, *thresholds(out_channels, 5), groups, out_groups)
    assert torch.equal(native(*arguments, stride=2), expected(*arguments, stride=2))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(("groups", "out_groups"), [(1, 1), (12, 4), (4, 12)])
def test_threads_share_out_outputs(isa: str, threads: int, groups: int, out_groups: int) -> None:
    """One pixel, so that blocks of outputs are shared out; some of them meet within a byte."""
    x, w = torch.randn(1, 4800, 3, 3), torch.randn(900, 4800 // groups, 3, 3)
    arguments = (x, w, *thresholds(900, 20), groups, out_groups)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        out = native(*arguments)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(out, expected(*arguments))


def test_empty(isa: str) -> None:
    w = torch.randn(4, 8, 3, 3)
    assert native(torch.randn(0, 8, 5, 5), w, *thresholds(4, 5)).shape == (0, 3, 3, 1, 8)
    out = native(torch.randn(2, 8, 5, 5), torch.randn(0, 8, 3, 3), *thresholds(0, 5))
    assert out.shape == (2, 3, 3, 1, 0)


def test_reference_agrees(isa: str) -> None:
    x, w = torch.randn(2, 66, 6, 5), torch.randn(9, 22, 3, 2)
    threshold, flip = thresholds(9, 12)
    geometry = (66, 9, (3, 2), (2, 1), (1, 2), (1, 2), 3, -1)
    packed, weight = ops.pack_signs(x, 3), ops.pack_signs(w)
    prepacked = ops.binary_conv2d_prepack(weight, 66, 3)
    expected = binary_conv2d_sign_reference(
        packed, weight, threshold, flip, *geometry, out_groups=3
    )
    out = ops.binary_conv2d_sign(packed, prepacked, threshold, flip, *geometry, out_groups=3)
    assert torch.equal(out, expected)


@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    groups=st.integers(1, 4),
    out_groups=st.integers(1, 4),
    outputs=st.integers(1, 12),
    channels=st.integers(1, 70),
    padding=st.integers(0, 2),
    stride=st.integers(1, 3),
)
def test_any_groups(isa, groups, out_groups, outputs, channels, padding, stride) -> None:
    x = torch.randn(2, groups * channels, 5, 7)
    w = torch.randn(groups * out_groups * outputs, channels, 2, 3)
    arguments = (x, w, *thresholds(len(w), 8), groups, out_groups)
    geometry = dict(padding=padding, stride=stride)
    assert torch.equal(native(*arguments, **geometry), expected(*arguments, **geometry))
