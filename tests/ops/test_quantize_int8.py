import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from properties import many_examples

from nncx import ops

FLOATS = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


def expected(x: torch.Tensor, scale: float, zero_point: int) -> torch.Tensor:
    """The formula in NumPy, each operation in float32."""
    with np.errstate(all="ignore"):
        product = x.float().numpy() * (np.float32(1) / np.float32(scale))
        code = np.clip(np.rint(product) + np.float32(zero_point), -128, 127)
    return torch.from_numpy(np.where(np.isnan(product), zero_point, code).astype(np.int8))


def quantize(x: torch.Tensor, scale: float, zero_point: int) -> torch.Tensor:
    return ops.quantize_int8(x, torch.tensor(scale), torch.tensor(zero_point, dtype=torch.int8))


def numbers(*shape: int) -> torch.Tensor:
    """Ordinary ones, ties, infinities, NaN, and what float16 cannot hold."""
    x = torch.randn(shape) * 2
    special = [0.5, 1.5, -2.5, torch.inf, -torch.inf, torch.nan, 1e30, -1e-40, -0.0]
    flat = x.view(-1)
    for i, value in enumerate(special):
        flat[i * 7 :: 67] = value
    return x


@FLOATS
@pytest.mark.parametrize("zero_point", [-128, -3, 0, 127])
@pytest.mark.parametrize("scale", [1.0, 0.031, 1e-38, 1e-40, 1e30, 3e38])
def test_values(isa: str, scale: float, zero_point: int, dtype: torch.dtype) -> None:
    for shape in ((1,), (3, 131), (2, 37, 9, 11), (1, 16, 8, 8), (2, 3, 5)):
        x = numbers(*shape).to(dtype)
        assert torch.equal(quantize(x, scale, zero_point), expected(x, scale, zero_point))


def test_ties_go_to_even(isa: str) -> None:
    x = torch.arange(-200, 200) / 2
    assert torch.equal(quantize(x, 1.0, 0), x.round().clamp(-128, 127).to(torch.int8))
    assert quantize(torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5]), 1.0, 0).tolist() == [0, 2, 2, 0, -2]


@pytest.mark.parametrize("zero_point", range(-128, 128))
def test_every_zero_point_is_what_0_and_nan_become(isa: str, zero_point: int) -> None:
    x = torch.tensor([0.0, torch.nan, -torch.inf, torch.inf]).repeat(9)
    assert quantize(x, 0.1, zero_point)[:4].tolist() == [zero_point, zero_point, -128, 127]
    assert torch.equal(quantize(x, 0.1, zero_point), expected(x, 0.1, zero_point))


def strided(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    x = numbers(2, 37, 9, 12).to(dtype)
    return {
        "contiguous": x,
        "channels_last": x.to(memory_format=torch.channels_last),
        "every second column": x[..., ::2],
        "some channels of channels_last": x.to(memory_format=torch.channels_last)[:, 3:30],
        "transposed": x.transpose(2, 3),
        "flipped dimensions": x.permute(3, 2, 1, 0),
        "expanded": x[:1].expand(3, -1, -1, -1),
        "cropped": x[:, :, 1:8, 2:11],
        "rows": numbers(9, 70).to(dtype).T,
        "three dimensions": numbers(4, 5, 33).to(dtype).transpose(0, 1),
    }


@FLOATS
@pytest.mark.parametrize("name", strided(torch.float32))
def test_any_strides(isa: str, name: str, dtype: torch.dtype) -> None:
    x = strided(dtype)[name]
    codes = quantize(x, 0.03, 5)
    assert torch.equal(codes, expected(x, 0.03, 5))
    format = torch.channels_last if x.dim() == 4 else torch.contiguous_format
    assert codes.is_contiguous(memory_format=format)


@FLOATS
@pytest.mark.parametrize("offset", [0, 1, 2, 3, 4, 8])
def test_any_address(isa: str, offset: int, dtype: torch.dtype) -> None:
    """Wide loads need numbers that are aligned, or have to be left."""
    x = numbers(offset + 19_200).to(dtype)[offset:]
    image = x.view(2, 96, 10, 10)
    last = x.view(3, 10, 10, 64).permute(0, 3, 1, 2)
    for view in (x, x[:-1], x.view(2, 9600)[:, :-1], image, image[:, 1:], last, last[:, :-4]):
        assert torch.equal(quantize(view, 0.03, 5), expected(view, 0.03, 5))
    rows, scale = x.view(80, 240), torch.rand(80) + 0.01
    codes = ops.quantize_int8(rows, scale, torch.zeros(80, dtype=torch.int8))
    assert torch.equal(codes[7], expected(rows[7], scale[7].item(), 0))
    assert torch.equal(codes[79], expected(rows[79], scale[79].item(), 0))


@pytest.mark.parametrize("columns", [1, 7, 8, 31, 32, 33, 100])
def test_a_scale_for_each_row(isa: str, columns: int) -> None:
    x = numbers(23, columns)
    scale, zero_point = torch.rand(23) + 0.01, torch.randint(-128, 128, (23,)).to(torch.int8)
    codes = ops.quantize_int8(x, scale, zero_point)
    for i in range(23):
        assert torch.equal(codes[i], expected(x[i], scale[i].item(), zero_point[i].item()))
    assert torch.equal(codes, ops.quantize_int8(x.T.contiguous().T, scale, zero_point))


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 3, 3), (0, 3, 2, 2), (2, 3, 0, 1)])
def test_empty(isa: str, shape: tuple[int, ...]) -> None:
    codes = quantize(torch.ones(shape), 1.0, 0)
    assert codes.shape == shape and codes.dtype == torch.int8


@pytest.mark.parametrize("shape", [(3, 48, 29, 27), (5000, 7), (1, 100_000)])
def test_threads_and_repetitions_give_the_same_bits(isa: str, shape: tuple[int, ...]) -> None:
    x, before = torch.randn(shape), torch.get_num_threads()
    try:
        codes = []
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            codes.append(quantize(x, 0.01, -7))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(codes[0], other) for other in codes[1:])


@many_examples
@given(
    size=st.tuples(*[st.integers(1, 3), st.integers(1, 40), *[st.integers(1, 20)] * 2]),
    order=st.permutations(range(4)),
    scale=st.floats(2**-10, 10, width=32),
    zero_point=st.integers(-128, 127),
)
def test_any_image(isa, size, order, scale, zero_point) -> None:
    x = numbers(*size).permute(*order)
    assert torch.equal(quantize(x, scale, zero_point), expected(x, scale, zero_point))
