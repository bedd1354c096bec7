import pytest
import torch
import torch.nn.functional as F
from codebooks import assert_within_bound, random_weight
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from places import broken_weights

from nncx import _C, ops
from nncx.nn.codes import pack_codes
from nncx.ops.codebook_linear import codebook_linear_reference

per_channel = pytest.mark.parametrize("per_channel", [False, True], ids=["layer", "channel"])
all_bits = pytest.mark.parametrize("bits", range(1, 9))


def native(x, weight, bits, **epilogue):
    n, k = weight.values.shape
    prepacked = ops.codebook_linear_prepack(weight.codes, bits, k, n)
    return ops.codebook_linear(x, prepacked, weight.codebook, bits, k, n, **epilogue)


def assert_right(out, x, weight, bias=None) -> None:
    x, w = x.double(), weight.values
    exact, magnitude = x @ w.T, x.abs() @ w.abs().T
    if bias is not None:
        exact, magnitude = exact + bias.double(), magnitude + bias.double().abs()
    assert_within_bound(out, exact, magnitude, w.shape[1] + 2)


@all_bits
@per_channel
@pytest.mark.parametrize(
    ("m", "n"), [(0, 5), (5, 0), (1, 1), (1, 16), (1, 67), (2, 33), (3, 64), (13, 97)]
)
def test_sizes(isa: str, m: int, n: int, bits: int, per_channel: bool) -> None:
    for k in (0, 1, 3, 31, 32, 33, 63, 64, 65, 131, 1031):
        x, weight = torch.randn(m, k), random_weight((n, k), bits, per_channel)
        assert_right(native(x, weight, bits), x, weight)


@all_bits
@per_channel
@pytest.mark.parametrize("m", [1, 2, 5, 40])
def test_large(isa: str, m: int, bits: int, per_channel: bool) -> None:
    x, weight = torch.randn(m, 5003), random_weight((67, 5003), bits, per_channel)
    assert_right(native(x, weight, bits), x, weight)


@pytest.mark.parametrize("m", [1, 2, 3, 4, 6, 7, 8, 16, 17, 300, 1100])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_rows(isa: str, m: int, bits: int) -> None:
    x, weight = torch.randn(m, 70), random_weight((20, 70), bits, False)
    assert_right(native(x, weight, bits), x, weight)


@per_channel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@all_bits
def test_few_rows_of_many_outputs(isa: str, bits: int, dtype, per_channel: bool) -> None:
    """CUDA: blocks of 64 outputs, the last one half empty; terms that end within a load, or not."""
    for k in (30, 332, 2200):
        weight = random_weight((161, k), bits, per_channel)
        for m in (1, 4, 7, 16):
            x = torch.randn(m, k).to(dtype)
            assert_right(native(x, weight, bits, out_dtype=torch.float32), x, weight)


@pytest.mark.parametrize("bits", [1, 2, 3, 6])
def test_what_stands_behind_the_last_weight_is_not_multiplied(isa: str, bits: int) -> None:
    """Code 0 fills a path's last step: an infinity there would make NaN of nothing."""
    codebook = torch.randn(2**bits)
    codebook[0] = torch.inf
    for k in (1, 3, 33, 100):
        for n in (5, 161):
            codes = pack_codes(torch.ones(n * k, dtype=torch.uint8), bits)
            prepacked = ops.codebook_linear_prepack(codes, bits, k, n)
            for m in (1, 3, 16, 20):
                x = torch.randn(m, k)
                out = ops.codebook_linear(x, prepacked, codebook, bits, k, n)
                expected = (x @ codebook[1].expand(n, k).T).expand(m, n)
                torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


@per_channel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("m", [2, 7, 16])
@pytest.mark.parametrize("bits", [1, 2])
def test_binary_planes(isa: str, bits: int, m: int, dtype, per_channel: bool) -> None:
    """A warp's terms come in turns, a block has 64 outputs, and there are more rows than its 8."""
    x, weight = torch.randn(m, 9004).to(dtype), random_weight((200, 9004), bits, per_channel)
    out = native(x, weight, bits, out_dtype=torch.float32)
    assert_right(out, x, weight)
    assert torch.equal(out, native(x, weight, bits, out_dtype=torch.float32))


@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("codebook", [[1.0, 0.0], [0.0, 1.0], [1.0, 0.0, 1e-3, -1.0]], ids=str)
def test_large_terms_times_zero_hide_nothing(isa: str, codebook: list[float], m: int) -> None:
    bits, values = len(codebook) // 2, torch.tensor(codebook)
    index = torch.randint(0, len(codebook), (32, 1024))
    x = torch.randn(m, 1024)
    index[:, ::3], x[:, ::3] = codebook.index(0.0), 1e8
    codes = pack_codes(index.to(torch.uint8), bits)
    weight = random_weight((32, 1024), bits, False)._replace(
        codes=codes, codebook=values, values=values.double()[index]
    )
    assert_right(native(x, weight, bits), x, weight)


@all_bits
@pytest.mark.parametrize("m", [1, 3, 9])
def test_the_largest_numbers_do_not_overflow_on_the_way(isa: str, m: int, bits: int) -> None:
    x, weight = torch.randn(m, 70), random_weight((40, 70), bits, False)
    weight = weight._replace(codebook=weight.codebook / 16, values=weight.values / 16)
    x[m // 2, 33] = 3e38
    assert_right(native(x, weight, bits), x, weight)


@all_bits
@pytest.mark.parametrize("m", [1, 9])
def test_every_code_is_looked_up(isa: str, m: int, bits: int) -> None:
    """Integers in the codebook and one weight an output: no rounding hides a wrong entry."""
    n = 2**bits
    codes = pack_codes(torch.arange(n, dtype=torch.uint8), bits)
    weight = ops.codebook_linear_prepack(codes, bits, 1, n)
    codebook = torch.arange(1.0, n + 1)
    x = torch.arange(1.0, m + 1)[:, None]
    assert torch.equal(ops.codebook_linear(x, weight, codebook, bits, 1, n), x * codebook)


@pytest.mark.parametrize("out_dtype", [None, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("m", [1, 12])
@pytest.mark.parametrize("bits", [1, 3])
def test_dtypes(isa: str, bits: int, m: int, dtype, out_dtype) -> None:
    x, weight = torch.randn(m, 200).to(dtype), random_weight((35, 200), bits, False)
    bias = torch.randn(35)
    out = native(x, weight, bits, bias=bias, out_dtype=out_dtype)
    assert out.dtype == (out_dtype or dtype)
    assert_right(out, x, weight, bias)


@pytest.mark.parametrize("m", [1, 12])
@pytest.mark.parametrize("bits", [1, 2, 5])
def test_activations(isa: str, bits: int, m: int) -> None:
    x, weight = torch.randn(m, 40), random_weight((35, 40), bits, True)
    bias = torch.randn(35) * 5
    plain = native(x, weight, bits, bias=bias)
    assert torch.equal(native(x, weight, bits, bias=bias, activation="relu"), F.relu(plain))
    assert torch.equal(native(x, weight, bits, bias=bias, activation="relu6"), F.relu6(plain))
    assert torch.equal(native(x, weight, bits) + bias, plain)
    assert plain.max() > 6 and plain.min() < 0


@pytest.mark.parametrize("m", [1, 12])
@per_channel
@all_bits
def test_nan_and_infinity_pass(isa: str, bits: int, per_channel: bool, m: int) -> None:
    """As in torch's float32 product, wherever the codebook is finite."""
    weight = random_weight((40, 70), bits, per_channel)
    x = torch.randn(m, 70)
    for value in (torch.nan, torch.inf, -torch.inf):
        x[m // 2, 33] = value
        for activation, of in (("none", lambda y: y), ("relu", F.relu), ("relu6", F.relu6)):
            out = native(x, weight, bits, activation=activation)
            expected = of(x @ weight.values.float().T)
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_rounding_to_16_bits_is_torchs(isa: str) -> None:
    """Subnormals, ties, overflow to infinity, NaN: whatever a sum can be."""
    bits = torch.randint(-(2**31), 2**31, (4096,)).to(torch.int32)
    values = torch.cat([bits.view(torch.float32), torch.tensor([65519.0, 65520.0, 3.3e38])])
    halfway = torch.arange(1, 2048) * 2.0**-25  # between subnormals of half
    bias = torch.cat([values, halfway])
    weight = ops.codebook_linear_prepack(
        pack_codes(torch.zeros(len(bias)).bool(), 1), 1, 1, len(bias)
    )
    for dtype in (torch.float16, torch.bfloat16):
        for m in (1, 9):
            out = ops.codebook_linear(
                torch.zeros(m, 1),
                weight,
                torch.zeros(2),
                1,
                1,
                len(bias),
                bias=bias,
                out_dtype=dtype,
            )
            torch.testing.assert_close(
                out, bias.to(dtype).expand(m, -1), rtol=0, atol=0, equal_nan=True
            )


@all_bits
def test_reference_agrees(isa: str, bits: int) -> None:
    x, weight = torch.randn(9, 100), random_weight((35, 100), bits, True)
    epilogue = dict(bias=torch.randn(35), activation="relu6")
    expected = codebook_linear_reference(
        x, weight.codes, weight.codebook, bits, 100, 35, **epilogue
    )
    torch.testing.assert_close(native(x, weight, bits, **epilogue), expected, rtol=1e-5, atol=1e-5)


@per_channel
@pytest.mark.parametrize("m", [1, 2, 301])
@pytest.mark.parametrize("bits", [1, 2, 4, 7])
def test_threads_and_repetitions_give_the_same_bits(
    isa: str, bits: int, m: int, per_channel: bool
) -> None:
    x, weight = torch.randn(m, 1500), random_weight((700, 1500), bits, per_channel)
    before = torch.get_num_threads()
    try:
        outputs = []
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            outputs.append(native(x, weight, bits))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])


def test_non_contiguous_operands(isa: str) -> None:
    x, weight = torch.randn(130, 8).T[::2], random_weight((12, 130), 3, True)
    bias = torch.randn(24)[::2]
    codes = weight.codes.repeat_interleave(2)[::2]
    strided = weight._replace(codes=codes, codebook=weight.codebook.T.contiguous().T)
    assert not (x.is_contiguous() or codes.is_contiguous() or strided.codebook.is_contiguous())
    assert_right(native(x, strided, 3, bias=bias), x, weight, bias)


@pytest.mark.parametrize("m", [1, 9])
@all_bits
def test_operands_may_lie_at_any_address(isa: str, bits: int, m: int) -> None:
    x, weight = torch.randn(m, 200), random_weight((40, 200), bits, False)
    prepacked = ops.codebook_linear_prepack(weight.codes, bits, 200, 40)
    moved = torch.empty(len(prepacked) + 1, dtype=torch.uint8)[1:]
    moved.copy_(prepacked)
    shifted = torch.empty(m * 200 + 1)[1:].view(m, 200).copy_(x)
    codebook = torch.empty(2**bits + 1)[1:].copy_(weight.codebook)
    assert moved.data_ptr() % 2 and shifted.data_ptr() % 8
    assert_right(ops.codebook_linear(shifted, moved, codebook, bits, 200, 40), x, weight)


@per_channel
@pytest.mark.parametrize("m", [1, 9])
@all_bits
def test_a_forged_weight_reads_no_other_memory(isa: str, bits: int, m: int, per_channel) -> None:
    """Whatever stands behind the header, nothing beside the codebook is looked up."""
    prepacked = ops.codebook_linear_prepack(torch.zeros(5 * bits, dtype=torch.uint8), bits, 2, 20)
    prepacked[64:] = 255
    memory = torch.full((3, 20, 2**bits), torch.nan)
    codebook = (memory[1] if per_channel else memory[1, 0]).fill_(1)
    out = ops.codebook_linear(torch.ones(m, 2), prepacked, codebook, bits, 2, 20)
    assert not out.isnan().any()


def test_weight_of_another_path_or_width_is_refused() -> None:
    before = _C.isa()
    codes, x = torch.zeros(4, dtype=torch.uint8), torch.randn(1, 4)
    try:
        _C.set_isa("scalar")
        one_bit = ops.codebook_linear_prepack(codes[:1], 1, 4, 2)
        with pytest.raises(RuntimeError, match="codebook2/scalar, got 'codebook1/scalar'"):
            ops.codebook_linear(x, one_bit, torch.zeros(4), 2, 4, 2)
        if "avx2" in _C.supported_isas():
            _C.set_isa("avx2")
            with pytest.raises(RuntimeError, match="codebook1/avx2, got 'codebook1/scalar'"):
                ops.codebook_linear(x, one_bit, torch.zeros(2), 1, 4, 2)
    finally:
        _C.set_isa(before)


def test_weight_of_another_geometry_is_refused(isa: str) -> None:
    prepacked = ops.codebook_linear_prepack(torch.zeros(3, dtype=torch.uint8), 2, 4, 3)
    x, codebook = torch.randn(2, 4), torch.zeros(4)
    with pytest.raises(RuntimeError, match="must be prepacked for groups=1, out_channels/groups=2"):
        ops.codebook_linear(x, prepacked, codebook, 2, 4, 2)
    for broken in broken_weights(prepacked, isa):
        with pytest.raises(RuntimeError, match="codebook_linear: weight must"):
            ops.codebook_linear(x, broken, codebook, 2, 4, 3)


@settings(
    max_examples=80,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    m=st.integers(1, 30),
    n=st.integers(1, 80),
    k=st.integers(0, 2100),
    bits=st.integers(1, 8),
    per_channel=st.booleans(),
    with_bias=st.booleans(),
)
def test_any_size(isa, m, n, k, bits, per_channel, with_bias) -> None:
    x, weight = torch.randn(m, k), random_weight((n, k), bits, per_channel)
    bias = torch.randn(n) if with_bias else None
    assert_right(native(x, weight, bits, bias=bias), x, weight, bias)
