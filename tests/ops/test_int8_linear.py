from itertools import combinations

import pytest
import torch
from int8_operands import KINDS, codes, epilogue_by_hand, epilogues, weights, zero_point
from places import CPU_PATHS

from nncx import _C, ops
from nncx.ops.int8_linear import int8_linear_reference

MOST_TERMS = 65_793


def native(x: torch.Tensor, weight: torch.Tensor, **epilogue: object) -> torch.Tensor:
    out_features, in_features = weight.shape
    return ops.int8_linear(
        x, ops.int8_linear_prepack(weight), in_features, out_features, **epilogue
    )


def sums(x: torch.Tensor, weight: torch.Tensor, z: torch.Tensor | int = 0) -> torch.Tensor:
    return (x.long() - z) @ weight.long().T


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("low", [0, -128], ids=["never negative", "any sign"])
@pytest.mark.parametrize("k", [1, 3, 4, 7, 8, 64, 130, 576])
def test_shapes(isa: str, k: int, low: int, kind: str) -> None:
    for m, o in ((1, 1), (2, 7), (3, 16), (5, 17), (47, 33), (49, 64), (64, 8), (65, 81)):
        x, weight = codes(m, k, low=low), weights(kind, o, k)
        assert torch.equal(native(x, weight), sums(x, weight).float())


@pytest.mark.parametrize("x", [-128, -127, 0, 127])
@pytest.mark.parametrize("w", [-128, -127, 127])
def test_extremes(isa: str, x: int, w: int) -> None:
    rows, weight = torch.full((3, 4097), x), torch.full((19, 4097), w)
    out = native(rows.to(torch.int8), weight.to(torch.int8), out_dtype=torch.float32)
    assert (out == float(x * w * 4097)).all()


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("total", [254, 257, 258, 259, 381])
@pytest.mark.parametrize("k", [8, 13, 1024])
def test_four_weights_at_the_bound_of_16_bits(isa: str, k: int, total: int, sign: int) -> None:
    """127 * 258 fits int16, 127 * 259 does not; the four may meet at any of eight places."""
    four = torch.tensor([127, 127, min(127, total - 254), max(0, total - 381)]) * sign
    places = torch.tensor([*combinations(range(8), 4)])
    weight = torch.zeros(len(places), k, dtype=torch.int8)
    weight.scatter_(1, places, four.to(torch.int8).expand(len(places), -1))
    out = native(torch.full((5, k), 127).to(torch.int8), weight)
    assert (out == float(sign * total * 127)).all()


@pytest.mark.parametrize("z", range(-128, 128))
def test_every_zero_point(isa: str, z: int) -> None:
    x, weight = codes(5, 37, low=0 if z % 2 else -128), weights("any", 18, 37)
    out = native(x, weight, input_zero_point=zero_point(z))
    assert torch.equal(out, sums(x, weight, z).float())


@pytest.mark.parametrize(("x", "w", "z"), [(127, -128, -128), (-128, -128, 127), (-128, 127, 127)])
def test_the_largest_sum_fits(isa: str, x: int, w: int, z: int) -> None:
    """|a - z| = 255 and |w| = 128 in every term, as many as there may be."""
    rows = torch.full((2, MOST_TERMS), x).to(torch.int8)
    weight = torch.full((2, MOST_TERMS), w).to(torch.int8)
    scale = torch.tensor([2.0**-31, 2.0**-20])
    out = native(rows, weight, input_zero_point=zero_point(z), scale=scale)
    exact = torch.tensor(float((x - z) * w * MOST_TERMS))  # rounded to float32 once
    assert torch.equal(out, (exact * scale).expand(2, 2))


def test_one_term_more_is_refused(isa: str) -> None:
    with pytest.raises(RuntimeError, match="int8_linear_prepack: .* at most 65793 terms.*65794"):
        ops.int8_linear_prepack(codes(1, MOST_TERMS + 1))


@pytest.mark.parametrize("name", epilogues([1, 1]))
@pytest.mark.parametrize(("m", "o"), [(1, 5), (9, 33), (50, 80)])
def test_epilogue(isa: str, m: int, o: int, name: str) -> None:
    epilogue = epilogues([m, o])[name]
    x, weight = codes(m, 41), weights("any", o, 41)
    out = native(x, weight, input_zero_point=zero_point(3), **epilogue)
    assert torch.equal(out, epilogue_by_hand(sums(x, weight, 3), epilogue))


@pytest.mark.parametrize("low", [0, -128])
@pytest.mark.parametrize("m", [1, 4, 6, 50])
def test_a_zero_point_and_a_scale_for_each_row(isa: str, m: int, low: int) -> None:
    x, weight, z = codes(m, 67, low=low), weights("any", 35, 67), codes(m)
    epilogue = {"scale": torch.rand(35), "input_scale": torch.rand(m), "bias": torch.randn(35)}
    out = native(x, weight, input_zero_point=z, **epilogue)
    assert torch.equal(out, epilogue_by_hand(sums(x, weight, z.long()[:, None]), epilogue))


@pytest.mark.parametrize("low", [0, -128])
@pytest.mark.parametrize("m", [3, 48])
def test_int8_out_is_quantize_int8_of_float_out(isa: str, m: int, low: int) -> None:
    x, weight = codes(m, 200, low=low), weights("some large", 50, 200)
    epilogue = {"scale": torch.rand(50) * 1e-3, "bias": torch.randn(50), "activation": "relu"}
    scale, z = torch.tensor(0.01), zero_point(-128)
    fused = native(x, weight, **epilogue, out_scale=scale, out_zero_point=z)
    assert torch.equal(fused, ops.quantize_int8(native(x, weight, **epilogue), scale, z))


@pytest.mark.parametrize(("m", "k", "o"), [(0, 5, 3), (3, 0, 4), (3, 5, 0), (0, 0, 0)])
def test_empty(isa: str, m: int, k: int, o: int) -> None:
    out = native(codes(m, k), weights("any", o, k), bias=torch.ones(o))
    assert out.shape == (m, o)
    if k == 0:
        assert (out == 1).all()


def test_strides(isa: str) -> None:
    x, weight = codes(70, 9).T, weights("any", 140, 33).T[:, ::2]
    assert torch.equal(native(x, weight), sums(x, weight).float())


@pytest.mark.parametrize("shape", [(100, 300, 70), (1, 3000, 200)])
def test_threads_and_repetitions_give_the_same_bits(isa: str, shape: tuple[int, int, int]) -> None:
    m, k, o = shape
    x, weight = codes(m, k), weights("some large", o, k)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(native(x, weight), sums(x, weight).float())
    finally:
        torch.set_num_threads(before)


def test_reference_agrees(isa: str) -> None:
    x, weight = codes(9, 41), weights("any", 33, 41)
    for epilogue in epilogues([9, 33]).values():
        expected = int8_linear_reference(
            x, weight, 41, 33, input_zero_point=zero_point(7), **epilogue
        )
        assert torch.equal(native(x, weight, input_zero_point=zero_point(7), **epilogue), expected)


@pytest.mark.parametrize("offset", [4, 16])
def test_a_weight_may_lie_anywhere(isa: str, offset: int) -> None:
    """Tensors that NumPy made, or views of one buffer, are not aligned as torch's own are."""
    x, weight = codes(5, 40), weights("some large", 20, 40)
    prepacked = ops.int8_linear_prepack(weight)
    buffer = torch.zeros(offset + prepacked.numel(), dtype=torch.uint8)
    buffer[offset:] = prepacked
    assert torch.equal(ops.int8_linear(x, buffer[offset:], 40, 20), sums(x, weight).float())


def test_weights_of_another_path_or_shape_are_refused(isa: str) -> None:
    weight = ops.int8_linear_prepack(codes(5, 8))
    with pytest.raises(
        RuntimeError, match="int8_linear: weight must be prepacked for groups=1, out"
    ):
        ops.int8_linear(codes(2, 8), weight, 8, 6)
    for path in set(CPU_PATHS) - {isa} if isa in CPU_PATHS else ():
        _C.set_isa(path)
        with pytest.raises(RuntimeError, match=f"for the path of this process, int8/{path}, got"):
            ops.int8_linear(codes(2, 8), weight, 8, 5)


def test_a_weight_that_was_tampered_with_touches_no_other_memory(isa: str) -> None:
    """Its header still fits: the result is anything, but no byte outside is read or written."""
    for k in (0, 4, 64):
        weight = ops.int8_linear_prepack(weights("some large", 16, k))
        for value in (0x7F, 0xFF):
            tampered = weight.clone()
            tampered[64:] = value
            for low in (0, -128):
                assert ops.int8_linear(codes(48, k, low=low), tampered, k, 16).shape == (48, 16)
