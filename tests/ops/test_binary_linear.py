import itertools
import threading

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from properties import many_examples

from nncx import _C, ops
from nncx.ops.binary_linear import binary_linear_reference


def sign(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x >= 0, 1.0, -1.0).double()


def native(x: torch.Tensor, w: torch.Tensor, **epilogue) -> torch.Tensor:
    features = x.shape[1]
    weight = ops.binary_linear_prepack(ops.pack_signs(w), features)
    return ops.binary_linear(ops.pack_signs(x), weight, features, w.shape[0], **epilogue)


@pytest.mark.parametrize("k", [0, 1, 3, 4, 63, 64, 65, 131, 256, 1031])
@pytest.mark.parametrize(("m", "n"), [(0, 5), (5, 0), (1, 1), (1, 64), (2, 33), (7, 31), (13, 97)])
def test_exact(isa: str, m: int, n: int, k: int) -> None:
    x, w = torch.randn(m, k), torch.randn(n, k)
    expected = sign(x) @ sign(w).T
    assert torch.equal(native(x, w).double(), expected)


@pytest.mark.parametrize("positive", [True, False])
def test_extreme_counts_do_not_overflow(isa: str, positive: bool) -> None:
    """All bits differ, or none, over more channels than 8-bit and 16-bit sums could hold."""
    k = 70_001
    x, w = torch.ones(3, k), torch.ones(2, k) * (1 if positive else -1)
    assert torch.equal(native(x, w), torch.full((3, 2), float(k if positive else -k)))


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_epilogue_is_bit_exact(isa: str, dtype: torch.dtype | None) -> None:
    x, w = torch.randn(9, 100), torch.randn(35, 100)
    scale, bias, input_scale = torch.rand(35) * 50, torch.randn(35), torch.rand(9) * 20
    dots = (sign(x) @ sign(w).T).float()
    expected = (dots * scale * input_scale[:, None] + bias).to(dtype or torch.float32)
    out = native(x, w, scale=scale, bias=bias, input_scale=input_scale, out_dtype=dtype)
    assert out.dtype == (dtype or torch.float32)
    assert torch.equal(out, expected)
    assert torch.equal(native(x, w, bias=bias), dots + bias)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rounding_to_16_bits_is_torchs(isa: str, dtype: torch.dtype) -> None:
    """Subnormals, ties, overflow to infinity, NaN: whatever a scale can make of a dot product."""
    bits = torch.randint(0, 2**31, (4096,)).to(torch.int32)
    values = torch.cat([bits, -bits - 1, torch.arange(0, 2**31 - 1, 524_287).int()]).view(
        torch.float32
    )
    halfway = torch.arange(1, 2048) * 2.0**-25  # between subnormals of half
    scale = torch.cat([values, halfway, torch.tensor([65519.0, 65520.0, 65536.0, 3.3e38])])
    out = native(torch.ones(1, 1), torch.ones(len(scale), 1), scale=scale, out_dtype=dtype)
    expected = scale.to(dtype)
    assert torch.equal(out[0].isnan(), expected.isnan())
    assert torch.equal(out[0].nan_to_num(0), expected.nan_to_num(0))


def test_reference_agrees(isa: str) -> None:
    x, w = torch.randn(9, 100), torch.randn(35, 100)
    epilogue = dict(scale=torch.rand(35), bias=torch.randn(35), input_scale=torch.rand(9))
    reference = binary_linear_reference(
        ops.pack_signs(x), ops.pack_signs(w), 100, 35, **epilogue, out_dtype=torch.float16
    )
    assert torch.equal(native(x, w, **epilogue, out_dtype=torch.float16), reference)


def test_equals_f_linear_of_signs(isa: str) -> None:
    x, w, b = torch.randn(16, 300), torch.randn(20, 300), torch.randn(20)
    expected = F.linear(sign(x), sign(w), b.double())
    torch.testing.assert_close(native(x, w, bias=b).double(), expected, rtol=1e-6, atol=1e-5)


def test_threads_and_repetitions_give_the_same_bits(isa: str) -> None:
    x, w, scale = torch.randn(301, 700), torch.randn(130, 700), torch.rand(130)
    before = torch.get_num_threads()
    try:
        outputs = []
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            outputs.append(native(x, w, scale=scale))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])


def test_one_row_is_split_over_outputs(isa: str) -> None:
    x, w = torch.randn(1, 4096), torch.randn(4100, 4096)
    assert torch.equal(native(x, w).double(), sign(x) @ sign(w).T)


def test_non_contiguous_operands(isa: str) -> None:
    x, w, scale = torch.randn(8, 130), torch.randn(6, 130), torch.rand(12)[::2]
    packed = ops.pack_signs(torch.cat([x, x]))[::2]
    weight = ops.binary_linear_prepack(ops.pack_signs(w.repeat_interleave(2, 0))[::2], 130)
    out = ops.binary_linear(packed, weight, 130, 6, scale=scale)
    expected = (sign(torch.cat([x, x])[::2]) @ sign(w).T).float() * scale
    assert torch.equal(out, expected)


def test_weights_may_lie_at_any_address(isa: str) -> None:
    x, w = torch.randn(5, 200), torch.randn(40, 200)
    weight = ops.binary_linear_prepack(ops.pack_signs(w), 200)
    moved = torch.empty(len(weight) + 1, dtype=torch.uint8)[1:]
    moved.copy_(weight)
    assert moved.data_ptr() % 2
    out = ops.binary_linear(ops.pack_signs(x), moved, 200, 40)
    assert torch.equal(out.double(), sign(x) @ sign(w).T)


def test_switching_the_path_meanwhile_never_mixes_two() -> None:
    """Every call computes or refuses, whatever another thread does to the path."""
    if len(_C.supported_isas()) < 2:
        pytest.skip("this CPU has one path only")
    x, w = ops.pack_signs(torch.randn(300, 500)), torch.randn(70, 500)
    before, weights = _C.isa(), []
    for name in _C.supported_isas():
        _C.set_isa(name)
        weights.append(ops.binary_linear_prepack(ops.pack_signs(w), 500))
    expected = ops.binary_linear(x, weights[-1], 500, 70)
    stop = threading.Event()

    def switch() -> None:
        for name in itertools.cycle(_C.supported_isas()):
            if stop.is_set():
                return
            _C.set_isa(name)

    thread = threading.Thread(target=switch)
    thread.start()
    torch.set_num_threads(2)
    computed = 0
    try:
        for weight in weights * 60:
            try:
                assert torch.equal(ops.binary_linear(x, weight, 500, 70), expected)
                computed += 1
            except RuntimeError as error:
                assert "path of this process" in str(error)
    finally:
        stop.set()
        thread.join()
        torch.set_num_threads(1)
        _C.set_isa(before)
    assert computed


@many_examples
@given(
    m=st.integers(0, 70),
    n=st.integers(0, 100),
    k=st.integers(0, 300),
    present=st.tuples(*[st.booleans()] * 3),
    dtype=st.sampled_from([None, torch.float32, torch.float16, torch.bfloat16]),
    threads=st.integers(1, 3),
)
def test_any_size(isa, m, n, k, present, dtype, threads) -> None:
    x, w = torch.randn(m, k), torch.randn(n, k)
    names, sizes = ("scale", "input_scale", "bias"), (n, m, n)
    epilogue = {
        name: torch.randn(size) * 9
        for name, size, is_there in zip(names, sizes, present, strict=True)
        if is_there
    }
    expected = (sign(x) @ sign(w).T).float()
    expected = expected * epilogue.get("scale", torch.ones(n))
    expected = expected * epilogue.get("input_scale", torch.ones(m))[:, None]
    expected = expected + epilogue.get("bias", torch.zeros(n))
    torch.set_num_threads(threads)
    try:
        out = native(x, w, **epilogue, out_dtype=dtype)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(out, expected.to(dtype or torch.float32))
