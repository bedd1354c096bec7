"""int8_conv2d with one input channel a group, for which the vector paths have a kernel."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from int8_operands import KINDS, codes, epilogue_by_hand, epilogues, weights, zero_point
from properties import many_examples

from nncx import ops


def native(x, weight, stride=1, padding=0, dilation=1, **options):
    channels = x.shape[1]
    prepacked = ops.int8_conv2d_prepack(weight, channels)
    shape = (channels, weight.shape[0], tuple(weight.shape[2:]))
    return ops.int8_conv2d(x, prepacked, *shape, stride, padding, dilation, channels, **options)


def sums(x, weight, stride=1, padding=0, dilation=1, z=0) -> torch.Tensor:
    """torch's float64 convolution, which is exact on integers below 2^53."""
    x = x.contiguous().double() - z
    return F.conv2d(x, weight.double(), None, stride, padding, dilation, x.shape[1]).long()


def assert_exact(x, weight, z: int = 0, **geometry) -> None:
    out = native(x, weight, input_zero_point=zero_point(z), **geometry)
    assert torch.equal(out, sums(x, weight, z=z, **geometry).float())


@pytest.mark.parametrize("multiplier", [1, 2, 3, 16, 17])
@pytest.mark.parametrize("channels", [2, 15, 16, 17, 31, 64, 65])
def test_channels(isa: str, channels: int, multiplier: int) -> None:
    """The last channels of an input that ends where they do are read without what lies behind."""
    weight = weights("any", channels * multiplier, 1, 3, 3)
    assert_exact(codes(2, channels, 5, 6), weight, 7, padding=1)
    x = codes(2, 5, 6, channels + 3)[..., 3:].permute(0, 3, 1, 2)
    assert_exact(x, weight, -7, padding=1)


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (5, 5), (7, 7), (2, 4), (1, 9), (9, 1)])
@pytest.mark.parametrize("stride", [1, 2, 3, (3, 1)])
@pytest.mark.parametrize("dilation", [1, 2, (2, 3)])
def test_geometry(isa: str, kernel, stride, dilation) -> None:
    """Lines of more output pixels than are computed together; strides that divide dilations."""
    x, weight = codes(1, 18, 19, 75), weights("any", 18, 1, *kernel)
    assert_exact(x, weight, 3, stride=stride, padding=(5, 4), dilation=dilation)


@pytest.mark.parametrize("width", [1, 3, 4, 5, 8, 9, 13, 31, 32, 33, 65])
@pytest.mark.parametrize("stride", [1, 2])
def test_widths(isa: str, width: int, stride: int) -> None:
    """Short lines leave together, long ones in parts."""
    x, weight = codes(2, 80, 6, width), weights("any", 80, 1, 3, 3)
    assert_exact(x, weight, -128, stride=stride, padding=1)


@pytest.mark.parametrize("z", [-128, -1, 0, 1, 127])
def test_padding_larger_than_the_image_adds_nothing(isa: str, z: int) -> None:
    assert_exact(codes(2, 20, 1, 2), weights("any", 20, 1, 3, 3), z, padding=4)
    x = torch.full((1, 20, 3, 3), z).to(torch.int8)
    assert not native(
        x, weights("any", 20, 1, 3, 3), padding=2, input_zero_point=zero_point(z)
    ).any()


def test_strides_larger_than_the_image(isa: str) -> None:
    x, weight = codes(1, 20, 3, 3), weights("any", 20, 1, 3, 3)
    assert_exact(x, weight, stride=2**31 - 1, padding=1)


@pytest.mark.parametrize("x", [-128, 127])
@pytest.mark.parametrize("w", [-128, 127])
@pytest.mark.parametrize("z", [-128, 0, 127])
def test_extremes(isa: str, x: int, w: int, z: int) -> None:
    image, weight = torch.full((1, 40, 6, 7), x), torch.full((40, 1, 3, 3), w)
    assert_exact(image.to(torch.int8), weight.to(torch.int8), z, padding=1)


@pytest.mark.parametrize("name", epilogues([1, 1, 1, 1]))
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("channels", "size"), [(5, 3), (16, 7), (50, 9), (72, 35)])
def test_epilogue(isa: str, channels: int, size: int, channels_last: bool, name: str) -> None:
    epilogue = epilogues([2, channels, size, size])[name]
    x, weight = codes(2, channels, size, size), weights("any", channels, 1, 3, 3)
    options = {"input_zero_point": zero_point(-5), "channels_last": channels_last}
    out = native(x, weight, padding=1, **epilogue, **options)
    assert torch.equal(out, epilogue_by_hand(sums(x, weight, padding=1, z=-5), epilogue))


@pytest.mark.parametrize("activation", ["none", "relu", "relu6"])
@pytest.mark.parametrize("out_scale", [-0.5, 0.0, 1e-45, 1e-3, 0.05, 1e30, torch.inf, torch.nan])
@pytest.mark.parametrize("z", [-128, -3, 127])
def test_int8_out_is_quantize_int8_of_float_out(isa, z: int, out_scale: float, activation) -> None:
    x, weight = codes(2, 37, 9, 11), weights("any", 37, 1, 3, 3)
    scale, bias = torch.rand(37) * 1e-3, torch.randn(37)
    scale[:20:5], bias[1:20:5], bias[2:20:5] = torch.nan, torch.nan, torch.inf
    epilogue = {"scale": scale, "bias": bias, "activation": activation}
    to = torch.tensor(out_scale), zero_point(z)
    fused = native(x, weight, padding=1, **epilogue, out_scale=to[0], out_zero_point=to[1])
    assert torch.equal(fused, ops.quantize_int8(native(x, weight, padding=1, **epilogue), *to))


@pytest.mark.parametrize("shape", [(3, 48, 29, 27), (1, 40, 7, 70), (1, 100, 3, 3)])
def test_threads_cut_lines_and_channels_anywhere(isa: str, shape) -> None:
    x, weight = codes(*shape), weights("any", shape[1] * 2, 1, 5, 5)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert_exact(x, weight, 9, padding=2)
    finally:
        torch.set_num_threads(before)


def test_weight_of_another_geometry_is_refused(isa: str) -> None:
    x, prepacked = codes(1, 8, 4, 4), ops.int8_conv2d_prepack(codes(16, 1, 3, 3), 8)
    for (out_channels, kernel, groups), expected in {
        (8, 3, 8): "groups=8, out_channels/groups=1, taps=9",
        (16, 2, 8): "taps=4",
        (16, 3, 4): "groups=4",
    }.items():
        with pytest.raises(RuntimeError, match=f"must be prepacked for .*{expected}"):
            ops.int8_conv2d(x, prepacked, 8, out_channels, kernel, groups=groups)


def test_a_weight_that_was_tampered_with_touches_no_other_memory(isa: str) -> None:
    """Its header still fits: the result is that of other weights."""
    x, prepacked = codes(1, 24, 5, 5), ops.int8_conv2d_prepack(codes(24, 1, 3, 3), 24)
    with pytest.raises(RuntimeError, match="must be prepacked for"):
        ops.int8_conv2d(x, prepacked[:-1], 24, 24, 3, groups=24)
    for value in (0x00, 0x7F, 0xFF):
        prepacked[64:] = value
        weight = torch.full((24, 1, 3, 3), value, dtype=torch.uint8).view(torch.int8)
        out = ops.int8_conv2d(x, prepacked, 24, 24, 3, groups=24)
        assert torch.equal(out, sums(x, weight).float())


sizes = st.tuples(st.integers(1, 12), st.one_of(st.integers(1, 12), st.integers(30, 70)))
pairs = st.tuples(st.integers(1, 5), st.integers(1, 5))


@many_examples
@given(
    batch=st.integers(1, 3),
    channels=st.integers(2, 70),
    multiplier=st.sampled_from([1, 1, 1, 2, 3, 5, 16, 19]),
    size=sizes,
    kernel=pairs,
    stride=pairs,
    dilation=pairs,
    padding=st.tuples(st.integers(0, 6), st.integers(0, 6)),
    z=st.integers(-128, 127),
    kind=st.sampled_from(KINDS),
)
def test_any_geometry(
    isa, batch, channels, multiplier, size, kernel, stride, dilation, padding, z, kind
) -> None:
    assume(all(size[i] + 2 * padding[i] > dilation[i] * (kernel[i] - 1) for i in range(2)))
    x, weight = codes(batch, channels, *size), weights(kind, channels * multiplier, 1, *kernel)
    assert_exact(x, weight, z, stride=stride, padding=padding, dilation=dilation)
