"""The method BinaryConnect: what convert makes of a network, and the learning rates."""

import math

import pytest
import torch
from torch import nn

from nncx import train
from nncx.compress import XNOR, BinaryConnect, convert, freeze
from nncx.compress.binary_connect import parameter_groups
from nncx.models import MLP, VGG9, LeNet5, NiN, ResNet
from nncx.nn import (
    BinaryConnectConv2d,
    BinaryConnectLinear,
    SquaredHingeLoss,
    XNORConv2d,
    XNORLinear,
)


def _network():
    return nn.Sequential(
        *(nn.Conv2d(4, 6, (3, 5), 2, (1, 2), groups=2, bias=False), nn.BatchNorm2d(6), nn.ReLU()),
        *(nn.Dropout(0.1), nn.Flatten(), nn.Linear(6 * 16, 5), nn.BatchNorm1d(5)),
    )


@pytest.mark.parametrize("stochastic", [True, False])
def test_every_layer_is_swapped_first_and_last_included_and_nothing_else(stochastic):
    model, plain = _network(), _network()
    weight, bias = model[0].weight, model[5].bias
    assert convert(model, BinaryConnect(stochastic)) is model
    assert type(model[0]) is BinaryConnectConv2d and type(model[5]) is BinaryConnectLinear
    assert model[0].weight is weight and model[5].bias is bias
    assert model[0].stochastic is model[5].stochastic is stochastic
    extra = ", stochastic=True" if stochastic else ""
    assert repr(model[0]) == f"BinaryConnect{repr(plain[0])[:-1]}{extra})"
    for i in (1, 2, 3, 4, 6):
        assert type(model[i]) is type(plain[i])


@pytest.mark.parametrize(
    "model", [MLP(width=32), VGG9(width=4, hidden=8), LeNet5(norm=True), NiN(), ResNet(8, width=4)]
)
def test_models_of_nncx_convert_train_and_keep_their_relus(model):
    count = sum(type(m) in (nn.Conv2d, nn.Linear) for m in model.modules())
    relus = sum(isinstance(m, nn.ReLU) for m in model.modules())
    convert(model, BinaryConnect())
    layers = [
        m for m in model.modules() if isinstance(m, (BinaryConnectConv2d, BinaryConnectLinear))
    ]
    assert len(layers) == count and sum(isinstance(m, nn.ReLU) for m in model.modules()) == relus
    size = getattr(model, "image_size", 16)
    model(torch.randn(2, model.in_channels, size, size)).square().sum().backward()
    assert all(layer.weight.grad.isfinite().all() for layer in layers)


def test_after_xnor_it_takes_the_layers_that_xnor_left_float():
    model = convert(convert(VGG9(width=4, hidden=8), XNOR()), BinaryConnect())
    kinds = [type(m) for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert kinds == [
        *(BinaryConnectConv2d, *[XNORConv2d] * 5),
        *(XNORLinear, XNORLinear, BinaryConnectLinear),
    ]
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()


def test_a_model_that_torch_fx_cannot_trace_converts():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return self.fc(x) if x.sum() > 0 else x

    assert isinstance(convert(Branches(), BinaryConnect()).fc, BinaryConnectLinear)


def test_weights_are_scaled_to_the_mean_square_of_the_uniform_distribution():
    model = _network()
    model[5].weight.data.mul_(100)
    before = [model[i].weight.detach().clone() for i in (0, 5)]
    convert(model, BinaryConnect())
    for i, old in zip((0, 5), before, strict=True):
        weight = model[i].weight.detach()
        assert weight.square().mean().item() == pytest.approx(1 / 3, rel=1e-5)
        ratio = weight / old
        assert ratio.min() > 0 and (ratio / ratio.mean() - 1).abs().max() < 1e-5


def test_a_new_network_starts_like_the_papers():
    """torch's initial weights are uniform; scaled, they are Uniform(-1, 1)."""
    weight = convert(VGG9(width=16), BinaryConnect()).fc1.weight.detach()
    assert weight.abs().max().item() == pytest.approx(1, rel=0.01)
    quartiles = torch.quantile(weight.flatten()[:100_000], torch.tensor([0.25, 0.5, 0.75]))
    assert (quartiles - torch.tensor([-0.5, 0, 0.5])).abs().max() < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_of_zero_stay_zero(dtype):
    model = nn.Sequential(nn.Linear(3, 2)).to(dtype)
    model[0].weight.data.zero_()
    assert convert(model, BinaryConnect())[0].weight.eq(0).all()


def test_a_tied_weight_is_scaled_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    convert(model, BinaryConnect())
    assert model[0].weight is model[1].weight
    assert model[0].weight.square().mean().item() == pytest.approx(1 / 3, rel=1e-5)


# ---------------------------------------------------------------------------------------------
# learning rates


@pytest.mark.parametrize("squared", [True, False])
def test_learning_rates_are_the_papers(squared):
    model = convert(_network(), BinaryConnect())
    groups = parameter_groups(model, 0.01, squared)
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert len(rates) == sum(len(group["params"]) for group in groups) == 7
    assert rates.keys() == {id(p) for p in model.parameters()}
    # 2 inputs and 3 outputs a group, 15 taps; 96 inputs and 5 outputs.
    for layer, fans in [(model[0], (2 + 3) * 15), (model[5], 96 + 5)]:
        coefficient = 1 / math.sqrt(1.5 / fans)
        expected = 0.01 * (coefficient**2 if squared else coefficient)
        assert rates[id(layer.weight)] == pytest.approx(expected, rel=1e-12)
    for other in (model[1].weight, model[1].bias, model[5].bias, model[6].weight):
        assert rates[id(other)] == 0.01


def test_layers_of_one_size_share_a_group_and_tied_weights_come_once():
    layers = [nn.Linear(8, 8, bias=False) for _ in range(3)]
    layers[2].weight = layers[0].weight
    groups = parameter_groups(convert(nn.Sequential(*layers), BinaryConnect()), 0.1)
    assert [len(group["params"]) for group in groups] == [2]


@pytest.mark.parametrize(
    "optimizer, squared",
    [(torch.optim.Adam, False), (torch.optim.SGD, True), (torch.optim.RMSprop, False)],
)
def test_schedulers_keep_the_proportions(optimizer, squared):
    model = convert(_network(), BinaryConnect())
    optimizer = optimizer(parameter_groups(model, 0.01, squared), lr=1.0)
    before = [group["lr"] for group in optimizer.param_groups]
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    model(torch.randn(2, 4, 8, 8)).sum().backward()
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [rate / 2 for rate in before]


@pytest.mark.parametrize(
    "model",
    [_network(), freeze(convert(nn.Sequential(nn.Linear(4, 4)), BinaryConnect()))],
    ids=["float", "frozen"],
)
def test_learning_rates_need_real_weights(model):
    with pytest.raises(ValueError, match="parameter_groups: Sequential must have a BinaryConnect"):
        parameter_groups(model, 0.1)


@pytest.mark.parametrize(
    "stochastic, optimizer, lr, squared",
    [
        (False, torch.optim.Adam, 3e-3, False),
        (False, torch.optim.SGD, 0.3, True),
        (True, torch.optim.SGD, 1.0, True),
    ],
)
def test_a_network_learns(stochastic, optimizer, lr, squared):
    """Two classes that only a hidden layer tells apart: the sign of a product of two pixels."""
    images = torch.randn(512, 1, 2, 2)
    labels = (images[:, 0, 0, 0] * images[:, 0, 0, 1] > 0).long()
    model = convert(MLP(1, 2, 2, width=64, depth=2), BinaryConnect(stochastic))
    batches = list(zip(images.split(64), labels.split(64), strict=True))
    optimizer = optimizer(parameter_groups(model, lr, squared))
    history = train.fit(
        train.Supervised(model, SquaredHingeLoss()),
        batches,
        epochs=25,
        optimizer=optimizer,
        scheduler=torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
        progress=False,
    )
    assert history[-1]["loss"] < 0.6 * history[0]["loss"]
    assert train.error_rate(model, batches) < 25
