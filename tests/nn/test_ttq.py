"""Trained ternary layers: their gradients, their learned values, where those begin."""

import copy

import pytest
import torch
import torch.nn.functional as F
from layer_families import FAMILIES, evaluate, images
from torch import nn

from nncx.nn import TTQConv2d, TTQLinear
from nncx.nn.codes import unpack_codes
from nncx.nn.quantizers import ternary, ternary_regions

_conv, _linear = FAMILIES["TTQ"].conv, FAMILIES["TTQ"].linear


# ---------------------------------------------------------------------------------------------
# the quantizer, by hand

WEIGHT = [2.0, 1.0, 0.5, 0.25, 0.0, -0.25, -0.5, -0.75, -1.5]
THRESHOLD = 0.25  # of 2: what is at 0.5 exactly becomes 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_three_values(dtype):
    weight, three, five = (torch.tensor(x, dtype=dtype) for x in (WEIGHT, 3.0, 5.0))
    values = ternary(weight, three, five, THRESHOLD)
    assert values.dtype == dtype
    assert values.tolist() == [3, 3, 0, 0, 0, 0, 0, -5, -5]


def test_gradients():
    """Of Wn: minus the sum, since the weights are -Wn. Of the largest weight: no way by D."""
    weight, positive, negative = (
        torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (WEIGHT, 3.0, 5.0)
    )
    grad = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128, 256.0]).double()
    ternary(weight, positive, negative, THRESHOLD).backward(grad)
    assert positive.grad.item() == 1 + 2
    assert negative.grad.item() == -(128 + 256)
    assert weight.grad.tolist() == [3 * 1, 3 * 2, 4, 8, 16, 32, 64, 5 * 128, 5 * 256]


def test_gradients_of_the_learned_values_are_differences_of_the_loss():
    layer, x = _conv(padding=1, groups=3).double(), images(dtype=torch.float64)
    loss_weights = images(2, 9, 9, 8, dtype=torch.float64)

    def loss():
        return (layer(x).tanh() * loss_weights).sum()

    loss().backward()
    for learned in (layer.positive, layer.negative):
        with torch.no_grad():
            learned += 1e-6
            above = loss()
            learned -= 2e-6
            difference = (above - loss()) / 2e-6
            learned += 1e-6
        assert abs(difference) > 0.1
        torch.testing.assert_close(learned.grad, difference, rtol=1e-6, atol=1e-6)


def test_the_latent_gradient_is_that_of_the_value_times_wp_1_or_wn():
    layer, x = _linear(50, 20).double(), images(3, 50, dtype=torch.float64)
    with torch.no_grad():
        layer.positive.fill_(0.3)
        layer.negative.fill_(0.7)
    layer(x).square().sum().backward()
    values = layer._values().detach().requires_grad_()
    F.linear(x, values, layer.bias).square().sum().backward()
    scale = {0.3: 0.3, 0.0: 1.0, -0.7: 0.7}
    scales = torch.tensor([scale[v] for v in values.flatten().tolist()]).double()
    torch.testing.assert_close(layer.weight.grad, values.grad * scales.view(20, 50))


def test_regions_of_nothing_and_of_nan():
    assert [r.numel() for r in ternary_regions(torch.empty(3, 0), 0.05)] == [0, 0]
    for values in ([0.0, -0.0], [1.0, float("nan")]):
        assert not any(r.any() for r in ternary_regions(torch.tensor(values), 0.05))


# ---------------------------------------------------------------------------------------------
# where the learned values begin


def _with_weight(values, **extras):
    layer = TTQLinear(len(values), 1, bias=False, threshold=THRESHOLD, **extras)
    layer.load_state_dict({"weight": torch.tensor([values])})
    return layer


@pytest.mark.parametrize(
    "weight, positive, negative",
    [
        (WEIGHT, (2 + 1) / 2, (0.75 + 1.5) / 2),
        ([1.0, 0.5, 0.0, -0.1], 0.75, 0.75),  # none below -D: as above D
        ([-1.0, -0.5, 0.0, 0.1], 0.75, 0.75),
        ([0.0, 0.0], 0, 0),
        ([], 0, 0),
    ],
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_they_begin_as_mean_magnitudes(weight, positive, negative):
    layer = _with_weight(weight)
    assert (layer.positive.item(), layer.negative.item()) == (positive, negative)


def test_that_is_the_least_error_for_the_regions():
    """The reason for it: no other pair of values is as near to the float weight."""
    layer = _conv()

    def error():
        return (layer._values() - layer.weight).square().sum().item()

    least = error()
    for learned in (layer.positive, layer.negative):
        mean = learned.item()
        for other in (0.9 * mean, 1.1 * mean):
            nn.init.constant_(learned, other)
            assert error() > least
        nn.init.constant_(learned, mean)


def test_what_is_masked_counts_neither_for_the_threshold_nor_for_the_means():
    layer = TTQLinear(5, 1, threshold=0.5, masked=True)
    mask = torch.tensor([[False, True, True, True, False]])
    layer.mask = mask
    layer.load_state_dict(
        {**nn.Linear(5, 1).state_dict(), "weight": torch.tensor([[9.0, 4, 3, -1, -9]])}
    )
    assert layer._values().tolist() == [[0, 3.5, 3.5, 0, 0]]


def test_a_float_state_begins_anew_in_the_same_parameters_and_its_own_state_is_kept():
    layer, plain = _conv(), nn.Conv2d(6, 9, 3)
    learned = layer.positive, layer.negative
    plain.weight.data *= 100
    layer.load_state_dict(plain.state_dict())
    assert (layer.positive, layer.negative) == learned  # as an optimizer holds them
    limit = 0.05 * plain.weight.abs().max()
    mean = plain.weight[plain.weight > limit].mean()
    torch.testing.assert_close(layer.positive.detach(), mean.detach())
    with torch.no_grad():
        layer.positive.fill_(0.25)
    other = _conv()
    other.load_state_dict(layer.state_dict())
    assert other.positive.item() == 0.25 and torch.equal(other.negative, layer.negative)


def test_half_of_its_own_state_is_refused():
    state = _conv().state_dict()
    del state["negative"]
    with pytest.raises(RuntimeError, match='Missing key.*"negative"'):
        _conv().load_state_dict(state)


# ---------------------------------------------------------------------------------------------
# evaluation and freezing


@pytest.mark.parametrize("name", ["positive", "negative"])
def test_a_learned_value_that_changed_in_eval_is_refused_until_repack(name):
    layer, x = _conv().eval(), images()
    before = evaluate(layer, x)
    with torch.no_grad():
        getattr(layer, name).mul_(2)
        with pytest.raises(RuntimeError, match="changed since they were packed"):
            layer(x)
        layer.repack()
        torch.testing.assert_close(layer(x), copy.deepcopy(layer).train()(x))
        assert not torch.equal(layer(x), before)


def test_training_moves_all_it_should_and_keeps_three_values():
    layer, x = _conv(), images()
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        layer(x).square().mean().backward()
        optimizer.step()
    assert all(not torch.equal(p, before[name]) for name, p in layer.named_parameters())
    expected = sorted({0.0, layer.positive.item(), -layer.negative.item()})
    assert layer._values().unique().tolist() == expected
    state = layer.freeze().state_dict()
    assert set(state) == {"packed_weight", "codebook", "bias"}
    assert layer.positive is None and layer.negative is None and layer.weight is None
    codes = unpack_codes(state["packed_weight"], 9 * 6 * 9, 2)
    assert codes.unique().tolist() == [0, 1, 2]


@pytest.mark.parametrize("name", ["weight", "positive", "negative"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_freezing_refuses_what_is_not_finite(value, name):
    layer = _conv()
    getattr(layer, name).data.view(-1)[0] = value
    with pytest.raises(ValueError, match="must have a finite weight, got NaN or infinity"):
        layer.freeze()


@pytest.mark.parametrize("threshold", [-0.1, 1, 1.5, float("nan"), "0.05", None])
@pytest.mark.parametrize(
    "build", [lambda **x: TTQConv2d(2, 3, 1, **x), lambda **x: TTQLinear(2, 3, **x)]
)
def test_a_threshold_that_cannot_be_is_refused(build, threshold):
    message = r"^TTQ(Conv2d|Linear): threshold must be at least 0 and less than 1, got .*; the"
    with pytest.raises(ValueError, match=message):
        build(threshold=threshold)


def test_a_threshold_of_zero_leaves_only_zeros_at_zero():
    layer = TTQLinear(3, 1, bias=False, threshold=0)
    layer.load_state_dict({"weight": torch.tensor([[1e-30, 0.0, -2.0]])})
    assert layer._values().ne(0).tolist() == [[True, False, True]]
