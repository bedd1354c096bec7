"""nncx.Hashed: linear layers swapped for hashed ones that begin near them."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import nncx
from nncx.compress.hashed import fit
from nncx.nn import HashedLinear

sys.path.append(str(Path(__file__).parents[1] / "ops"))
from hashes import places, virtual_weight  # noqa: E402


def _network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.Flatten(),
        nn.Linear(144, 64),
        nn.ReLU(),
        nn.Linear(64, 64, bias=False),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def test_every_linear_layer_is_hashed_with_a_seed_of_its_own():
    model = _network()
    biases = [layer.bias for layer in model[2::2]]
    assert nncx.convert(model, nncx.Hashed(compression=1 / 4, seed=3)) is model
    assert [type(layer) for layer in model[2::2]] == [HashedLinear] * 3
    assert type(model[0]) is nn.Conv2d
    assert [layer.seed for layer in model[2::2]] == [3 * 65_536 + n for n in range(3)]
    assert [layer.buckets for layer in model[2::2]] == [2304, 1024, 160]
    assert all(a.bias is b for a, b in zip(model[2::2], biases, strict=True))
    assert model(torch.randn(2, 1, 8, 8)).shape == (2, 10)


def test_the_same_method_makes_the_same_layers_again():
    method = nncx.Hashed(seed=1)
    first, second = (nncx.convert(_network(), method) for _ in range(2))
    assert [layer.seed for layer in first[2::2]] == [layer.seed for layer in second[2::2]]
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(first(x), second(x))
    other = nncx.convert(_network(), nncx.Hashed(seed=2))
    assert not torch.equal(first(x), other(x))


def test_skipped_layers_stay_and_others_are_left_alone():
    class Mine(nn.Linear):
        pass

    model = nn.Sequential(Mine(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    nncx.convert(model, nncx.Hashed(), skip=["1"])
    assert [type(layer) for layer in model] == [Mine, nn.Linear, HashedLinear]


@pytest.mark.parametrize("training", [True, False])
def test_mode_dtype_and_requires_grad_are_kept(training):
    model = nn.Sequential(nn.Linear(20, 30, dtype=torch.float64)).train(training)
    model[0].weight.requires_grad_(False)
    nncx.convert(model, nncx.Hashed())
    assert model[0].training == training
    assert model[0].weight.dtype == torch.float64 and not model[0].weight.requires_grad
    with torch.no_grad():
        assert model(torch.randn(2, 20).double()).dtype == torch.float64


def test_the_fit_is_that_of_least_squares_but_for_a_factor():
    weight = torch.randn(30, 40)
    place = torch.from_numpy(places(7, 50, 40, 30)).flatten()
    design = torch.zeros(1200, 50, dtype=torch.float64)
    design[torch.arange(1200), place // 2] = (1 - 2 * (place % 2)).double()
    solution = torch.linalg.lstsq(design, weight.double().view(-1, 1)).solution[:, 0]
    fitted = fit(weight, 7, 50)
    scale = weight.norm() / virtual_weight(solution, 7, 40, 30).norm()
    torch.testing.assert_close(fitted.double(), solution * scale.double(), rtol=1e-4, atol=1e-5)


def test_a_weight_that_the_buckets_can_hold_is_kept():
    buckets = torch.randn(50)
    weight = virtual_weight(buckets, 7, 40, 30)
    torch.testing.assert_close(fit(weight, 7, 50), buckets)


def test_a_new_network_keeps_its_width():
    model, plain = nn.Sequential(nn.Linear(400, 300)), nn.Linear(400, 300)
    nncx.convert(model, nncx.Hashed(1 / 64))
    virtual = model[0].virtual_weight()
    torch.testing.assert_close(virtual.std(), plain.weight.std(), rtol=0.03, atol=0)


@pytest.mark.parametrize("weight", [torch.zeros(3, 4), torch.zeros(0, 4), torch.zeros(3, 0)])
def test_nothing_to_fit(weight):
    assert torch.equal(fit(weight, 0, 100), torch.zeros(100))


def test_a_hashed_network_learns():

    torch.manual_seed(0)
    x = torch.randn(200, 20)
    y = (x[:, :10].sum(1) > 0).long()
    model = nncx.convert(
        nn.Sequential(nn.Linear(20, 50), nn.ReLU(), nn.Linear(50, 2)), nncx.Hashed()
    )
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        assert (model(x).argmax(1) == y).float().mean() > 0.95


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"compression": 0.0}, r"Hashed: compression must be in \(0, 1\], got 0.0"),
        ({"compression": 2}, r"Hashed: compression must be in \(0, 1\], got 2"),
        ({"seed": 2**47}, "Hashed: seed must be an integer of 48 bits, got 140737488355328"),
        ({"seed": 1.5}, "Hashed: seed must be an integer of 48 bits, got 1.5"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        nncx.Hashed(**arguments)
