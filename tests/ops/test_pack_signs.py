import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from properties import many_examples

from nncx import ops
from nncx.ops.pack_signs import pack_signs_reference

SIZES = [0, 1, 7, 8, 31, 63, 64, 65, 127, 131]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def bits_by_hand(packed: torch.Tensor, channels: int) -> torch.Tensor:
    """The stored bits, read byte by byte: independent of the op and of its reference."""
    flat = packed.flatten(0, -2)
    rows = [[(int(row[c // 8]) >> (c % 8)) & 1 for c in range(channels)] for row in flat.tolist()]
    return torch.tensor(rows, dtype=torch.bool).reshape(*packed.shape[:-1], channels)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", SIZES)
def test_rows(isa: str, k: int, dtype: torch.dtype) -> None:
    x = torch.randn(5, k).to(dtype)
    packed = ops.pack_signs(x)
    assert packed.shape == (5, (k + 63) // 64 * 8)
    assert torch.equal(packed, pack_signs_reference(x))
    assert torch.equal(bits_by_hand(packed, k), x >= 0)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        ((1, 1, 1, 1), 1),
        ((2, 3, 5, 7), 1),
        ((2, 64, 4, 9), 1),
        ((1, 65, 3, 17), 1),
        ((2, 66, 8, 8), 3),
        ((3, 12, 2, 11), 12),
        ((0, 8, 4, 4), 1),
        ((2, 8, 0, 4), 2),
        ((2, 0, 3, 3), 1),
    ],
)
def test_images(
    isa: str, shape: tuple[int, ...], groups: int, dtype: torch.dtype, channels_last: bool
) -> None:
    x = torch.randn(shape).to(dtype)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    packed = ops.pack_signs(x, groups)
    n, c, h, w = shape
    assert packed.shape == (n, h, w, groups, (c // groups + 63) // 64 * 8)
    assert torch.equal(packed, pack_signs_reference(x, groups))


def test_padding_bits_are_zero(isa: str) -> None:
    packed = ops.pack_signs(torch.ones(3, 65))
    assert packed[:, :8].eq(255).all() and packed[:, 8].eq(1).all() and packed[:, 9:].eq(0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zeros_infinities_and_nan(isa: str, dtype: torch.dtype) -> None:
    values = [0.0, -0.0, float("inf"), float("-inf"), float("nan"), -float("nan"), 1e-7, -1e-7]
    x = torch.tensor(values * 9).to(dtype)
    if dtype == torch.float16:  # the smallest subnormals of half
        x[6::8], x[7::8] = 6e-8, -6e-8
    expected = torch.tensor([1, 1, 1, 0, 0, 0, 1, 0] * 9, dtype=torch.bool)
    rows = ops.pack_signs(x.expand(3, -1))
    image = ops.pack_signs(x.reshape(1, 1, 1, -1))  # the pixels-innermost loop
    assert torch.equal(bits_by_hand(rows, 72), expected.expand(3, -1))
    assert torch.equal(image.flatten(1)[0, ::8].bool(), expected)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, ::2],
        lambda x: x[:, :, ::2],
        lambda x: x[:, :, :, 1::3],
        lambda x: x.transpose(1, 3),
        lambda x: x.transpose(2, 3),
        lambda x: x.flip(0).expand(-1, -1, -1, -1),
        lambda x: x[:, :1].expand(-1, 20, -1, -1),
    ],
)
def test_strided_views(isa: str, view) -> None:
    x = view(torch.randn(2, 20, 12, 18))
    assert torch.equal(ops.pack_signs(x), pack_signs_reference(x.contiguous()))


@pytest.mark.parametrize("offset", [0, 1, 2, 3, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_address(isa: str, dtype: torch.dtype, offset: int) -> None:
    """Wide loads need numbers that are aligned, or have to be left."""
    numbers = torch.randn(offset + 19_200).to(dtype)[offset:]
    matrix = numbers.view(2, 9600)
    image = numbers.view(2, 96, 10, 10)
    last = numbers.view(3, 10, 10, 64).permute(0, 3, 1, 2)
    assert torch.equal(ops.pack_signs(matrix), pack_signs_reference(matrix))
    assert torch.equal(ops.pack_signs(matrix[:, :-1]), pack_signs_reference(matrix[:, :-1]))
    assert torch.equal(ops.pack_signs(image, 2), pack_signs_reference(image, 2))
    assert torch.equal(ops.pack_signs(last, 2), pack_signs_reference(last, 2))


def test_strided_rows(isa: str) -> None:
    x = torch.randn(70, 33).T
    assert torch.equal(ops.pack_signs(x), pack_signs_reference(x))


def test_many_pixels_are_split_over_threads(isa: str) -> None:
    x = torch.randn(3, 40, 61, 53)
    expected = pack_signs_reference(x)
    for threads in (1, 2, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            assert torch.equal(ops.pack_signs(x), expected)
        finally:
            torch.set_num_threads(before)


def test_subnormals_under_flush_to_zero_agree_in_the_whole_row(isa: str) -> None:
    x = torch.full((1, 19), -1e-40).to(torch.bfloat16)
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush subnormals")
    try:
        bits = bits_by_hand(ops.pack_signs(x), 19)
    finally:
        torch.set_flush_denormal(False)
    assert bits.all() or not bits.any()


@many_examples
@given(
    sizes=st.tuples(st.integers(0, 3), st.integers(1, 70), st.integers(0, 9), st.integers(0, 9)),
    groups=st.integers(1, 4),
    order=st.permutations(range(4)),
    steps=st.tuples(*[st.integers(1, 3)] * 4),
    expanded=st.sets(st.integers(0, 3)),
    matrix=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_any_strides(isa, sizes, groups, order, steps, expanded, matrix, dtype) -> None:
    """A view of a larger tensor: its dimensions in any order, with steps, some of stride 0."""
    shape = [sizes[0], sizes[1] * groups, *sizes[2:]]
    stored = [shape[dim] * steps[dim] for dim in order]
    x = torch.randn(stored).to(dtype).permute([order.index(dim) for dim in range(4)])
    x = x[tuple(slice(None, None, step) for step in steps)]
    for dim in expanded:
        x = x.narrow(dim, 0, min(1, shape[dim])).expand(shape)
    if matrix:
        if not (shape[2] and shape[3]):
            return
        x, groups = x[:, :, -1, -1], 1
    channels = x.shape[1] // groups
    signs = (x if matrix else x.permute(0, 2, 3, 1).unflatten(3, (groups, channels))) >= 0
    packed = ops.pack_signs(x, groups)
    assert packed.shape == (*signs.shape[:-1], (channels + 63) // 64 * 8)
    assert torch.equal(bits_by_hand(packed, channels), signs)
