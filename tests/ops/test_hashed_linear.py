import hashes
import places
import pytest
import torch
import torch.nn.functional as F
from codebooks import assert_within_bound
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nncx import ops
from nncx.ops.hashed_linear import hashed_linear_reference

FORMATS = [torch.float32, torch.float16, torch.bfloat16]


def assert_right(
    out: torch.Tensor,
    x: torch.Tensor,
    buckets: torch.Tensor,
    seed: int,
    bias: torch.Tensor | None = None,
) -> None:
    k, x = x.shape[1], x.double()
    w = hashes.virtual_weight(buckets, seed, k, out.shape[1]).double()
    exact, magnitude = x @ w.T, x.abs() @ w.abs().T
    if bias is not None:
        exact, magnitude = exact + bias.double(), magnitude + bias.double().abs()
    assert_within_bound(out, exact, magnitude, k + 2)


@pytest.mark.parametrize(
    ("m", "n"), [(0, 5), (5, 0), (1, 1), (1, 16), (1, 67), (2, 33), (7, 64), (13, 97)]
)
def test_sizes(isa: str, m: int, n: int) -> None:
    for k in (0, 1, 3, 31, 32, 33, 63, 64, 65, 131, 257, 1031):
        x, buckets = torch.randn(m, k), torch.randn(max(1, n * k // 8))
        assert_right(ops.hashed_linear(x, buckets, 7, k, n), x, buckets, 7)


@pytest.mark.parametrize("m", [1, 2, 3, 5, 6, 8, 9, 12, 13, 32, 33, 300, 1100])
def test_rows(isa: str, m: int) -> None:
    x, buckets = torch.randn(m, 70), torch.randn(100)
    assert_right(ops.hashed_linear(x, buckets, 1, 70, 20), x, buckets, 1)


@pytest.mark.parametrize("m", [1, 9])
def test_large(isa: str, m: int) -> None:
    x, buckets = torch.randn(m, 5003), torch.randn(20_000)
    assert_right(ops.hashed_linear(x, buckets, 2, 5003, 67), x, buckets, 2)


@pytest.mark.parametrize("count", [1, 2, 3, 2**20])
@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, -(2**63)])
def test_seeds_and_numbers_of_buckets(isa: str, seed: int, count: int) -> None:
    x, buckets = torch.randn(3, 40), torch.randn(count)
    assert_right(ops.hashed_linear(x, buckets, seed, 40, 33), x, buckets, seed)


def test_every_weight_is_looked_up(isa: str) -> None:
    """Integers, and one input at a time: no rounding hides a wrong bucket or sign."""
    buckets = torch.arange(1.0, 5001)
    weight = hashes.virtual_weight(buckets, 4, 100, 70)
    out = ops.hashed_linear(torch.eye(100), buckets, 4, 100, 70)
    assert torch.equal(out, weight.T)


@pytest.mark.parametrize("out_dtype", [None, *FORMATS], ids=str)
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("m", [1, 12])
def test_dtypes(isa: str, m: int, dtype, out_dtype) -> None:
    x, buckets, bias = torch.randn(m, 200).to(dtype), torch.randn(99), torch.randn(35)
    out = ops.hashed_linear(x, buckets, 0, 200, 35, bias=bias, out_dtype=out_dtype)
    assert out.dtype == (out_dtype or dtype)
    assert_right(out, x, buckets, 0, bias)


def test_float64_is_torchs() -> None:
    x, buckets, bias = torch.randn(3, 20).double(), torch.randn(9), torch.randn(5)
    out = ops.hashed_linear(x, buckets, 0, 20, 5, bias=bias)
    weight = hashes.virtual_weight(buckets.double(), 0, 20, 5)
    torch.testing.assert_close(out, F.linear(x, weight, bias.double()))
    with pytest.raises(RuntimeError, match="out_dtype must be float32, float16 or bfloat16"):
        ops.hashed_linear(x, buckets, 0, 20, 5, out_dtype=torch.int8)
    with pytest.raises(RuntimeError, match=r"input must be \[M, 21\]"):
        ops.hashed_linear(x, buckets, 0, 21, 5)


@pytest.mark.parametrize("m", [1, 12])
def test_activations(isa: str, m: int) -> None:
    x, buckets, bias = torch.randn(m, 40), torch.randn(300), torch.randn(35) * 5

    def run(**epilogue) -> torch.Tensor:
        return ops.hashed_linear(x, buckets, 0, 40, 35, **epilogue)

    plain = run(bias=bias)
    assert torch.equal(run(bias=bias, activation="relu"), F.relu(plain))
    assert torch.equal(run(bias=bias, activation="relu6"), F.relu6(plain))
    assert torch.equal(run() + bias, plain)
    assert plain.max() > 6 and plain.min() < 0


@pytest.mark.parametrize("m", [1, 9, 40])
def test_nan_and_infinity_pass(isa: str, m: int) -> None:
    """As in torch's float32 product; no row is touched by another."""
    x, buckets = torch.randn(m, 70), torch.randn(300)
    weight = hashes.virtual_weight(buckets, 0, 70, 40)
    for value in (torch.nan, torch.inf, -torch.inf):
        x[m // 2, 33] = value
        for activation, of in (("none", lambda y: y), ("relu", F.relu), ("relu6", F.relu6)):
            out = ops.hashed_linear(x, buckets, 0, 70, 40, activation=activation)
            torch.testing.assert_close(out, of(x @ weight.T), rtol=1e-4, atol=1e-4, equal_nan=True)


def test_reference_agrees(isa: str) -> None:
    x, buckets = torch.randn(9, 100), torch.randn(300)
    epilogue = dict(bias=torch.randn(35), activation="relu6")
    expected = hashed_linear_reference(x, buckets, 1, 100, 35, **epilogue)
    out = ops.hashed_linear(x, buckets, 1, 100, 35, **epilogue)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("m", [1, 2, 301])
def test_threads_and_repetitions_give_the_same_bits(isa: str, m: int) -> None:
    x, buckets = torch.randn(m, 1500), torch.randn(100_000)
    before = torch.get_num_threads()
    try:
        outputs = []
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            outputs.append(ops.hashed_linear(x, buckets, 1, 1500, 700))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])


def test_non_contiguous_operands(isa: str) -> None:
    x, buckets, bias = torch.randn(130, 8).T[::2], torch.randn(600)[::2], torch.randn(24)[::2]
    assert not (x.is_contiguous() or buckets.is_contiguous() or bias.is_contiguous())
    out = ops.hashed_linear(x, buckets, 1, 130, 12, bias=bias)
    assert_right(out, x, buckets, 1, bias)


@pytest.mark.parametrize("m", [1, 9])
def test_operands_may_lie_at_any_address(isa: str, m: int) -> None:
    x = torch.randn(m * 200 + 1)[1:].view(m, 200)
    buckets = torch.randn(301)[1:]
    assert x.data_ptr() % 8 and buckets.data_ptr() % 8
    assert_right(ops.hashed_linear(x, buckets, 1, 200, 40), x, buckets, 1)


def test_nothing_beside_the_buckets_is_read(isa: str) -> None:
    """Outputs that a block has no use for are hashed too."""
    memory = torch.full((3, 64), torch.nan)
    buckets = memory[1, :61].fill_(1)
    for n in (1, 17, 31, 33):
        assert not ops.hashed_linear(torch.ones(3, 50), buckets, 1, 50, n).isnan().any()


# ---------------------------------------------------------------------------------------------
# gradients


@pytest.mark.parametrize("activation", ["none", "relu", "relu6"])
def test_gradcheck(activation: str) -> None:
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    buckets = torch.randn(9, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(7, dtype=torch.float64, requires_grad=True)

    def run(x: torch.Tensor, buckets: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return ops.hashed_linear(x, buckets, 1, 5, 7, bias=bias, activation=activation)

    assert torch.autograd.gradcheck(run, (x, buckets, bias))
    assert torch.autograd.gradgradcheck(run, (x, buckets, bias))


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("activation", ["none", "relu6"])
@pytest.mark.parametrize("place", [*places.CPU_PATHS, *places.GPU])  # torch knows no other backward
def test_gradients_are_those_of_the_formula(place: str, activation: str, dtype) -> None:
    x, buckets, bias = torch.randn(9, 40).to(dtype), torch.randn(100), torch.randn(35)
    gradient = torch.randn(9, 35)
    ours = [each.clone().requires_grad_() for each in (x, buckets, bias)]
    theirs = [each.double().requires_grad_() for each in (x, buckets, bias)]
    epilogue = {"bias": ours[2], "activation": activation, "out_dtype": torch.float32}
    with places.at(place):
        ops.hashed_linear(ours[0], ours[1], 1, 40, 35, **epilogue).backward(gradient)
    weight = hashes.virtual_weight(theirs[1], 1, 40, 35)
    y = F.linear(theirs[0], weight, theirs[2])
    (F.relu6(y) if activation == "relu6" else y).backward(gradient.double())
    for mine, other in zip(ours, theirs, strict=True):
        tolerance = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}[mine.dtype]
        assert mine.grad.dtype == mine.dtype
        torch.testing.assert_close(mine.grad.double(), other.grad, rtol=tolerance, atol=tolerance)


def test_only_the_gradients_that_are_asked_for() -> None:
    x, buckets = torch.randn(3, 5), torch.randn(9)
    for wanted in range(3):
        operands = [x, buckets, torch.randn(7)]
        operands[wanted].requires_grad_()
        ops.hashed_linear(*operands[:2], 1, 5, 7, bias=operands[2]).sum().backward()
        assert [each.grad is not None for each in operands] == [i == wanted for i in range(3)]
        x, buckets = x.detach(), buckets.detach()


@settings(
    max_examples=80,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    m=st.integers(1, 30),
    n=st.integers(1, 80),
    k=st.integers(0, 1100),
    count=st.integers(1, 3000),
    seed=st.integers(-(2**63), 2**63 - 1),
    with_bias=st.booleans(),
)
def test_any_size(isa, m, n, k, count, seed, with_bias) -> None:
    x, buckets = torch.randn(m, k), torch.randn(count)
    bias = torch.randn(n) if with_bias else None
    assert_right(ops.hashed_linear(x, buckets, seed, k, n, bias=bias), x, buckets, seed, bias)
