"""Layers of Deep Compression: which values their weights have, and how training moves those."""

import copy

import pytest
import torch
from layer_families import evaluate, expected_output, images
from torch import nn

from nncx import load, save
from nncx.compress import freeze
from nncx.nn import SharedConv2d, SharedLinear
from nncx.nn.codes import unpack_codes


def _conv(bits=3, masked=False, **arguments):
    torch.manual_seed(0)
    return _with_mask(SharedConv2d(6, 9, 3, padding=1, bits=bits, masked=masked, **arguments))


def _linear(bits=3, masked=False, **arguments):
    torch.manual_seed(0)
    return _with_mask(SharedLinear(70, 5, bits=bits, masked=masked, **arguments))


def _with_mask(layer):
    """At random, a third of the weights."""
    if layer.masked:
        layer.mask.copy_(torch.rand(layer.mask.shape) > 1 / 3)
    return layer


LAYERS = {"conv": (_conv, (2, 6, 9, 8)), "linear": (_linear, (4, 70))}
either = pytest.mark.parametrize("build, shape", LAYERS.values(), ids=LAYERS)
masked_or_not = pytest.mark.parametrize("masked", [True, False])


def _by_hand(layer):
    """W_i = C[I_i], one after the other, and 0 where the mask is False."""
    kept = [True] * layer.codes.numel() if layer.mask is None else layer.mask.flatten().tolist()
    values = [0.0] * layer.masked + layer.centroids.tolist()
    codes = layer.codes.flatten().tolist()
    by_hand = [values[code] if keep else 0.0 for code, keep in zip(codes, kept, strict=True)]
    return torch.tensor(by_hand).view(layer.codes.shape)


# ---------------------------------------------------------------------------------------------
# values


@either
@masked_or_not
@pytest.mark.parametrize("bits", range(1, 9))
def test_it_is_torchs_layer_with_the_values_of_its_codes(bits, masked, build, shape, isa):
    layer, x = build(bits, masked), images(*shape)
    weight = _by_hand(layer)
    layer.weight = nn.Parameter(torch.empty_like(weight))  # of the twin that torch computes with
    expected = expected_output(layer, x, weight)
    layer.weight = None
    torch.testing.assert_close(layer(x).double().detach(), expected, rtol=1e-5, atol=1e-5)
    evaluated = evaluate(layer, x)
    torch.testing.assert_close(evaluated.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(evaluate(layer.freeze(), x), evaluated)


@either
@masked_or_not
@pytest.mark.parametrize("bits", [1, 2, 5, 8])
def test_there_are_as_many_values_as_codes(bits, masked, build, shape):
    layer = build(bits, masked)
    assert layer.centroids.shape == (2**bits - masked,)
    assert len(_by_hand(layer).unique()) <= 2**bits
    frozen = copy.deepcopy(layer).freeze()
    assert frozen.precision == f"{bits}-bit codebook" and frozen.codebook.shape == (2**bits,)
    codes = unpack_codes(frozen.packed_weight, layer.codes.numel(), bits)
    assert torch.equal(frozen.codebook[codes.long()], _by_hand(layer).flatten())
    if masked:
        assert frozen.codebook[0] == 0 and codes[~layer.mask.flatten()].eq(0).all()
        assert codes[layer.mask.flatten()].ne(0).all()


@either
def test_a_new_layer_is_a_new_layer_of_torch_to_the_next_of_its_values(build, shape):
    layer = build(8)
    torch.manual_seed(0)
    plain = nn.Conv2d(6, 9, 3) if layer.codes.dim() == 4 else nn.Linear(70, 5)
    step = layer.centroids[1] - layer.centroids[0]
    assert (_by_hand(layer) - plain.weight).abs().max() < 0.51 * step
    assert torch.equal(layer.bias, plain.bias) and layer.weight is None


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0), (1, 1)])
def test_the_smallest_layers(shape):
    layer = SharedLinear(*shape, masked=True)
    x = torch.ones(2, shape[0])
    torch.testing.assert_close(evaluate(layer, x), layer.train()(x).detach())
    assert evaluate(layer.freeze(), x).shape == (2, shape[1])


@pytest.mark.parametrize("bits", [0, 9, -1, 2.5, "5", True, None])
@pytest.mark.parametrize("build", [_conv, _linear])
def test_other_widths_are_refused(build, bits):
    with pytest.raises(ValueError, match=r"^Shared\w+: bits must be an integer from 1 to 8, got"):
        build(bits)


# ---------------------------------------------------------------------------------------------
# training


@either
@masked_or_not
def test_the_gradient_of_a_centroid_is_the_sum_over_its_weights(masked, build, shape):
    layer, x = build(3, masked), images(*shape)
    twin = nn.Conv2d(6, 9, 3, padding=1) if len(shape) == 4 else nn.Linear(70, 5)
    twin.weight.data, twin.bias.data = _by_hand(layer), layer.bias.detach().clone()
    for each in (layer, twin):
        each(x).square().sum().backward()
    counts = torch.ones_like(layer.codes, dtype=torch.bool) if layer.mask is None else layer.mask
    sums = [
        twin.weight.grad[(layer.codes == k + masked) & counts].sum()
        for k in range(len(layer.centroids))
    ]
    torch.testing.assert_close(layer.centroids.grad, torch.stack(sums), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.bias.grad, twin.bias.grad, rtol=1e-4, atol=1e-4)


@either
@masked_or_not
def test_gradcheck_of_centroids_bias_and_input(masked, build, shape):
    layer = build(2, masked, dtype=torch.float64)
    x = images(*shape, dtype=torch.float64)[:1].requires_grad_()
    torch.autograd.gradcheck(
        lambda centroids, bias, x: torch.func.functional_call(
            layer, {"centroids": centroids, "bias": bias}, x
        ),
        (layer.centroids, layer.bias, x),
    )


OPTIMIZERS = {
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.1, weight_decay=0.1),
    "SGD": lambda parameters: torch.optim.SGD(
        parameters, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True
    ),
}


@either
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_moves_the_centroids_and_no_code_nor_zero(optimizer, build, shape):
    layer, x = build(3, True), images(*shape)
    codes, before = layer.codes.clone(), layer.centroids.detach().clone()
    steps = OPTIMIZERS[optimizer](layer.parameters())
    for _ in range(4):
        steps.zero_grad()
        layer(x).square().mean().backward()
        steps.step()
    assert torch.equal(layer.codes, codes) and layer.centroids.ne(before).all()
    assert _by_hand(layer)[~layer.mask].eq(0).all() and _by_hand(layer)[layer.mask].ne(0).all()
    trained = layer(x).detach()
    torch.testing.assert_close(
        evaluate(layer, x), trained, rtol=1e-5, atol=1e-5 * trained.abs().max()
    )
    expected, centroids = evaluate(layer, x), layer.centroids.detach()
    assert torch.equal(evaluate(layer.freeze(), x), expected)
    assert layer.codebook[0] == 0 and torch.equal(layer.codebook[1:], centroids)


def test_a_step_of_the_centroids_in_eval_is_refused_until_repack():
    layer, x = _linear(3, True).eval(), images(4, 70)
    before = evaluate(layer, x)
    for change in (lambda: layer.centroids.mul_(2), lambda: layer.mask.logical_not_()):
        with torch.no_grad():
            change()
            with pytest.raises(RuntimeError, match=r"since they were packed; call nncx.repack"):
                layer(x)
            layer.repack()
            assert not torch.equal(layer(x), before)
            torch.testing.assert_close(layer(x), layer.train()(x))
            layer.eval()


# ---------------------------------------------------------------------------------------------
# share


@either
def test_share_takes_any_assignment(build, shape):
    layer, x = build(3, True), images(*shape)
    assignment = torch.randint(0, 5, layer.codes.shape)
    centroids = torch.tensor([0.5, -1.0, 2.0, 0.0, 3.0])
    optimized = layer.centroids
    layer.eval().share(assignment, centroids)
    weight = torch.where(layer.mask, centroids[assignment], 0)
    assert torch.equal(_by_hand(layer), weight)
    assert torch.equal(layer.centroids.detach(), torch.tensor([*centroids.tolist(), 0.0, 0.0]))
    assert layer.centroids is not optimized and layer.centroids.requires_grad
    torch.testing.assert_close(evaluate(layer, x), layer.train()(x).detach())


def test_share_refuses_what_does_not_fit():
    layer = _linear(3, True)
    codes = torch.zeros(5, 70, dtype=torch.int64)
    message = r"must be \[5, 70\] and the centroids at most 7, got "
    with pytest.raises(ValueError, match=rf"^SharedLinear: .*{message}\[5, 70\] and 8; assign"):
        layer.share(codes, torch.zeros(8))
    with pytest.raises(ValueError, match=rf"^SharedLinear: .*{message}\[70, 5\] and 7; assign"):
        layer.share(codes.T, torch.zeros(7))
    with pytest.raises(ValueError, match="^SharedLinear: a frozen layer must keep its values"):
        layer.freeze().share(codes, torch.zeros(7))


# ---------------------------------------------------------------------------------------------
# files


@masked_or_not
@pytest.mark.parametrize("frozen", [True, False])
def test_files_give_the_same_bits(frozen, masked, tmp_path):
    model = nn.Sequential(_conv(5, masked), nn.Flatten(), SharedLinear(9 * 72, 7, bits=3))
    x = images(2, 6, 9, 8)
    if frozen:
        freeze(model)
    expected = evaluate(model, x)
    save(model, tmp_path / "model.safetensors")
    loaded = load(tmp_path / "model.safetensors")
    assert torch.equal(evaluate(loaded.requires_grad_(False), x), expected)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(t, loaded.state_dict()[name]) for name, t in model.state_dict().items())
    assert loaded[0].masked is (masked and not frozen)


def test_codes_that_no_centroid_has_are_refused():
    layer, bad = _linear(3).eval(), _linear(3).state_dict()
    bad["codes"] = bad["codes"] + 1
    with pytest.raises(ValueError, match="a 3-bit code must be below 8, got 8"):
        layer.load_state_dict(bad)
