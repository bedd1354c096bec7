"""`nncx compress` with methods that train: what is in the file, what continues, what is refused."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import nn

import nncx
from nncx import data, train
from nncx.commands import _compress, _finetune, _recipe
from nncx.commands._compress import Compression
from nncx.commands._finetune import METHODS
from nncx.nn import PackedLayer
from nncx.nn.codes import unpack_codes

# Settings of each method, and how many times smaller they at least make the file of `network`.
SETTINGS: dict[str, tuple[dict, float]] = {
    "deep-compression": ({"conv_bits": 4, "linear_bits": 3}, 4),
    "filters": ({"amount": 0.5}, 1.5),
    "hashed": ({"compression": 0.25}, 1.5),
    "inq": ({"bits": 4, "fractions": [0.5, 1]}, 4),
    "low-rank": ({"speedup": 2}, 1.2),
    "prune": ({"sparsity": 0.8, "rounds": 2}, 3),
    "ttq": ({}, 3),
    "xnor": ({}, 2.5),
}


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a small network that has seen the digits a few times."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(128, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip
    batches = data.loader(data.load("digits").train, 64, shuffle=True)
    train.fit(model, batches, epochs=3, optimizer=torch.optim.Adam(model.parameters(), 5e-3))
    path = tmp_path_factory.mktemp("network") / "float.safetensors"
    nncx.save(model, path)
    return path


@pytest.fixture
def compression(network: Path) -> Compression:
    return Compression(model=str(network), methods=("xnor",), train_images=600, epochs=2, lr=3e-3)


def error(model: nn.Module, split: str = "test") -> float:
    images, labels = getattr(data.load("digits"), split).tensors
    with torch.no_grad():
        wrong = model(images).argmax(1) != labels
    return pytest.approx(100 * wrong.double().mean().item())


def state(path: Path) -> dict[str, torch.Tensor]:
    return nncx.load(path / "model.safetensors").state_dict()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@dataclass
class Halved:
    number: int
    left: float


class Stepwise(nncx.XNOR):
    """Binary layers in two steps, each of which depends on the weights that it finds."""

    def steps(self, model: nn.Module) -> Iterator[Halved]:
        layer = next(m for m in model.modules() if isinstance(m, nncx.XNORConv2d))
        for number in (1, 2):
            with torch.no_grad():
                layer.weight.div_(2)
            yield Halved(number, layer.weight.abs().sum().item())


@pytest.fixture
def stepwise(compression: Compression, monkeypatch: pytest.MonkeyPatch) -> Compression:
    monkeypatch.setitem(METHODS, "stepwise", Stepwise)
    monkeypatch.setattr(_compress, "METHODS", (*_compress.METHODS, "stepwise"))
    return replace(compression, methods=("stepwise",))


# ---------------------------------------------------------------------------------------------
# what it does


@pytest.mark.parametrize("method", METHODS)
def test_every_figure_is_that_of_the_file(
    compression: Compression, network: Path, tmp_path: Path, method: str
) -> None:
    options, ratio = SETTINGS[method]
    settings = replace(compression, methods=(method,), method_options=options)
    result = _compress.run(settings, tmp_path)
    assert json.loads((tmp_path / "result.json").read_text()) == json.loads(
        json.dumps(asdict(result))
    )
    before, after = nncx.load(network), nncx.load(tmp_path / "model.safetensors")
    assert (result.float_test_error, result.test_error) == (error(before), error(after))
    assert result.validation_error == error(after, "validation")
    assert result.float_file_bytes == network.stat().st_size
    assert result.file_bytes == (tmp_path / "model.safetensors").stat().st_size
    assert result.ratio == result.float_file_bytes / result.file_bytes > ratio
    assert result.test_error < 70
    assert not list(tmp_path.glob("*.checkpoint"))
    assert result.trained_on == "1 x cpu" and result.seconds > 0
    for training in result.trainings:
        assert training.name.startswith(method) and len(training.history) == 2
        assert (tmp_path / training.name / "history.csv").is_file()
    last = result.trainings[-1]
    validation = [record["validation"] for record in last.history]
    assert last.best_epoch == 1 + validation.index(min(validation))


def test_the_file_does_what_the_library_does(
    compression: Compression, network: Path, tmp_path: Path
) -> None:
    """The command is convert, fit, freeze, save with the recipe's settings, and no more."""
    settings = replace(compression, method_options={"scale": "none"}, skip=("4", "12"), seed=5)
    result = _compress.run(settings, tmp_path)
    torch.manual_seed(5)
    method = nncx.XNOR(scale="none")
    model = nncx.convert(nncx.load(network), method, skip=["4", "12"])
    optimizer = torch.optim.Adam(model.parameters(), 3e-3, fused=True)
    splits = _recipe.splits_of(settings)
    torch.manual_seed(5)
    history = train.fit(
        model,
        data.loader(splits.train, settings.batch, shuffle=True, seed=5),
        epochs=2,
        optimizer=optimizer,
        scheduler=torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.01),
        validate=lambda: train.error_rate(model, data.loader(splits.validation, 256)),
        keep_best=True,
    )
    assert result.trainings[0].history == history
    assert same(state(tmp_path), nncx.freeze(model).state_dict())


def test_steps_are_trained_one_after_the_other(
    stepwise: Compression, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    result = _compress.run(stepwise, tmp_path)
    assert [training.name for training in result.trainings] == ["stepwise-1", "stepwise-2"]
    assert [training.step["number"] for training in result.trainings] == [1, 2]
    told = capsys.readouterr().err
    assert all(str(Halved(**training.step)) in told for training in result.trainings)


def test_methods_are_applied_in_order(compression: Compression, tmp_path: Path) -> None:
    settings = replace(compression, methods=("xnor", "int8"), symmetric=True)
    result = _compress.run(settings, tmp_path)
    model = nncx.load(tmp_path / "model.safetensors")
    kinds = [type(module) for module in model.modules() if isinstance(module, nncx.nn.PackedLayer)]
    assert kinds == [nncx.Int8Conv2d, nncx.XNORConv2d, nncx.XNORLinear, nncx.Int8Linear]
    assert result.macs.keys() == {"int8", "binary"}
    assert "float.safetensors xnor, int8: test error" in str(result)


def test_a_file_with_masks_goes_on_and_is_compared_with_one_without(
    compression: Compression, network: Path, tmp_path: Path
) -> None:
    """As pruning leaves it before freezing: with masks the float file is a quarter larger."""
    pruning = nncx.Pruning(sparsity=0.5)
    model = nncx.convert(nncx.load(network), pruning)
    assert len(list(pruning.steps(model))) == 1
    nncx.save(model, tmp_path / "masked.safetensors")
    settings = replace(
        compression, model=str(tmp_path / "masked.safetensors"), methods=("deep-compression",)
    )
    result = _compress.run(settings, tmp_path / "shared")
    assert result.float_file_bytes == network.stat().st_size
    assert (tmp_path / "masked.safetensors").stat().st_size > 1.2 * network.stat().st_size
    layers = nncx.load(tmp_path / "shared" / "model.safetensors").modules()
    assert sum(isinstance(layer, nncx.SharedConv2d | nncx.SharedLinear) for layer in layers) == 4


class Foreign(nn.Module):
    """A class that no file can name, with a dropout that training needs."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(16, 10)
        self.middle, self.norm = nn.Linear(16, 16), nn.BatchNorm1d(16)
        self.first, self.dropout = nn.Linear(64, 16), nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.norm(self.middle(self.dropout(self.first(x.flatten(1))))))


def test_a_network_of_any_class_is_trained_as_it_is(
    compression: Compression, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its dropout; and stored as a graph."""
    trained = []
    monkeypatch.setattr(_compress._networks, "trained", lambda *_: Foreign().eval())
    monkeypatch.setattr(nn.Dropout, "forward", lambda self, x: trained.append(self.training) or x)
    result = _compress.run(replace(compression, methods=("ttq",)), tmp_path)
    assert result.ratio > 1
    assert any(trained)
    monkeypatch.undo()
    graph = nncx.load(tmp_path / "model.safetensors")
    assert type(graph) is nncx.graph.Graph and type(graph.middle) is nncx.TTQLinear


def test_histories_are_drawn_on_demand(compression: Compression, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    _compress.run(compression, tmp_path, _recipe.Setup(plot=True))
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


# ---------------------------------------------------------------------------------------------
# what continues


@pytest.mark.parametrize("interrupted", [1, 2])
def test_an_interrupted_run_continues(
    stepwise: Compression, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupted: int
) -> None:
    """Stopped in a step after its first epoch: what was done stays, and the end is the same."""
    whole = _compress.run(stepwise, tmp_path / "whole")
    fit, calls = train.fit, []

    def stopped(task, batches, **settings):
        calls.append(settings)
        if len(calls) == interrupted:
            fit(task, batches, **{**settings, "epochs": 1, "scheduler": settings["scheduler"]})
            raise KeyboardInterrupt("stopped here")
        return fit(task, batches, **settings)

    monkeypatch.setattr(train, "fit", stopped)
    with pytest.raises(KeyboardInterrupt):
        _compress.run(stepwise, tmp_path / "halves")
    assert not (tmp_path / "halves" / "model.safetensors").exists()
    monkeypatch.setattr(train, "fit", fit)
    halves = _compress.run(stepwise, tmp_path / "halves")
    assert same(state(tmp_path / "whole"), state(tmp_path / "halves"))
    assert halves.trainings == whole.trainings
    assert not list((tmp_path / "halves").glob("*.checkpoint"))


def test_another_network_of_the_same_name_is_not_continued(
    compression: Compression, network: Path, tmp_path: Path
) -> None:
    """Checkpoints are named after all that they depend on, files by their content."""
    copy, other = tmp_path / "copy.safetensors", tmp_path / "other.safetensors"
    copy.write_bytes(network.read_bytes())
    nncx.save(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), other)
    depends_on = [
        replace(compression, model=str(path)).depends_on() for path in (network, copy, other)
    ]
    assert depends_on[0] == depends_on[1] != depends_on[2]
    assert replace(compression, lr=1e-4).depends_on() != depends_on[0]


# ---------------------------------------------------------------------------------------------
# what is refused


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"methods": ()}, "methods must be some of .*, got none"),
        ({"methods": ("xnor", "xnor")}, "a method must stand once, got 'xnor' twice"),
        ({"methods": ("int8", "xnor")}, "int8 must be the last method, got xnor behind it"),
        ({"method_options": {"width": 3}}, "xnor has no option 'width'; it has scale, pad_value"),
        ({"method_options": {"scale": "max"}}, "scale must be one of none, alpha"),
        ({"method_options": {"int8.scale": 1}}, "of one of the methods xnor, as xnor.NAME, got"),
        ({"layers": "xnor"}, "layers of a compression are its methods', got layers 'xnor'"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"observer": "mse"}, "observer means nothing to the method xnor"),
        ({"methods": ("xnor", "int8"), "sensitivity": True}, "to int8 behind xnor"),
        ({"methods": ("int8",)}, "train_images means nothing to the method int8, got 600"),
        (
            {"methods": ("float16",), "method_options": {"bits": 5}},
            "method_options means nothing to the method float16",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused_at_once(
    compression: Compression, changes: dict, sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        replace(compression, **changes)


def test_options_of_several_methods_say_whose_they_are(stepwise: Compression) -> None:
    both = {"methods": ("xnor", "stepwise")}
    settings = replace(stepwise, **both, method_options={"stepwise.scale": "none"})
    assert settings.trained() == {"xnor": nncx.XNOR(), "stepwise": Stepwise(scale="none")}
    with pytest.raises(ValueError, match="as xnor.NAME, got 'scale'"):
        replace(stepwise, **both, method_options={"scale": "none"})


def test_goes_on_from_the_file_of_a_pruned_network(
    compression: Compression, tmp_path: Path
) -> None:
    pruning = replace(compression, methods=("prune",), method_options={"sparsity": 0.8})
    _compress.run(pruning, tmp_path / "pruned")
    file = tmp_path / "pruned" / "model.safetensors"
    sharing = replace(compression, model=str(file), methods=("deep-compression",))
    result = _compress.run(sharing, tmp_path / "shared")
    assert result.float_test_error == error(nncx.load(file)), "what it began with"
    before, after = (packed_layers(tmp_path / name) for name in ("pruned", "shared"))
    assert len(before) == len(after) == 4
    for pruned, shared in zip(before, after, strict=True):
        weight = pruned.masked_weight()
        codes = unpack_codes(shared.packed_weight, weight.numel(), shared.bits).view(weight.shape)
        assert 0.75 < (weight == 0).double().mean() < 0.85
        assert torch.equal(weight == 0, codes == 0) and shared.codebook[0] == 0
    assert len(before[2].masked_weight().unique()) > 1000 and after[2].bits == 5


def packed_layers(path: Path) -> list[PackedLayer]:
    layers = nncx.load(path / "model.safetensors").modules()
    return [layer for layer in layers if isinstance(layer, PackedLayer)]


def test_nothing_is_written_for_what_cannot_be_compressed(
    compression: Compression, network: Path, tmp_path: Path
) -> None:
    frozen = nncx.freeze(nncx.convert(nncx.load(network), nncx.XNOR()))
    nncx.save(frozen, tmp_path / "frozen.safetensors")
    is_frozen = "must be a pruned one, got a XNORConv2d at '4', which has no float weight; take the"
    for changes, sentence in (
        ({"model": str(tmp_path / "frozen.safetensors")}, is_frozen),
        ({"skip": ("fc9",)}, "skip names 'fc9'"),
        ({"skip": ("0", "4", "9", "12")}, "no layer for XNOR"),
    ):
        with pytest.raises(ValueError, match=sentence) as caught:
            _compress.run(replace(compression, **changes), tmp_path / "out")
        assert "\n" not in str(caught.value)
    for method in ("int8", "float16"):
        with pytest.raises(ValueError, match=is_frozen):
            stored = Compression(model=str(tmp_path / "frozen.safetensors"), methods=(method,))
            _compress.run(stored, tmp_path / "out")
    for drawn in ("plot", "tensorboard"):
        with pytest.raises(ValueError, match=f"{drawn} draws trainings, got only int8"):
            setup = _recipe.Setup(**{drawn: True})
            _compress.run(Compression(model=str(network)), tmp_path / "out", setup)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("methods", [("prune", "int8"), ("inq", "float16"), ("inq", "ttq")])
def test_a_method_that_finds_nothing_to_do_is_refused_before_any_training(
    compression: Compression, tmp_path: Path, methods: tuple[str, ...]
) -> None:
    options = {"prune.sparsity": 0.5} if "prune" in methods else {}
    settings = replace(compression, methods=methods, method_options=options)
    with pytest.raises(ValueError, match=f"{methods[1]} cannot follow {methods[0]}: "):
        _compress.run(settings, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_every_method_is_tested() -> None:
    assert SETTINGS.keys() == METHODS.keys() == _finetune.METHODS.keys()
