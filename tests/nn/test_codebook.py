"""Layers of a codebook: what they compute, against weights that plain Python makes."""

import copy
import math
from fractions import Fraction

import pytest
import torch
from layer_families import FAMILIES, GEOMETRIES, evaluate, expected_output, images, signs
from torch import nn

from nncx.nn.codes import unpack_codes


def _ternary_by_hand(layer):
    """Zhu et al.: W_p above the threshold, -W_n below minus it, else 0."""
    values = layer.weight.detach().clone()
    kept = torch.ones_like(values, dtype=torch.bool) if layer.mask is None else layer.mask
    limit = layer.threshold * max(
        (abs(w) for w, k in zip(_flat(values), _flat(kept), strict=True) if k), default=0
    )
    positive, negative = layer.positive.item(), layer.negative.item()
    by_hand = [
        0.0 if not k or abs(w) <= limit else positive if w > 0 else -negative
        for w, k in zip(_flat(values), _flat(kept), strict=True)
    ]
    return torch.tensor(by_hand).view(values.shape)


def _power_of_two_by_hand(layer):
    """Zhou et al., equations 1 to 4, in fractions: that of all weights, in one go."""
    weights = [Fraction(w) for w in _flat(layer.weight)]
    n1 = math.floor(math.log2(4 * max(map(abs, weights)) / 3))
    n2 = n1 + 1 - 2 ** (layer.bits - 1) // 2
    magnitudes = [Fraction(0), *(Fraction(2) ** n for n in range(n2, n1 + 1))]

    def rounded(w):
        for low, high in zip(magnitudes, magnitudes[1:], strict=False):
            if (low + high) / 2 <= abs(w) < 3 * high / 2:
                return float(high if w > 0 else -high)
        return 0.0

    return torch.tensor([rounded(w) for w in weights]).view(layer.weight.shape)


def _flat(tensor):
    return tensor.detach().flatten().tolist()


BY_HAND = {
    "BinaryConnect": lambda layer: signs(layer.weight),
    "TTQ": _ternary_by_hand,
    "TTQ with a mask": _ternary_by_hand,
    "INQ": _power_of_two_by_hand,
}


@pytest.fixture(params=BY_HAND)
def name(request):
    return request.param


@pytest.fixture
def family(name):
    return FAMILIES[name]


def _assert_computes(layer, x, weight):
    """In training, in evaluation to the same rounding, and frozen to the bit as in evaluation."""
    expected = expected_output(layer, x, weight)
    torch.testing.assert_close(layer(x).double().detach(), expected, rtol=1e-5, atol=1e-5)
    evaluated = evaluate(layer, x)
    torch.testing.assert_close(evaluated.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(evaluate(layer.freeze(), x), evaluated)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_conv_is_torchs_with_the_values_of_its_weight(geometry, isa, name, family):
    layer = family.conv(**GEOMETRIES[geometry])
    _assert_computes(layer, images(), BY_HAND[name](layer))


@pytest.mark.parametrize("shape", [(3, 70), (70,), (2, 3, 4, 70), (0, 70)])
def test_linear_is_torchs_with_the_values_of_its_weight(shape, isa, name, family):
    layer = family.linear(70, 5)
    _assert_computes(layer, images(*shape), BY_HAND[name](layer))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layer_dtype", [torch.float32, None])
def test_output_has_the_dtype_of_the_input(dtype, layer_dtype, family):
    conv, linear = family.conv(padding=1), family.linear(8, 4)
    for layer, x in [(conv, images(dtype=dtype)), (linear, images(dtype=dtype))]:
        layer.to(layer_dtype or dtype)
        trained = layer(x).detach()
        evaluated = evaluate(layer, x)
        assert trained.dtype == evaluated.dtype == dtype
        tolerance = 1e-5 if dtype == torch.float64 else 8 * torch.finfo(dtype).eps
        torch.testing.assert_close(evaluated, trained, rtol=tolerance, atol=10 * tolerance)
        assert torch.equal(evaluate(layer.freeze(), x), evaluated)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_gives_its_dtype_as_in_torchs_layers(dtype, frozen, family):
    for layer, x in [(family.conv(padding=1), images()), (family.linear(8, 4), images())]:
        with torch.autocast("cpu", dtype=dtype):
            trained = layer.train()(x).detach()
            if frozen:
                layer.freeze()
            evaluated = evaluate(layer, x)
        assert trained.dtype == evaluated.dtype == dtype
        tolerance = 8 * torch.finfo(dtype).eps
        torch.testing.assert_close(evaluated, trained, rtol=tolerance, atol=10 * tolerance)
        layer.train()


def test_the_codes_of_a_frozen_layer_stand_for_its_values(name, family):
    layer = family.conv()
    values = BY_HAND[name](layer).flatten()
    layer.freeze()
    assert layer.precision == (
        "binary weights" if layer.bits == 1 else f"{layer.bits}-bit codebook"
    )
    assert layer.packed_weight.shape == (-(-len(values) * layer.bits // 8),)
    codes = unpack_codes(layer.packed_weight, len(values), layer.bits)
    if layer.bits == 1:
        assert torch.equal(codes, (values > 0).to(torch.uint8))
        return
    assert layer.codebook.dtype == torch.float32 and layer.codebook.shape == (2**layer.bits,)
    assert torch.equal(layer.codebook[codes.long()], values)
    assert torch.equal(codes == 0, values == 0)


# ---------------------------------------------------------------------------------------------
# masks


def _masked(build):
    """A layer of which a third is masked, for images [2, 6, 9, 8] or rows [3, 70]."""
    layer = build(masked=True)
    layer.mask.flatten()[::3] = False
    layer.reset_buffers()
    return layer


MASKED = {
    "TTQ": lambda: _masked(FAMILIES["TTQ"].conv),
    "TTQ, linear": lambda: _masked(lambda **extra: FAMILIES["TTQ"].linear(8, 5, **extra)),
    "INQ": lambda: _masked(lambda **extra: _free(FAMILIES["INQ"].conv(**extra))),
    "INQ, linear": lambda: _masked(lambda **extra: _free(FAMILIES["INQ"].linear(8, 5, **extra))),
}


def _free(layer):
    layer.reset_buffers()
    return layer


OPTIMIZERS = {
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.1, weight_decay=0.1),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.5),
    "SGD": lambda parameters: torch.optim.SGD(
        parameters, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True
    ),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("build", MASKED.values(), ids=MASKED)
def test_what_is_masked_is_zero_whatever_an_optimizer_does(build, optimizer):
    layer, x = build(), images()
    mask, before = layer.mask.clone(), layer.weight.detach().clone()
    steps = OPTIMIZERS[optimizer](layer.parameters())
    for _ in range(4):
        steps.zero_grad()
        layer(x).square().mean().backward()
        assert layer.weight.grad[~mask].eq(0).all() and layer.weight.grad[mask].ne(0).any()
        steps.step()
        assert layer._values()[~mask].eq(0).all()
    assert layer.weight[~mask].ne(before[~mask]).any(), "weight decay moves what nobody reads"
    if hasattr(layer, "quantize_largest"):
        layer.quantize_largest(1)
    values, expected = layer._values().detach(), evaluate(layer, x)
    zeros = copy.deepcopy(layer).freeze()
    assert zeros.mask is None and torch.equal(evaluate(zeros, x), expected)
    codes = unpack_codes(zeros.packed_weight, mask.numel(), layer.bits)
    assert codes[~mask.flatten()].eq(0).all()
    assert torch.equal(codes == 0, (values == 0).flatten())


@pytest.mark.parametrize("build", MASKED.values(), ids=MASKED)
def test_masks_are_part_of_the_state(build):
    layer, x = build(), images()
    assert "mask" in layer.state_dict() and "masked=True" in repr(layer)
    fresh = copy.deepcopy(layer)
    fresh.mask = torch.ones_like(fresh.mask)
    fresh.reset_buffers()
    assert not torch.equal(fresh(x), layer(x))
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh.mask, layer.mask) and torch.equal(fresh(x), layer(x))


@pytest.mark.parametrize("build", MASKED.values(), ids=MASKED)
def test_the_state_of_a_float_layer_leaves_the_mask(build):
    layer = build()
    mask = layer.mask.clone()
    plain = nn.Conv2d(6, 9, 3) if isinstance(layer, nn.Conv2d) else nn.Linear(8, 5)
    layer.load_state_dict(plain.state_dict())
    assert torch.equal(layer.mask, mask) and torch.equal(layer.weight, plain.weight)
    assert layer._values()[~mask].eq(0).all() and layer._values()[mask].ne(0).any()


def test_another_mask_is_refused_until_repack():
    layer, x = MASKED["TTQ"]().eval(), images()
    before = evaluate(layer, x)
    layer.mask.flatten()[1] = False
    with torch.no_grad(), pytest.raises(RuntimeError, match="changed since they were packed"):
        layer(x)
    layer.repack()
    assert not torch.equal(evaluate(layer, x), before)
