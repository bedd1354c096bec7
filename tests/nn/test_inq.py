"""Layers of INQ: their codebook and rule of rounding, what is quantised when, and stays so."""

import copy
import math
import warnings
from fractions import Fraction

import pytest
import torch
from layer_families import FAMILIES, evaluate, images
from torch import nn

from nncx.nn import INQConv2d, INQLinear
from nncx.nn.codes import unpack_codes
from nncx.nn.inq import FREE
from nncx.nn.quantizers import inq_codebook, inq_codes

WIDTHS = range(2, 9)


def _conv(**extras):
    """Without a quantised weight."""
    torch.manual_seed(0)
    return INQConv2d(6, 9, 3, **extras)


# ---------------------------------------------------------------------------------------------
# codebook and rule, against the paper's equations in fractions


def _n1(largest):
    """floor(log2(4 s / 3)): the largest n with 3/4 * 2**n <= s."""
    n = 200
    while Fraction(3, 4) * Fraction(2) ** n > Fraction(largest):
        n -= 1
    return n


def _magnitudes(largest, bits):
    n1 = _n1(largest)
    n2 = n1 + 1 - Fraction(2 ** (bits - 1), 2)
    return [Fraction(2) ** n for n in range(int(n2), n1 + 1)]


def _rounded(weight, magnitudes):
    for low, high in zip([Fraction(0), *magnitudes], magnitudes, strict=False):
        if (low + high) / 2 <= abs(Fraction(weight)) < 3 * high / 2:
            return float(high) * (1 if weight > 0 else -1)
    return 0.0


BELOW = [math.nextafter(x, 0) for x in (0.75, 1.5, 96.0)]


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("largest", [0.75, 1.0, 1.4, 1.5, 96, 0.01, 3e-5, 1e30, *BELOW])
def test_codebook(largest, bits):
    weight = torch.tensor([[0.0, -largest, largest / 2]], dtype=torch.float64)
    codebook = inq_codebook(weight, bits)
    expected = [float(m) for m in _magnitudes(largest, bits)]
    assert codebook.dtype == torch.float32 and codebook.shape == (2**bits,)
    values = [0.0, *expected, *(-m for m in expected)]
    assert len(values) == 2 ** (bits - 1) + 1
    assert codebook.tolist() == values + [0.0] * (2**bits - len(values))


def test_five_bits_have_17_values_and_n2_is_n1_less_7():
    values = inq_codebook(torch.tensor([1.0]), 5).unique()
    assert len(values) == 17 and values.abs().sort().values[1].item() == 2**-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bits", WIDTHS)
def test_rule(bits, dtype):
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(4, 50, generator=generator)
    edges = [float(m) * f for m in _magnitudes(1.0, bits)[-12:] for f in (0.5, 0.75, 1.0, 1.25)]
    edges = torch.tensor([e for e in edges if e <= 1])
    around = torch.cat([edges, edges * (1 - 2**-23), edges * (1 + 2**-23)]).clamp(max=1)
    weight = torch.cat([weight.flatten() / weight.abs().max(), around, -around, torch.zeros(2)])
    weight = weight.to(dtype)
    codebook = inq_codebook(weight, bits)
    codes = inq_codes(weight, codebook)
    assert codes.dtype == torch.uint8 and codes.shape == weight.shape and codes.max() <= 128
    magnitudes = _magnitudes(1.0, bits)
    expected = [_rounded(w, magnitudes) for w in weight.tolist()]
    assert codebook[codes.long()].tolist() == expected
    assert torch.equal(codes == 0, torch.tensor(expected) == 0)


def test_what_training_made_larger_than_all_becomes_the_largest():
    codebook = inq_codebook(torch.tensor([1.0]), 5)
    grown = torch.tensor([1.49, 1.5, 7.0, -1e30])
    assert codebook[inq_codes(grown, codebook).long()].tolist() == [1, 1, 1, -1]


@pytest.mark.parametrize("weight", [torch.zeros(3, 2), torch.zeros(0, 2)])
def test_a_weight_of_zeros_has_zeros(weight):
    codebook = inq_codebook(weight, 5)
    assert codebook.eq(0).all() and codebook[inq_codes(weight, codebook).long()].eq(0).all()


# ---------------------------------------------------------------------------------------------
# what is quantised, and when


def test_the_largest_come_first():
    layer = INQLinear(8, 1, bias=False)
    weight = [0.1, -0.9, 0.3, 0.8, -0.05, 0.2, -0.6, 0.0]
    layer.load_state_dict({"weight": torch.tensor([weight])})
    quantized = []
    for fraction, count in [(0.25, 2), (0.5, 2), (0.5, 0), (0.4, 0), (1, 4)]:
        assert layer.quantize_largest(fraction) == count
        quantized.append((layer.codes != FREE).flatten().nonzero().flatten().tolist())
    assert quantized == [[1, 3], [1, 2, 3, 6], [1, 2, 3, 6], [1, 2, 3, 6], list(range(8))]
    expected = [0.125, -1.0, 0.25, 1.0, -0.0625, 0.25, -0.5, 0.0]
    assert layer._values().tolist() == [expected]


@pytest.mark.parametrize("masked", [True, False])
def test_the_codebook_is_of_the_weight_whose_first_part_is_quantised(masked):
    """Not of the one that the layer was made with, and that has been trained since."""
    layer = _conv(masked=masked)
    if masked:
        layer.mask[0, 0, 0, 0] = False
        layer.reset_buffers()
    with torch.no_grad():
        layer.weight.mul_(20)
        expected = inq_codebook(layer.weight, 5)
        layer.weight[0, 0, 0, 0] *= 1e6 if masked else 1
    assert layer.quantize_largest(0) == 0 and layer.quantize_largest(0.5) == 243
    with torch.no_grad():
        layer.weight.mul_(20)
    layer.quantize_largest(1)
    assert torch.equal(layer.codebook, expected)


@pytest.mark.parametrize("fraction", [0.001, 0.3, 0.5, 0.875, 1])
@pytest.mark.parametrize("mask", [True, False])
def test_shares_are_of_the_weights_that_are_not_masked(mask, fraction):
    layer = _conv(masked=mask)
    if mask:
        layer.mask.flatten()[:100] = False
        layer.reset_buffers()
    count = 486 - 100 * mask
    assert layer.weights == count and layer.quantized == 0
    layer.quantize_largest(fraction)
    assert layer.quantized == math.floor(fraction * count + 0.5)
    if mask:
        assert layer._values().flatten()[:100].eq(0).all()
    sizes = layer.weight.detach().abs()
    free = layer.codes == FREE
    held = ~free & layer.mask if mask else ~free
    assert min(sizes[held].tolist(), default=9) >= max(sizes[free].tolist(), default=0)


def test_equal_magnitudes_are_taken_in_order():
    layer = INQLinear(1000, 1)
    nn.init.constant_(layer.weight, 0.5)
    layer.weight.data[0, ::2] *= -1
    layer.reset_buffers()
    layer.quantize_largest(0.3)
    assert torch.equal((layer.codes != FREE).flatten(), torch.arange(1000) < 300)


def test_memory_formats_of_a_depthwise_weight():
    """Where torch's view of a weight of one channel has other strides than the weight."""
    plain = INQConv2d(6, 6, 3, groups=6)
    layer = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    layer.reset_buffers()
    assert layer.quantize_largest(0.5) == plain.quantize_largest(0.5) == 27
    assert torch.equal(layer.codes, plain.codes)


OPTIMIZERS = {
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.1, weight_decay=0.1),
    "SGD": lambda parameters: torch.optim.SGD(
        parameters, lr=0.5, momentum=0.9, weight_decay=0.1, nesterov=True
    ),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_what_is_quantised_stays_and_the_rest_trains(optimizer):
    """Whatever momentum, weight decay and the growth of others do."""
    layer, x = _conv(padding=1), images()
    codebook, steps = inq_codebook(layer.weight, 5), OPTIMIZERS[optimizer](layer.parameters())
    held, values = torch.zeros(9, 6, 3, 3, dtype=torch.bool), layer._values().detach()
    for fraction in (0.3, 0.6, 0.9):
        layer.quantize_largest(fraction)
        before, now = values, layer.codes != FREE
        assert now[held].all(), "none is free again"
        assert before[now & ~held].abs().min() >= before[~now].abs().max()
        values, held = layer._values().detach(), now
        for _ in range(3):
            steps.zero_grad()
            layer(x).square().sum().backward()
            assert layer.weight.grad[held].eq(0).all() and layer.weight.grad[~held].ne(0).all()
            steps.step()
        before, values = values, layer._values().detach()
        assert torch.equal(values[held], before[held])
        assert values[~held].ne(before[~held]).all()
        assert torch.equal(layer.codebook, codebook), "n1 is of the first weight"
    layer.quantize_largest(1)
    assert layer._values().unique().numel() <= 17
    assert set(layer._values().unique().tolist()) <= set(codebook.tolist())


# ---------------------------------------------------------------------------------------------
# evaluation, states, freezing


@pytest.mark.parametrize("fraction", [0, 0.5])
def test_with_free_weights_evaluation_is_that_of_training_and_says_nothing(fraction):
    layer, x = _conv(padding=1), images()
    layer.quantize_largest(fraction)
    expected = layer(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(evaluate(layer, x), expected)
        layer.eval()
        layer.weight.data.mul_(2)
        assert not torch.equal(evaluate(layer, x), expected), "nothing was packed"
    layer.quantize_largest(1)
    assert layer._prepacked is not None, "in eval mode, the kernel runs at once"
    torch.testing.assert_close(evaluate(layer, x), copy.deepcopy(layer).train()(x))


def test_of_a_quantised_layer_the_float_weight_does_not_matter():
    layer, x = FAMILIES["INQ"].conv().eval(), images()
    expected = evaluate(layer, x)
    with torch.no_grad():
        layer.weight.normal_()
    assert torch.equal(evaluate(layer, x), expected)
    layer.codes.flatten()[0] = 3
    with torch.no_grad(), pytest.raises(RuntimeError, match="changed since they were packed"):
        layer(x)


def test_a_state_in_the_middle_goes_on_where_it_was():
    layer, other, x = _conv(), INQConv2d(6, 9, 3), images()
    layer.quantize_largest(0.5)
    with torch.no_grad():
        layer.weight.mul_(3)  # the codebook must not follow
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x)) and other.quantized == 243
    for each in (layer, other):
        each.quantize_largest(1)
    assert torch.equal(other.codes, layer.codes)
    assert torch.equal(evaluate(other, x), evaluate(layer, x))


def test_a_float_state_begins_anew():
    layer, plain = FAMILIES["INQ"].conv(), nn.Conv2d(6, 9, 3)
    plain.weight.data *= 64
    before = layer.codebook.clone()
    layer.load_state_dict(plain.state_dict())
    assert layer.quantized == 0 and torch.equal(layer._values(), plain.weight)
    layer.quantize_largest(0.5)
    assert torch.equal(layer.codebook, inq_codebook(plain.weight, 5))
    assert not torch.equal(layer.codebook, before)


@pytest.mark.parametrize("fraction, count", [(0, 0), (0.5, 243), (0.998, 485)])
def test_freezing_refuses_free_weights(fraction, count):
    layer = _conv()
    layer.quantize_largest(fraction)
    message = f"must have all its weights quantised, got {count} of 486; run the steps of nncx.INQ"
    with pytest.raises(ValueError, match=message):
        layer.freeze()
    assert not layer.frozen and layer.weight is not None


@pytest.mark.parametrize("bits", WIDTHS)
def test_a_frozen_layer_holds_codes_of_its_width(bits, isa):
    layer, x = _conv(bits=bits, padding=1), images()
    layer.quantize_largest(1)
    values, expected = layer._values().detach(), evaluate(layer, x)
    torch.testing.assert_close(expected, layer.train()(x).detach())
    state = layer.freeze().state_dict()
    assert set(state) == {"packed_weight", "codebook", "bias"}
    assert state["packed_weight"].shape == (-(-486 * bits // 8),)
    codes = unpack_codes(state["packed_weight"], 486, bits)
    assert torch.equal(state["codebook"][codes.long()].view(values.shape), values)
    assert torch.equal(evaluate(layer, x), expected)


def test_a_layer_that_is_masked_whole_has_nothing_to_quantise():
    layer = _conv(masked=True)
    layer.mask.fill_(False)
    layer.reset_buffers()
    assert layer.weights == 0 and layer.quantize_largest(1) == 0
    layer.freeze()
    assert torch.equal(evaluate(layer, images()), layer.bias.view(1, 9, 1, 1).expand(2, 9, 7, 6))


@pytest.mark.parametrize("bits", [1, 9, 0, -3, 5.0, "5", None])
@pytest.mark.parametrize(
    "build", [lambda **x: INQConv2d(2, 3, 1, **x), lambda **x: INQLinear(2, 3, **x)]
)
def test_a_width_that_cannot_be_is_refused(build, bits):
    with pytest.raises(ValueError, match=r"^INQ(Conv2d|Linear): bits must be 2 to 8, got .*; the"):
        build(bits=bits)
