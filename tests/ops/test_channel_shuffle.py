import pytest
import torch
import torch.nn.functional as F
from float_images import strided_images
from hypothesis import given
from hypothesis import strategies as st
from places import CPU_PATHS
from properties import many_examples

from nncx import ops
from nncx.ops.channel_shuffle import channel_shuffle_reference

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
    "int8": torch.int8,
    "bool": torch.bool,
    "int64": torch.int64,
    "complex64": torch.complex64,
}
layouts = pytest.mark.parametrize("layout", ["nchw", "nhwc"])


def images(*shape: int, layout: str = "nchw", dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = (torch.randn(shape) * 100).to(dtype)
    return x.to(memory_format=torch.channels_last) if layout == "nhwc" else x


def expected(x: torch.Tensor, groups: int) -> torch.Tensor:
    """Channel by channel, in words of the definition."""
    out = torch.empty_like(x)
    channels = x.shape[1] // groups
    for c in range(x.shape[1]):
        out[:, c % channels * groups + c // channels] = x[:, c]
    return out


@layouts
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 3, 7, 8, 9, 16, 17, 80])
@pytest.mark.parametrize("groups", [1, 2, 3, 4, 5, 8, 9, 16, 17])
def test_channels(isa: str, groups: int, channels: int, dtype: str, layout: str) -> None:
    x = images(2, groups * channels, 3, 5, layout=layout, dtype=DTYPES[dtype])
    out = ops.channel_shuffle(x, groups)
    assert out.dtype == x.dtype and torch.equal(out, expected(x, groups))
    assert torch.equal(out, channel_shuffle_reference(x, groups))
    assert torch.equal(ops.channel_shuffle(out, channels), x)


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_as_torch(isa: str, groups: int) -> None:
    for shape in ((2, 6, 3), (2, 6, 3, 4), (2, 6, 3, 4, 2), (1, 6, 1, 1)):
        x = torch.randn(shape)
        assert torch.equal(ops.channel_shuffle(x, groups), F.channel_shuffle(x, groups))


@pytest.mark.parametrize("name", sorted(strided_images().keys() - {"one channel"}))
def test_memory_formats(isa: str, name: str) -> None:
    """Any strides in; channels_last out where the input is that, else contiguous."""
    x = strided_images()[name]
    out = ops.channel_shuffle(x, 3)
    assert torch.equal(out, expected(x, 3))
    kept = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    assert out.is_contiguous(memory_format=torch.channels_last if kept else torch.contiguous_format)


@layouts
@pytest.mark.parametrize("shape", [(0, 6, 5, 5), (2, 0, 5, 5), (2, 6, 0, 5)], ids=str)
def test_empty(isa: str, shape: tuple[int, ...], layout: str) -> None:
    assert ops.channel_shuffle(images(*shape, layout=layout), 3).shape == shape


@layouts
@pytest.mark.parametrize("groups", [3, 40])
def test_threads_write_their_own(isa: str, groups: int, layout: str) -> None:
    x = images(3, 120, 31, 29, layout=layout)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(ops.channel_shuffle(x, groups), expected(x, groups))
    finally:
        torch.set_num_threads(before)


def test_neighbouring_memory_is_left_alone(isa: str) -> None:
    """A part of a batch: what lies around it must not be read as numbers, nor written."""
    x = images(3, 24, 5, 7, layout="nhwc")
    whole = ops.channel_shuffle(x, 3)
    assert torch.equal(ops.channel_shuffle(x[1:2], 3), whole[1:2])


@pytest.mark.parametrize("isa", CPU_PATHS, indirect=True)
@layouts
def test_gradient_is_shuffled_back(isa: str, layout: str) -> None:
    x = images(2, 12, 3, 5, layout=layout).requires_grad_()
    weights = torch.randn(2, 12, 3, 5)
    (gradient,) = torch.autograd.grad((ops.channel_shuffle(x, 3) * weights).sum(), x)
    assert torch.equal(gradient, ops.channel_shuffle(weights, 4))


def test_gradcheck_in_double() -> None:
    x = torch.randn(2, 6, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: ops.channel_shuffle(x, 3), x)
    assert torch.autograd.gradgradcheck(lambda x: ops.channel_shuffle(x, 3), x)


@many_examples
@given(
    batch=st.integers(1, 3),
    groups=st.integers(1, 20),
    channels=st.integers(1, 40),
    size=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    layout=st.sampled_from(["nchw", "nhwc"]),
    dtype=st.sampled_from(list(DTYPES)),
)
def test_any_size(isa, batch, groups, channels, size, layout, dtype) -> None:
    x = images(batch, groups * channels, *size, layout=layout, dtype=DTYPES[dtype])
    assert torch.equal(ops.channel_shuffle(x, groups), expected(x, groups))
