from collections.abc import Iterator

import places
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from properties import many_examples

from nncx import ops
from nncx.ops.sign_int8 import sign_int8_reference

FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@pytest.fixture(params=places.CPU_PATHS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """There is no CUDA kernel: bits are what a GPU likes."""
    with places.at(request.param) as path:
        yield path


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Ordinary ones, zeros, infinities, NaN, and the smallest of a format, of both signs."""
    x = torch.randn(shape).to(dtype)
    least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    for i, value in enumerate([0.0, -0.0, torch.inf, -torch.inf, torch.nan, least, -least]):
        x.view(-1)[i * 7 :: 53] = value
    return x


def assert_right(x: torch.Tensor) -> None:
    signs = ops.sign_int8(x)
    assert signs.dtype == torch.int8
    assert signs.tolist() == torch.where(x >= 0, 1, -1).tolist()
    strides = torch.channels_last if x.dim() == 4 else torch.contiguous_format
    assert signs.is_contiguous(memory_format=strides)


@many_examples
@given(
    size=st.tuples(*[st.integers(0, 3), st.integers(0, 40), *[st.integers(0, 20)] * 2]),
    order=st.permutations(range(4)),
    dtype=st.sampled_from(FLOATS),
)
def test_any_image(isa: str, size, order, dtype) -> None:
    assert_right(numbers(*size, dtype=dtype).permute(*order))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(1,), (131,), (3, 70), (2, 3, 33), (0, 3)])
def test_other_dimensions(isa: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = numbers(*shape, dtype=dtype)
    assert_right(x)
    assert_right(x.transpose(0, -1))
    assert torch.equal(sign_int8_reference(x), ops.sign_int8(x))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("x", "must_hold"),
    [
        (torch.ones(3, dtype=torch.int8), "sign_int8: input must be a floating-point type, got "),
        (torch.tensor(1.0), "sign_int8: input must have a dimension, got a number"),
    ],
)
def test_refuses(x: torch.Tensor, must_hold: str, device: str) -> None:
    with pytest.raises(RuntimeError, match=must_hold):
        ops.sign_int8(x.to(device))


def test_opcheck(isa: str) -> None:
    torch.library.opcheck(torch.ops.nncx.sign_int8.default, (numbers(2, 6, 5, 4),))
