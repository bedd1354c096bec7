import pytest
import torch
import torch.nn.functional as F
from codebooks import assert_within_bound, random_weight
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from nncx import ops
from nncx.ops.codebook_conv2d import codebook_conv2d_reference

per_channel = pytest.mark.parametrize("per_channel", [False, True], ids=["layer", "channel"])


def native(x, weight, bits, stride=1, padding=0, dilation=1, groups=1, **epilogue):
    out_channels, kernel_size = weight.values.shape[0], tuple(weight.values.shape[2:])
    shape = (bits, x.shape[1], out_channels, kernel_size)
    prepacked = ops.codebook_conv2d_prepack(weight.codes, *shape, groups)
    geometry = (*shape, stride, padding, dilation, groups)
    return ops.codebook_conv2d(x, prepacked, weight.codebook, *geometry, **epilogue)


def assert_right(out, x, weight, stride=1, padding=0, dilation=1, groups=1, bias=None) -> None:
    """Against torch's own float64 convolution of the looked-up weights."""
    geometry = (stride, padding, dilation, groups)
    bias = None if bias is None else bias.double()
    exact = F.conv2d(x.double(), weight.values, bias, *geometry)
    absolute = None if bias is None else bias.abs()
    magnitude = F.conv2d(x.double().abs(), weight.values.abs(), absolute, *geometry)
    assert_within_bound(out, exact, magnitude, weight.values[0].numel() + 2)


@pytest.mark.parametrize("bits", range(1, 9))
@per_channel
@pytest.mark.parametrize("channels", [1, 3, 8, 63, 65])
def test_channels(isa: str, channels: int, bits: int, per_channel: bool) -> None:
    for out_channels in (1, 15, 16, 17, 33):
        x = torch.randn(2, channels, 5, 6)
        weight = random_weight((out_channels, channels, 3, 3), bits, per_channel)
        assert_right(native(x, weight, bits, padding=1), x, weight, padding=1)


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (5, 2), (1, 7)])
@pytest.mark.parametrize("stride", [1, 2, (3, 1)])
@pytest.mark.parametrize("padding", [0, 1, (2, 3)])
@pytest.mark.parametrize("dilation", [1, (2, 1)])
def test_geometry(isa: str, kernel, stride, padding, dilation) -> None:
    bits = 3
    x, weight = torch.randn(2, 11, 9, 8), random_weight((13, 11, *kernel), bits, False)
    arguments = dict(stride=stride, padding=padding, dilation=dilation)
    assert_right(native(x, weight, bits, **arguments), x, weight, **arguments)


@per_channel
@pytest.mark.parametrize("bits", [1, 2, 5])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_few_pixels(isa: str, memory_format, groups: int, bits: int, per_channel: bool) -> None:
    x = torch.randn(2, 140, 2, 3).to(memory_format=memory_format)
    weight = random_weight((86, 140 // groups, 1, 1), bits, per_channel)
    assert_right(native(x, weight, bits, groups=groups), x, weight, groups=groups)


@per_channel
@pytest.mark.parametrize("bits", [1, 2, 5])
@pytest.mark.parametrize(
    ("channels", "out_channels", "groups"),
    [(6, 4, 2), (66, 99, 3), (24, 24, 24), (8, 24, 8), (130, 66, 2)],
)
def test_groups(isa: str, channels: int, out_channels: int, groups: int, bits, per_channel) -> None:
    x = torch.randn(2, channels, 7, 5)
    weight = random_weight((out_channels, channels // groups, 3, 3), bits, per_channel)
    arguments = dict(padding=1, groups=groups)
    assert_right(native(x, weight, bits, **arguments), x, weight, **arguments)


def test_padding_larger_than_the_image(isa: str) -> None:
    x, weight = torch.randn(1, 9, 1, 2), random_weight((3, 9, 3, 3), 2, False)
    assert_right(native(x, weight, 2, padding=4), x, weight, padding=4)


@pytest.mark.parametrize(
    ("shape", "out_channels"), [((0, 8, 5, 5), 4), ((2, 8, 5, 5), 0), ((2, 0, 5, 5), 3)]
)
@pytest.mark.parametrize("channels_last", [False, True])
def test_empty(isa: str, shape: tuple[int, ...], out_channels: int, channels_last: bool) -> None:
    weight = random_weight((out_channels, shape[1], 3, 3), 3, False)
    x = torch.randn(shape)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    out = native(x, weight, 3)
    assert out.shape == (shape[0], out_channels, 3, 3)
    assert not out.any()


def strided_images() -> dict[str, torch.Tensor]:
    x = torch.randn(2, 6, 9, 8)
    return {
        "contiguous": x,
        "channels_last": x.to(memory_format=torch.channels_last),
        "sliced": torch.randn(2, 6, 9, 16)[..., ::2],
        "transposed": x.transpose(2, 3).contiguous().transpose(2, 3),
        "channels_last, sliced": torch.randn(2, 9, 8, 12)[..., ::2].permute(0, 3, 1, 2),
        "one channel": torch.randn(2, 1, 9, 8).to(memory_format=torch.channels_last),
        "one pixel": torch.randn(2, 6, 1, 1).to(memory_format=torch.channels_last),
        "expanded": torch.randn(1, 6, 9, 8).expand(3, -1, -1, -1),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", strided_images())
def test_memory_formats(isa: str, name: str, dtype: torch.dtype) -> None:
    """Any strides in; channels_last out where the input is that, else contiguous."""
    x = strided_images()[name].to(dtype)
    weight = random_weight((37, x.shape[1], 1, 1), 2, False)
    out = native(x, weight, 2)
    assert_right(out, x, weight)
    kept = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    assert out.is_contiguous(memory_format=torch.channels_last if kept else torch.contiguous_format)


@pytest.mark.parametrize("out_dtype", [None, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_epilogue(isa: str, channels_last: bool, out_dtype: torch.dtype | None) -> None:
    x, weight = torch.randn(3, 20, 13, 11), random_weight((50, 20, 3, 3), 4, True)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    bias = torch.randn(50)
    plain = native(x, weight, 4, padding=1, bias=bias)
    assert_right(plain, x, weight, padding=1, bias=bias)
    out = native(x, weight, 4, padding=1, bias=bias, activation="relu6", out_dtype=out_dtype)
    assert torch.equal(out, F.relu6(plain).to(out_dtype or torch.float32))


def test_nan_and_infinity_pass(isa: str) -> None:
    x, weight = torch.randn(1, 5, 6, 6), random_weight((20, 5, 3, 3), 1, False)
    x[0, 2, 1, 1], x[0, 3, 4, 4] = torch.nan, torch.inf
    expected = F.conv2d(x, weight.values.float(), padding=1)
    out = native(x, weight, 1, padding=1)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("bits", range(1, 9))
def test_reference_agrees(isa: str, bits: int) -> None:
    x, weight = torch.randn(2, 66, 6, 5), random_weight((9, 22, 3, 2), bits, True)
    geometry = (bits, 66, 9, (3, 2), (2, 1), (1, 2), (1, 2), 3)
    epilogue = dict(bias=torch.randn(9), activation="relu", out_dtype=torch.float32)
    prepacked = ops.codebook_conv2d_prepack(weight.codes, bits, 66, 9, (3, 2), 3)
    expected = codebook_conv2d_reference(x, weight.codes, weight.codebook, *geometry, **epilogue)
    out = ops.codebook_conv2d(x, prepacked, weight.codebook, *geometry, **epilogue)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [1, 4])
@pytest.mark.parametrize("shape", [(3, 48, 29, 27), (1, 40, 7, 7), (1, 200, 1, 1)])
def test_threads_and_repetitions_give_the_same_bits(isa: str, shape, bits: int) -> None:
    x, weight = torch.randn(shape), random_weight((80, shape[1], 3, 3), bits, False)
    before = torch.get_num_threads()
    try:
        outputs = []
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            outputs.append(native(x, weight, bits, padding=1))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])


def test_memory_formats_give_the_same_bits(isa: str) -> None:
    x, weight = torch.randn(2, 30, 19, 17), random_weight((40, 30, 3, 3), 3, False)
    out = native(x, weight, 3, padding=1)
    last = native(x.to(memory_format=torch.channels_last), weight, 3, padding=1)
    assert torch.equal(out, last)


def test_weight_of_another_geometry_is_refused(isa: str) -> None:
    x, codebook = torch.randn(1, 8, 4, 4), torch.zeros(2)
    codes = torch.zeros(2 * 8 * 9 // 8, dtype=torch.uint8)
    prepacked = ops.codebook_conv2d_prepack(codes, 1, 8, 2, 3)
    with pytest.raises(RuntimeError, match="must be prepacked for groups=1, out_channels/groups=3"):
        ops.codebook_conv2d(x, prepacked, codebook, 1, 8, 3, 3)
    with pytest.raises(RuntimeError, match="prepacked for .*taps=1, in_channels/groups=8, .*got"):
        ops.codebook_conv2d(x, prepacked, codebook, 1, 8, 2, 1)


pairs = st.tuples(st.integers(1, 4), st.integers(1, 4))


@settings(
    max_examples=80,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    batch=st.integers(1, 3),
    groups=st.integers(1, 4),
    channels=st.integers(1, 70),
    outputs=st.integers(1, 40),
    size=st.tuples(st.integers(1, 11), st.integers(1, 11)),
    kernel=pairs,
    stride=pairs,
    dilation=pairs,
    padding=st.tuples(st.integers(0, 5), st.integers(0, 5)),
    bits=st.integers(1, 8),
    per_channel=st.booleans(),
    channels_last=st.booleans(),
)
def test_any_geometry(
    isa, batch, groups, channels, outputs, size, kernel, stride, dilation, padding, bits,
    per_channel, channels_last,
) -> None:  # fmt: skip
    assume(all(size[i] + 2 * padding[i] > dilation[i] * (kernel[i] - 1) for i in range(2)))
    x = torch.randn(batch, groups * channels, *size)
    weight = random_weight((groups * outputs, channels, *kernel), bits, per_channel)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    arguments = dict(stride=stride, padding=padding, dilation=dilation, groups=groups)
    assert_right(native(x, weight, bits, **arguments), x, weight, **arguments)
