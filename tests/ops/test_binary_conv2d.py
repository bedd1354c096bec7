import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from places import CPU_PATHS, broken_weights
from properties import many_examples

from nncx import _C, ops
from nncx.ops.binary_conv2d import binary_conv2d_reference


def sign(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x >= 0, 1.0, -1.0).double()


def pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return value if isinstance(value, tuple) else (value, value)


def expected_dots(x, w, stride=1, padding=0, dilation=1, groups=1, pad_value=0) -> torch.Tensor:
    """torch's own float64 convolution of the signs: exact, and knows nothing of bits."""
    pad_h, pad_w = pair(padding)
    padded = F.pad(sign(x), (pad_w, pad_w, pad_h, pad_h), value=float(pad_value))
    return F.conv2d(padded, sign(w), None, stride, 0, dilation, groups)


def native(x, w, stride=1, padding=0, dilation=1, groups=1, pad_value=0, **epilogue):
    out_channels, kernel_size = w.shape[0], tuple(w.shape[2:])
    weight = ops.binary_conv2d_prepack(ops.pack_signs(w), x.shape[1], groups)
    geometry = (x.shape[1], out_channels, kernel_size, stride, padding, dilation, groups, pad_value)
    return ops.binary_conv2d(ops.pack_signs(x, groups), weight, *geometry, **epilogue)


@pytest.mark.parametrize("channels", [1, 3, 4, 7, 8, 63, 64, 65, 131])
@pytest.mark.parametrize("out_channels", [1, 31, 32, 33, 65])
@pytest.mark.parametrize("pad_value", [0, 1, -1])
def test_channels(isa: str, channels: int, out_channels: int, pad_value: int) -> None:
    x, w = torch.randn(2, channels, 5, 6), torch.randn(out_channels, channels, 3, 3)
    out = native(x, w, padding=1, pad_value=pad_value)
    assert torch.equal(out.double(), expected_dots(x, w, padding=1, pad_value=pad_value))


@pytest.mark.parametrize("pad_value", [0, 1, -1])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (5, 2), (1, 7)])
@pytest.mark.parametrize("stride", [1, 2, (3, 1)])
@pytest.mark.parametrize("padding", [0, 1, (2, 3)])
@pytest.mark.parametrize("dilation", [1, (2, 1)])
def test_geometry(isa: str, kernel, stride, padding, dilation, pad_value) -> None:
    x, w = torch.randn(2, 11, 9, 8), torch.randn(13, 11, *kernel)
    arguments = dict(stride=stride, padding=padding, dilation=dilation, pad_value=pad_value)
    assert torch.equal(native(x, w, **arguments).double(), expected_dots(x, w, **arguments))


@pytest.mark.parametrize("pad_value", [0, 1])
@pytest.mark.parametrize(
    ("channels", "out_channels", "groups"),
    [(6, 4, 2), (66, 99, 3), (24, 24, 24), (8, 24, 8), (130, 66, 2), (128, 128, 2)],
)
def test_groups(isa: str, channels: int, out_channels: int, groups: int, pad_value: int) -> None:
    x, w = torch.randn(2, channels, 7, 5), torch.randn(out_channels, channels // groups, 3, 3)
    arguments = dict(padding=1, groups=groups, pad_value=pad_value)
    assert torch.equal(native(x, w, **arguments).double(), expected_dots(x, w, **arguments))


def test_padding_larger_than_the_image(isa: str) -> None:
    x, w = torch.randn(1, 9, 1, 2), torch.randn(3, 9, 3, 3)
    for pad_value in (0, 1, -1):
        arguments = dict(padding=4, pad_value=pad_value)
        assert torch.equal(native(x, w, **arguments).double(), expected_dots(x, w, **arguments))


@pytest.mark.parametrize(
    ("shape", "out_channels"), [((0, 8, 5, 5), 4), ((2, 8, 5, 5), 0), ((2, 0, 5, 5), 3)]
)
def test_empty(isa: str, shape: tuple[int, ...], out_channels: int) -> None:
    for channels_last, strides in ((True, torch.channels_last), (False, torch.contiguous_format)):
        x, w = torch.randn(shape), torch.randn(out_channels, shape[1], 3, 3)
        out = native(x, w, channels_last=channels_last)
        expected = torch.zeros(shape[0], out_channels, 3, 3).to(memory_format=strides)
        assert out.stride() == expected.stride()
        assert torch.equal(out, expected)


@pytest.mark.parametrize("isa", sorted({*CPU_PATHS} - {"scalar"}), indirect=True)
def test_more_scratch_than_int64_counts_is_refused(isa: str) -> None:
    """The lines of 4096 threads' parts, of 2^31 pixels each, once wrapped around to a few bytes."""
    before = torch.get_num_threads()
    channels = 2**23
    signs = torch.zeros(1, 1, 2, 1, channels // 8, dtype=torch.uint8)
    weight = ops.binary_conv2d_prepack(signs[:, :, :1], channels)
    try:
        torch.set_num_threads(1024)
        with pytest.raises(RuntimeError, match=r"must have memory for a tensor of shape \[4096, "):
            ops.binary_conv2d(
                signs, weight, channels, 1, 1, stride=(1, 2**13), padding=(0, 2**30 - 1)
            )
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
def test_epilogue_is_bit_exact(
    isa: str, groups: int, channels_last: bool, dtype: torch.dtype | None
) -> None:
    x, w = torch.randn(2, 70, 6, 5), torch.randn(38, 70 // groups, 3, 3)
    scale, bias, k = torch.rand(38) * 9, torch.randn(38), torch.rand(2, groups, 6, 5)
    dots = expected_dots(x, w, padding=1, groups=groups).float()
    by_channel = k.repeat_interleave(38 // groups, 1)
    expected = dots * scale[:, None, None] * by_channel + bias[:, None, None]
    arguments = dict(padding=1, groups=groups, channels_last=channels_last)
    assert torch.equal(native(x, w, **arguments), dots)
    arguments |= dict(scale=scale, bias=bias, input_scale=k)
    out = native(x, w, **arguments, out_dtype=dtype)
    assert torch.equal(out, expected.to(dtype or torch.float32))


@pytest.mark.parametrize("channels_last", [True, False])
def test_strides_of_the_output(isa: str, channels_last: bool) -> None:
    x, w = torch.randn(2, 8, 5, 6), torch.randn(7, 8, 3, 3)
    out = native(x, w, channels_last=channels_last)
    strides = torch.channels_last if channels_last else torch.contiguous_format
    assert out.is_contiguous(memory_format=strides)


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (4, 4), (5, 7), (17, 1)])
@pytest.mark.parametrize("out_channels", [1, 7, 8, 9, 70])
def test_contiguous_outputs_of_any_size(isa: str, out_channels: int, size) -> None:
    """Around the 8 x 8 transposition and the 16 pixels of a tile, which must not leave an image."""
    x, w = torch.randn(3, 5, *size), torch.randn(out_channels, 5, 1, 1)
    out = native(x, w, channels_last=False)
    assert torch.equal(out.double(), expected_dots(x, w))


def test_reference_agrees(isa: str) -> None:
    x, w = torch.randn(2, 66, 6, 5), torch.randn(9, 22, 3, 2)
    geometry = (66, 9, (3, 2), (2, 1), (1, 2), (1, 2), 3, -1)
    epilogue = dict(scale=torch.rand(9), bias=torch.randn(9), out_dtype=torch.bfloat16)
    packed, weight = ops.pack_signs(x, 3), ops.pack_signs(w)
    prepacked = ops.binary_conv2d_prepack(weight, 66, 3)
    expected = binary_conv2d_reference(packed, weight, *geometry, **epilogue)
    assert torch.equal(ops.binary_conv2d(packed, prepacked, *geometry, **epilogue), expected)


def test_threads_and_repetitions_give_the_same_bits(isa: str) -> None:
    x, w, scale = torch.randn(3, 96, 29, 27), torch.randn(80, 96, 3, 3), torch.rand(80)
    before = torch.get_num_threads()
    try:
        outputs = []
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            outputs.append(native(x, w, padding=1, scale=scale))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])


def test_weight_of_another_path_is_refused() -> None:
    if "avx2" not in _C.supported_isas():
        pytest.skip("this CPU has no avx2")
    before = _C.isa()
    packed, weight = (
        ops.pack_signs(torch.randn(1, 8, 4, 4)),
        ops.pack_signs(torch.randn(2, 8, 3, 3)),
    )
    try:
        _C.set_isa("scalar")
        prepacked = ops.binary_conv2d_prepack(weight, 8)
        _C.set_isa("avx2")
        with pytest.raises(
            RuntimeError, match="path of this process, binary/avx2, got 'binary/scalar'"
        ):
            ops.binary_conv2d(packed, prepacked, 8, 2, 3)
    finally:
        _C.set_isa(before)


def test_weight_of_another_geometry_is_refused(isa: str) -> None:
    packed = ops.pack_signs(torch.randn(1, 8, 4, 4))
    prepacked = ops.binary_conv2d_prepack(ops.pack_signs(torch.randn(2, 8, 3, 3)), 8)
    with pytest.raises(RuntimeError, match="must be prepacked for groups=1, out_channels/groups=3"):
        ops.binary_conv2d(packed, prepacked, 8, 3, 3)
    for broken in broken_weights(prepacked, isa):
        with pytest.raises(RuntimeError, match="binary_conv2d: weight must"):
            ops.binary_conv2d(packed, broken, 8, 2, 3)


pairs = st.tuples(st.integers(1, 4), st.integers(1, 4))


@many_examples
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
    pad_value=st.sampled_from([-1, 0, 1]),
    channels_last=st.booleans(),
    out_channels_last=st.booleans(),
)
def test_any_geometry(
    isa, batch, groups, channels, outputs, size, kernel, stride, dilation, padding, pad_value,
    channels_last, out_channels_last,
) -> None:  # fmt: skip
    assume(all(size[i] + 2 * padding[i] > dilation[i] * (kernel[i] - 1) for i in range(2)))
    x = torch.randn(batch, groups * channels, *size)
    w = torch.randn(groups * outputs, channels, *kernel)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    arguments = dict(
        stride=stride, padding=padding, dilation=dilation, groups=groups, pad_value=pad_value
    )
    out = native(x, w, **arguments, channels_last=out_channels_last)
    assert torch.equal(out.double(), expected_dots(x, w, **arguments))
