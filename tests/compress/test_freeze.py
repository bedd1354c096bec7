"""freeze and repack over a whole model."""

import pytest
import torch
from torch import nn

from nncx.compress import XNOR, Pruning, convert, freeze, repack, thaw
from nncx.models import ResNet
from nncx.nn import PrunedConv2d, PrunedLinear, XNORLinear


def _model():
    torch.manual_seed(0)
    return convert(ResNet(8, width=4), XNOR())


def test_freeze_gives_an_inference_model_with_the_same_output():
    model, x = _model(), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = model.eval()(x)
    assert freeze(model.train()) is model
    assert torch.equal(model(x), expected), "also with gradients enabled"
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    binary = [m for m in model.modules() if getattr(m, "precision", None) == "binary"]
    assert len(binary) == 6 and all(layer.frozen and layer.weight is None for layer in binary)
    assert freeze(model) is model


def test_repack_shows_weights_changed_in_eval_mode():
    model, x = _model().eval(), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        old = model(x)
        for parameter in model.stage2.parameters():
            parameter.neg_()
        assert repack(model) is model
        repacked = model(x)
        assert not torch.equal(repacked, old)
        assert torch.equal(model.train().eval()(x), repacked)


@pytest.mark.parametrize("task", [freeze, repack])
def test_refuses_a_model_without_nncx_layers(task):
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(
        ValueError, match="Sequential has no nncx layer that packs its weight; call"
    ):
        task(model)
    assert model.training


@pytest.mark.parametrize(
    "reparametrise",
    [
        nn.utils.parametrizations.weight_norm,
        pytest.param(
            nn.utils.weight_norm, marks=pytest.mark.filterwarnings("ignore::FutureWarning")
        ),
        nn.utils.spectral_norm,
        lambda layer: nn.utils.parametrize.register_parametrization(layer, "bias", nn.Identity()),
    ],
)
def test_freeze_refuses_reparametrised_weights_before_it_freezes_any(reparametrise):
    model = nn.Sequential(XNORLinear(8, 8), nn.Tanh(), XNORLinear(8, 8))
    reparametrise(model[2])
    with pytest.raises(ValueError, match="freeze: '2' must have a plain weight"):
        freeze(model)
    assert model.training and not model[0].frozen and not model[2].frozen


def test_thaw_undoes_the_freezing_of_pruned_layers():
    torch.manual_seed(0)
    pruning = Pruning(sparsity=0.75)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(20, 3))
    (_,) = pruning.steps(convert(model, pruning))
    x = torch.randn(2, 3, 4, 4)
    weights, masks = ([getattr(model[i], n).clone() for i in (0, 3)] for n in ("weight", "mask"))
    with torch.no_grad():
        expected = freeze(model)(x)
    assert thaw(model) is model
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert len([*model.parameters()]) == 6
    for layer, weight, mask in zip((model[0], model[3]), weights, masks, strict=True):
        assert isinstance(layer, PrunedConv2d | PrunedLinear) and not layer.frozen
        assert torch.equal(layer.mask, mask) and torch.equal(layer.weight, weight.where(mask, 0.0))
        assert layer.packed_weight is layer.gaps is None
    with torch.no_grad():
        assert torch.equal(model.eval()(x), expected)
    model.train()(x).square().sum().backward()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.1)
    optimizer.step()
    with torch.no_grad():
        trained = model.eval()(x)
        assert not torch.equal(trained, expected)
        assert torch.equal(freeze(model)(x), trained)
    assert all(
        (model[i]._expanded()[~mask] == 0).all() for i, mask in zip((0, 3), masks, strict=True)
    )


def test_thaw_refuses_what_has_lost_its_floats():
    pruning = Pruning(sparsity=0.5)
    model = nn.Sequential(convert(nn.Sequential(nn.Linear(8, 8)), pruning), XNORLinear(8, 2))
    freeze(model)
    with pytest.raises(ValueError, match="got a XNORLinear at '1', which has no float weight"):
        thaw(model)
    assert model[0][0].frozen and not model.training
    float_model = nn.Sequential(nn.Linear(2, 2)).eval()
    assert thaw(float_model).training
