import math
from collections.abc import Iterator

import hashes
import numpy as np
import places
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from properties import many_examples

from nncx import ops
from nncx.ops.hashed_weight import (
    hash_places,
    hashed_bucket_sums_reference,
    hashed_weight_reference,
)

# Of seed 0 and 98,000 buckets, of seed -7 and 2**31 - 1, for 2 x 6 weights.
KNOWN_PLACES = [
    [[169210, 22713, 19183, 6146, 91424, 192312], [82230, 160635, 6704, 133324, 147304, 84736]],
    [
        [2364313527, 4244367006, 2100504271, 3380262231, 536545284, 252519676],
        [1569771203, 3472530173, 1757096278, 3489662074, 561003185, 440746100],
    ],
]
SEEDS = [0, 1, -1, 2**63 - 1, -(2**63), 12345]


@pytest.fixture(params=places.CPU_PATHS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """There is no CUDA kernel: torch does it there."""
    with places.at(request.param) as path:
        yield path


def expected_sums(values: torch.Tensor, seed: int, buckets: int) -> torch.Tensor:
    """In the order of the rows, as the op says."""
    place = hashes.places(seed, buckets, values.shape[1], values.shape[0]).ravel()
    sums = np.zeros(buckets, values.numpy().dtype)
    np.add.at(
        sums, place // 2, np.where(place % 2, -values.numpy().ravel(), values.numpy().ravel())
    )
    return torch.from_numpy(sums)


# ---------------------------------------------------------------------------------------------
# the hash


def test_the_hash_is_the_one_of_the_files() -> None:
    """A contract: a network that was saved is worthless under another hash."""
    assert hashes.places(0, 98_000, 6, 2).tolist() == KNOWN_PLACES[0]
    assert hashes.places(-7, 2**31 - 1, 6, 2).tolist() == KNOWN_PLACES[1]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("buckets", [1, 2, 1000, 98_000, 2**20, 2**31 - 1])
def test_torch_hashes_alike(buckets: int, seed: int) -> None:
    ours = hash_places(seed, buckets, 67, 33, "cpu")
    assert np.array_equal(ours.numpy(), hashes.places(seed, buckets, 67, 33))
    assert 0 <= ours.min() and ours.max() < 2 * buckets


def _deviations(count: float, expected: float, variance: float) -> float:
    return (count - expected) / math.sqrt(variance)


def _chi_square_deviations(of: np.ndarray, kinds: int) -> float:
    """From uniform, in standard deviations (Wilson and Hilferty, 1931)."""
    mean, freedom = of.size / kinds, kinds - 1
    chi_square = ((np.bincount(of.ravel(), minlength=kinds) - mean) ** 2 / mean).sum()
    variance = 2 / (9 * freedom)
    return _deviations((chi_square / freedom) ** (1 / 3), 1 - variance, variance)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("buckets", "in_features", "out_features"),
    [(98_000, 784, 1000), (12_250, 784, 1000), (157, 1000, 10), (2, 3, 5000), (64, 1, 4096)],
)
def test_buckets_and_signs_are_uniform(
    buckets: int, in_features: int, out_features: int, seed: int
) -> None:
    """Chi-square of the buckets, of buckets with signs, and of the signs alone."""
    place = hashes.places(seed, buckets, in_features, out_features)
    for kinds, of in ((buckets, place // 2), (2 * buckets, place), (2, place % 2)):
        assert abs(_chi_square_deviations(of, kinds)) < 4


def test_places_are_independent() -> None:
    """Neighbours in a row, rows, and rows shifted against each other share no more buckets, and no
    more signs, than chance lets them; nor do two seeds, or a bucket count and its double."""
    buckets, k, o = 1000, 784, 1000
    place = hashes.places(3, buckets, k, o)
    others = [
        *((place[:, :-d], place[:, d:]) for d in (1, 2, 16)),
        *((place[:-d], place[d:]) for d in (1, 2, 500)),
        *((place[:-1, :-d], place[1:, d:]) for d in (1, 2, 3)),
        *((place, hashes.places(seed, buckets, k, o)) for seed in (2, 4, 3 + 2**32)),
        (place, hashes.places(3, buckets - 1, k, o)[::-1]),
    ]
    for a, b in others:
        same_bucket, same_sign = (a // 2 == b // 2).sum(), (a % 2 == b % 2).sum()
        assert abs(_deviations(same_bucket, a.size / buckets, a.size / buckets)) < 4
        assert abs(_deviations(same_sign, a.size / 2, a.size / 4)) < 4


# ---------------------------------------------------------------------------------------------
# the ops


@pytest.mark.parametrize("o", [0, 1, 2, 15, 16, 17, 33])
def test_sizes(isa: str, o: int) -> None:
    for k in (0, 1, 7, 8, 9, 15, 16, 17, 63, 64, 65, 131):
        for count in (1, 5, 1000):
            buckets, values = torch.randn(count), torch.randn(o, k)
            weight = ops.hashed_weight(buckets, 3, k, o)
            assert torch.equal(weight, hashes.virtual_weight(buckets, 3, k, o))
            assert torch.equal(weight, hashed_weight_reference(buckets, 3, k, o))
            sums = ops.hashed_bucket_sums(values, 3, count)
            assert torch.equal(sums, expected_sums(values, 3, count))
            assert torch.equal(sums, hashed_bucket_sums_reference(values, 3, count))


@many_examples
@given(
    o=st.integers(0, 40),
    k=st.integers(0, 100),
    count=st.integers(1, 5000),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_any_size(isa: str, o: int, k: int, count: int, seed: int) -> None:
    buckets, values = torch.randn(count), torch.randn(o, k)
    weight = ops.hashed_weight(buckets, seed, k, o)
    assert torch.equal(weight, hashes.virtual_weight(buckets, seed, k, o))
    assert torch.equal(
        ops.hashed_bucket_sums(values, seed, count), expected_sums(values, seed, count)
    )


def test_large(isa: str) -> None:
    buckets, values = torch.randn(98_000), torch.randn(1000, 784)
    weight = ops.hashed_weight(buckets, 5, 784, 1000)
    assert torch.equal(weight, hashes.virtual_weight(buckets, 5, 784, 1000))
    assert torch.equal(ops.hashed_bucket_sums(values, 5, 98_000), expected_sums(values, 5, 98_000))


def test_odd_numbers_pass(isa: str) -> None:
    """Zeros keep their signs; a NaN of a bucket is in all of its weights, and in no other."""
    buckets = torch.tensor([0.0, -0.0, torch.nan, torch.inf, 1e-45])
    weight = ops.hashed_weight(buckets, 0, 40, 3)
    expected = hashed_weight_reference(buckets, 0, 40, 3)
    torch.testing.assert_close(weight, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(weight.signbit(), expected.signbit())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_dtypes_are_torchs(isa: str, dtype: torch.dtype) -> None:
    buckets, values = torch.randn(9).to(dtype), torch.randn(5, 33).to(dtype)
    weight, sums = ops.hashed_weight(buckets, 1, 33, 5), ops.hashed_bucket_sums(values, 1, 9)
    assert weight.dtype == sums.dtype == dtype
    assert torch.equal(weight, hashes.virtual_weight(buckets, 1, 33, 5))
    tolerance = 20 * torch.finfo(dtype).eps
    expected = expected_sums(values.double(), 1, 9)
    torch.testing.assert_close(sums.double(), expected, rtol=tolerance, atol=tolerance)


def test_each_is_the_transpose_of_the_other(isa: str) -> None:
    buckets = torch.randn(50, requires_grad=True)
    values = torch.randn(7, 33, requires_grad=True)
    weight, sums = ops.hashed_weight(buckets, 2, 33, 7), ops.hashed_bucket_sums(values, 2, 50)
    weight.backward(values.detach())
    sums.backward(buckets.detach())
    assert torch.equal(buckets.grad, sums.detach())
    assert torch.equal(values.grad, weight.detach())


@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(isa: str, grad: bool) -> None:
    buckets = torch.randn(5, requires_grad=grad)
    values = torch.randn(3, 4, requires_grad=grad)
    torch.library.opcheck(torch.ops.nncx.hashed_weight.default, (buckets, 2, 4, 3))
    torch.library.opcheck(torch.ops.nncx.hashed_bucket_sums.default, (values, 2, 5))


def test_gradients_of_gradients() -> None:
    buckets = torch.randn(5, dtype=torch.float64, requires_grad=True)
    values = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda b: ops.hashed_weight(b, 2, 4, 3).square(), (buckets,))
        assert check(lambda v: ops.hashed_bucket_sums(v, 2, 5).square(), (values,))
    buckets = torch.randn(5, requires_grad=True)
    (first,) = torch.autograd.grad(
        ops.hashed_weight(buckets, 2, 4, 3).pow(3).sum(), buckets, create_graph=True
    )
    (second,) = torch.autograd.grad(first.sum(), buckets)
    of_double = buckets.detach().double().requires_grad_()
    cubes = ops.hashed_weight(of_double, 2, 4, 3).pow(3).sum()
    (first,) = torch.autograd.grad(cubes, of_double, create_graph=True)
    (expected,) = torch.autograd.grad(first.sum(), of_double)
    torch.testing.assert_close(second, expected.float())


def test_threads_give_the_same_bits(isa: str) -> None:
    buckets, values = torch.randn(3000), torch.randn(300, 500)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(
                (ops.hashed_weight(buckets, 1, 500, 300), ops.hashed_bucket_sums(values, 1, 3000))
            )
    finally:
        torch.set_num_threads(before)
    for weight, sums in results[1:]:
        assert torch.equal(weight, results[0][0]) and torch.equal(sums, results[0][1])


def test_non_contiguous_operands(isa: str) -> None:
    buckets, values = torch.randn(100)[::2], torch.randn(33, 7).T
    weight = ops.hashed_weight(buckets, 1, 33, 7)
    assert torch.equal(weight, hashes.virtual_weight(buckets, 1, 33, 7))
    sums = ops.hashed_bucket_sums(values, 1, 50)
    assert torch.equal(sums, expected_sums(values.contiguous(), 1, 50))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bad_input_is_refused_in_every_dtype(dtype: torch.dtype) -> None:
    buckets, values = torch.randn(5).to(dtype), torch.randn(3, 4).to(dtype)
    with pytest.raises(RuntimeError, match="hashed_weight: buckets must be"):
        ops.hashed_weight(buckets[:0], 0, 4, 3)
    with pytest.raises(RuntimeError, match="hashed_weight: buckets must be"):
        ops.hashed_weight(buckets.view(1, 5), 0, 4, 3)
    with pytest.raises(RuntimeError, match="in_features and out_features must be at least 0"):
        ops.hashed_weight(buckets, 0, -4, 3)
    for count in (0, -1, 2**31):
        with pytest.raises(RuntimeError, match=f"buckets must be 1 to 2147483647, got {count}"):
            ops.hashed_bucket_sums(values, 0, count)
    with pytest.raises(RuntimeError, match="hashed_bucket_sums: values must be"):
        ops.hashed_bucket_sums(values[0], 0, 5)
