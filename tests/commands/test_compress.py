"""`nncx compress`: that what it reports is what the file on disk does, and what it refuses."""

import json
import os
import sys
import types
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from test_cli import images
from torch import nn

import nncx
from nncx import data
from nncx.commands import _compress, _recipe
from nncx.commands._compress import Compression
from nncx.commands._recipe import Recipe
from nncx.compress import observers

LAYERS = {"conv1", "conv2", "fc1", "fc2"}
OPTIONS = {"padding": 2, "norm": True}


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a LeNet that has seen the digits a few times."""
    out = tmp_path_factory.mktemp("lenet")
    _recipe.run(Recipe(model="lenet5", options=OPTIONS, epochs=3, lr=5e-3), out)
    return out / "model.safetensors"


@pytest.fixture
def compression(network: Path) -> Compression:
    return Compression(model=str(network))


def logits(model: nn.Module, split: str = "test") -> torch.Tensor:
    with torch.no_grad():
        return model(getattr(data.load("digits"), split).tensors[0])


def error(model: nn.Module, split: str = "test") -> float:
    wrong = logits(model, split).argmax(1) != getattr(data.load("digits"), split).tensors[1]
    return pytest.approx(100 * wrong.double().mean().item())


def layers(path: Path, kind: type[nn.Module] | tuple[type[nn.Module], ...]) -> set[str]:
    model = nncx.load(path / "model.safetensors")
    return {name for name, layer in model.named_modules() if isinstance(layer, kind)}


# ---------------------------------------------------------------------------------------------
# what it does


@pytest.mark.parametrize("method", _compress.WITHOUT_TRAINING)
def test_every_figure_is_that_of_the_file(
    compression: Compression, network: Path, tmp_path: Path, method: str
) -> None:
    out = tmp_path / "new" / "folder"
    result = _compress.run(replace(compression, methods=(method,)), out)
    assert {path.name for path in out.iterdir()} == {"model.safetensors", "result.json"}
    assert json.loads((out / "result.json").read_text()) == json.loads(json.dumps(asdict(result)))

    before, after = nncx.load(network), nncx.load(out / "model.safetensors")
    assert (result.test_error, result.validation_error) == (
        error(after),
        error(after, "validation"),
    )
    assert result.float_test_error == error(before)
    assert result.float_validation_error == error(before, "validation")
    assert result.test_images == 359
    assert result.file_bytes == (out / "model.safetensors").stat().st_size
    assert result.float_file_bytes == network.stat().st_size
    assert result.ratio == result.float_file_bytes / result.file_bytes
    assert result.ratio > (3.7 if method == "int8" else 1.9)
    assert result.latency_ms.keys() == result.float_latency_ms.keys() == {"1", "16"}
    assert result.machine == nncx._machine.describe()
    precision = "int8" if method == "int8" else f"{method} weights"
    assert result.macs == {precision: 64 * 500 + 16 * 25_000 + 100_000 + 5_000}
    assert 0 < (logits(before) - logits(after)).norm() < 0.03 * logits(before).norm()


OBSERVERS = {
    "minmax": observers.MinMax,
    "moving-average": observers.MovingAverage,
    "percentile": observers.Percentile,
    "entropy": observers.Entropy,
    "mse": observers.MSE,
}


@pytest.mark.parametrize("observer", _compress.OBSERVERS)
def test_options_are_those_of_quantize(
    compression: Compression, network: Path, tmp_path: Path, observer: str
) -> None:
    settings = replace(
        compression,
        observer=observer,
        symmetric=True,
        per_layer=True,
        skip=("conv2",),
        calibration_images=70,
        seed=5,
    )
    _compress.run(settings, tmp_path)
    batches = _compress.calibration_images(data.load("digits"), 70, seed=5)
    wanted = nncx.quantize(
        nncx.load(network),
        batches,
        OBSERVERS[observer](),
        skip=["conv2"],
        per_channel=False,
        symmetric=True,
    )
    assert torch.equal(logits(nncx.load(tmp_path / "model.safetensors")), logits(wanted))
    assert layers(tmp_path, (nncx.Int8Conv2d, nncx.Int8Linear)) == LAYERS - {"conv2"}


def test_vanhoucke_leaves_the_input_layer_float(compression: Compression, tmp_path: Path) -> None:
    _compress.run(replace(compression, vanhoucke=True), tmp_path)
    assert layers(tmp_path, (nncx.Int8Conv2d, nncx.Int8Linear)) == LAYERS - {"conv1"}
    assert len(nncx.load(tmp_path / "model.safetensors").fc1.weight_scale) == 1


def test_16_bits_leave_out_what_is_skipped(compression: Compression, tmp_path: Path) -> None:
    _compress.run(replace(compression, methods=("float16",), skip=("fc1", "conv1")), tmp_path)
    assert layers(tmp_path, (nncx.HalfConv2d, nncx.HalfLinear)) == {"conv2", "fc2"}


def test_the_sensitivity_counts_errors_on_the_validation_split(
    compression: Compression, tmp_path: Path
) -> None:
    result = _compress.run(replace(compression, sensitivity=True), tmp_path)
    assert {row.name for row in result.sensitivity.layers} == LAYERS
    assert result.sensitivity.metric == result.float_validation_error
    assert result.sensitivity.total.metric == result.validation_error
    assert str(result).startswith(str(result.sensitivity))
    record = json.loads((tmp_path / "result.json").read_text())["sensitivity"]
    assert [row["name"] for row in record["layers"]] == ["conv1", "conv2", "fc1", "fc2"]


@pytest.mark.parametrize("count", [1, 200, 10**6])
def test_calibration_draws_training_images_without_repetition(count: int) -> None:
    splits = data.load("digits")
    known = {image.numpy().tobytes(): i for i, image in enumerate(splits.train.tensors[0])}
    duplicates = len(splits.train) - len(known)
    batches = _compress.calibration_images(splits, count, seed=0)
    drawn = [known[image.numpy().tobytes()] for batch, _ in batches for image in batch]
    assert len(drawn) == min(count, len(splits.train))
    assert len(set(drawn)) >= len(drawn) - duplicates
    if count == 200:
        other = next(iter(_compress.calibration_images(splits, count, seed=1)))[0]
        assert not torch.equal(next(iter(batches))[0], other)
        assert len(set(next(iter(batches))[1].tolist())) == 10  # all classes


@pytest.mark.slow
@pytest.mark.skipif("NNCX_DATA" not in os.environ, reason="NNCX_DATA does not say where data are")
def test_a_trained_network_loses_at_most_three_tenths_of_a_point(tmp_path: Path) -> None:
    recipe = Recipe(data="fashion-mnist", model="lenet5", options={"norm": True}, epochs=2, lr=5e-3)
    assert _recipe.run(recipe, tmp_path).test_error < 12
    trained = Compression(model=str(tmp_path / "model.safetensors"), data="fashion-mnist")
    for changes in ({}, {"symmetric": True}, {"observer": "entropy"}, {"vanhoucke": True}):
        result = _compress.run(replace(trained, **changes), tmp_path / "int8")
        assert result.test_error <= result.float_test_error + 0.3, changes
        assert result.ratio > 3.7


# ---------------------------------------------------------------------------------------------
# where networks come from


def saved_by_torch(state: dict[str, torch.Tensor], path: Path) -> None:
    torch.save(state, path)


@pytest.mark.parametrize(
    ("name", "write"),
    [("weights.pth", saved_by_torch), ("weights.safetensors", safetensors.torch.save_file)],
)
def test_a_network_by_name_takes_weights_of_a_state_dict(
    compression: Compression, network: Path, tmp_path: Path, name: str, write: Callable
) -> None:
    write(nncx.load(network).state_dict(), tmp_path / name)
    weights = str(tmp_path / name)
    by_name = replace(compression, model="lenet5", options=OPTIONS, weights=weights)
    result = _compress.run(by_name, tmp_path / "by-name")
    assert result.test_error == _compress.run(compression, tmp_path / "file").test_error
    got, wanted = (nncx.load(tmp_path / d / "model.safetensors") for d in ("by-name", "file"))
    assert torch.equal(logits(got), logits(wanted))


def test_a_network_by_name_takes_the_weights_of_a_file_of_save(
    compression: Compression, network: Path, tmp_path: Path
) -> None:
    by_name = replace(compression, model="lenet5", options=OPTIONS, weights=str(network))
    assert _compress.run(by_name, tmp_path).float_test_error == error(nncx.load(network))


@pytest.fixture
def zoo(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """A torchvision with one network, which notes how it was asked for."""
    calls = []

    class Net(nn.Sequential):
        """No class that `nncx.load` knows."""

    def get_model(name: str, weights: str | None, num_classes: int) -> nn.Module:
        if name != "net":
            raise ValueError(f"Unknown model {name}")
        calls.append({"weights": weights, "num_classes": num_classes})
        torch.manual_seed(0)
        conv = nn.Conv2d(3, 4, 3, bias=False)
        return Net(conv, nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, num_classes))

    torchvision = types.ModuleType("torchvision")
    torchvision.models = types.SimpleNamespace(get_model=get_model)
    monkeypatch.setitem(sys.modules, "torchvision", torchvision)
    return calls


def test_torchvision_networks_are_stored_without_their_class(
    zoo: list[dict], tmp_path: Path
) -> None:
    pytest.importorskip("PIL", reason="image folders are read by Pillow")
    folder = str(images(tmp_path / "photos"))
    own = Compression(model="torchvision:net", data=folder, image_size=8)
    _compress.run(own, tmp_path / "own")
    assert zoo == [{"weights": "DEFAULT", "num_classes": 2}]
    assert layers(tmp_path / "own", nncx.Int8Conv2d) == {"0"}

    net = sys.modules["torchvision"].models.get_model("net", None, 2)
    torch.save(net.state_dict(), tmp_path / "w.pt")
    zoo.clear()
    _compress.run(replace(own, weights=str(tmp_path / "w.pt")), tmp_path / "given")
    assert zoo == [{"weights": None, "num_classes": 2}]
    with pytest.raises(ValueError, match=r"torchvision:other cannot be made .*Unknown model other"):
        _compress.run(replace(own, model="torchvision:other"), tmp_path / "out")


# ---------------------------------------------------------------------------------------------
# what it refuses


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"methods": ("int4",)}, "a method must be one of .*int8, float16, bfloat16, got 'int4'"),
        ({"observer": "max"}, "observer must be one of minmax, moving-average"),
        ({"calibration_images": 0}, "calibration_images must be at least 1, got 0"),
        (
            {"methods": ("float16",), "observer": "mse"},
            "observer means nothing to the method float16",
        ),
        ({"methods": ("float16",), "sensitivity": True}, "sensitivity means nothing to"),
        ({"vanhoucke": True, "skip": ("fc1",)}, "skip means nothing to vanhoucke, got"),
    ],
)
def test_settings_that_cannot_be_are_refused_at_once(changes: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Compression(**changes)


def test_nothing_is_written_for_what_cannot_be_compressed(
    compression: Compression, network: Path, tmp_path: Path
) -> None:
    (tmp_path / "text.pth").write_text("no weights")
    (tmp_path / "text.safetensors").write_text("no weights")
    torch.save({"epoch": 3, "state": {}}, tmp_path / "other.pth")
    nncx.save(nncx.models.LeNet300100(), tmp_path / "large-images.safetensors")
    nncx.save(nncx.models.ResNet(8, in_channels=1, num_classes=7), tmp_path / "7.safetensors")
    nncx.save(nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Softmax()), tmp_path / "no-layer")
    by_name = {"model": "lenet5", "options": OPTIONS}
    refused = (
        ({"model": str(tmp_path / "none.safetensors")}, FileNotFoundError, "none.safetensors"),
        ({"model": "resnet8"}, ValueError, "or have weights, got 'resnet8'"),
        ({"model": "alexnet", "weights": str(network)}, ValueError, "a network is one of"),
        ({"model": "lenet5", "options": {"norm": 1, "n": 2}, "weights": "w"}, ValueError, "made"),
        ({**by_name, "weights": str(tmp_path / "none.pth")}, FileNotFoundError, "none.pth"),
        ({**by_name, "weights": str(tmp_path / "text.pth")}, ValueError, "must be a state dict of"),
        ({**by_name, "weights": str(tmp_path / "text.safetensors")}, ValueError, "a state dict of"),
        ({**by_name, "weights": str(tmp_path / "other.pth")}, ValueError, "Missing key"),
        ({"model": str(tmp_path / "large-images.safetensors")}, ValueError, "must take images"),
        (
            {"model": str(tmp_path / "7.safetensors")},
            ValueError,
            r"digits, got \[1, 7\]",
        ),
        ({"skip": ("fc9",)}, ValueError, "skip names 'fc9'"),
        ({"skip": tuple(LAYERS)}, ValueError, "not skipped, got none"),
        ({"data": "nowhere"}, ValueError, "a data set is one of"),
    )
    for changes, kind, sentence in refused:
        with pytest.raises(kind, match=sentence) as caught:
            _compress.run(replace(compression, **changes), tmp_path / "out")
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_an_out_that_is_a_file_is_refused_before_any_work(
    compression: Compression, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.write_text("mine")
    with pytest.raises(ValueError, match="out must be a folder, got the file"):
        _compress.run(replace(compression, data="none"), out)
    assert out.read_text() == "mine"
