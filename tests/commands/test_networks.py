"""Networks as command lines name them; what `nncx compress` does with one is in test_compress."""

import sys
import types

import pytest
import torch
from torch import nn

import nncx
from nncx import data
from nncx.commands import _networks


@pytest.fixture(scope="module")
def splits():
    """Two images of 3 x 8 x 8 in each part, two classes."""
    pairs = torch.utils.data.TensorDataset(torch.randn(2, 3, 8, 8), torch.tensor([0, 1]))
    classes = ("cat", "dog")
    return data.Splits("pets", pairs, pairs, pairs, 2, 3, 8, classes, (0.5,) * 3, (0.2,) * 3)


class Net(nn.Sequential):
    """No class that `nncx.load` knows."""

    def __init__(self, num_classes, channels=3):
        layers = nn.Conv2d(channels, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()
        super().__init__(*layers, nn.Linear(144, num_classes))


@pytest.fixture
def torchvision(monkeypatch):
    """One that has only `Net`; it notes which weights were asked for."""
    asked = []

    def get_model(name, weights, **options):
        asked.append(weights)
        return Net(**options)

    module = types.ModuleType("torchvision")
    module.models = types.SimpleNamespace(get_model=get_model)
    monkeypatch.setitem(sys.modules, "torchvision", module)
    return asked


def test_a_student_is_random_and_trains(splits, torchvision):
    own = _networks.make("lenet5", splits, {"padding": 2})
    assert (own.in_channels, own.num_classes, own.image_size, own.padding) == (3, 2, 8, 2)
    theirs = _networks.make("torchvision:net", splits)
    assert torchvision == [None] and theirs.training and theirs[1].num_batches_tracked == 0


def test_a_teacher_is_in_eval_mode_with_its_weights(splits, torchvision, tmp_path):
    teacher = Net(2).eval()
    torch.save(teacher.state_dict(), tmp_path / "weights.pt")
    images, _ = splits.test[[0, 1]]
    nncx.save(_networks.storable(teacher, images), tmp_path / "net.safetensors")
    found = [
        _networks.trained("torchvision:net", splits, weights=str(tmp_path / "weights.pt")),
        _networks.trained(str(tmp_path / "net.safetensors"), splits),
    ]
    assert torchvision == [None]
    for model in found:
        assert not model.training and torch.equal(model(images), teacher(images))
    _networks.trained("torchvision:net", splits)
    assert torchvision == [None, "DEFAULT"]


def test_storable_leaves_alone_what_needs_no_graph(splits):
    model = _networks.make("lenet5", splits, {"padding": 2}).eval()
    assert _networks.storable(model, splits.test[0][0].unsqueeze(0)) is model


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda s: _networks.make("alexnet", s), "a network is one of fitnet19, .* got 'alexnet'"),
        (
            lambda s: _networks.make("nin", s, {"depth": 3}),
            r"nin cannot be made with \{'depth': 3\}",
        ),
        (
            lambda s: _networks.make("torchvision:net", s, {"channels": 1}),
            r"images \[3, 8, 8\] of p",
        ),
        (lambda s: _networks.make("torchvision:net", s, {"size": 1}), "torchvision:net cannot be"),
        (
            lambda s: _networks.trained("nin", s),
            "must be a file of nncx.save, or have weights, got",
        ),
        (
            lambda s: _networks.trained("net.safetensors", s, {"depth": 3}),
            r"options are those of a network by name, got \{'depth': 3\} for net.safetensors",
        ),
        (
            lambda s: _networks.trained("torchvision:net", s, {"num_classes": 3}),
            r"a logit for each of the 2 classes of pets, got \[1, 3\]",
        ),
    ],
)
def test_refuses(splits, torchvision, build, message):
    with pytest.raises(ValueError, match=message):
        build(splits)


def test_a_missing_file_is_named(splits, tmp_path):
    with pytest.raises(FileNotFoundError, match="none.safetensors"):
        _networks.trained(str(tmp_path / "none.safetensors"), splits)
