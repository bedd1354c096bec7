"""`nncx train`: that what it reports is what the file on disk does."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.utils.data import DataLoader

import nncx
from nncx.commands import _recipe
from nncx.commands._recipe import Recipe
from nncx.distill import Stage

SMALL = Recipe(model="resnet8", epochs=2, lr=5e-3)


def logits(path: Path) -> torch.Tensor:
    images, _ = nncx.data.load("digits").test.tensors
    with torch.no_grad():
        return nncx.load(path / "model.safetensors")(images)


@pytest.mark.parametrize("layers", _recipe.LAYERS)
def test_every_figure_is_that_of_the_file(tmp_path: Path, layers: str) -> None:
    out = tmp_path / "new" / "folder"
    result = _recipe.run(replace(SMALL, layers=layers), out)
    files = {"model.safetensors", "history.csv", "result.json"}
    assert {path.name for path in out.iterdir()} == files
    assert json.loads((out / "result.json").read_text()) == asdict(result)

    labels = nncx.data.load("digits").test.tensors[1]
    wrong = (logits(out).argmax(1) != labels).double().mean().item()
    assert result.test_error == pytest.approx(100 * wrong)
    assert result.test_images == len(labels)
    assert result.file_bytes == (out / "model.safetensors").stat().st_size
    assert result.machine == nncx._machine.describe()
    assert [record["epoch"] for record in result.history] == [1, 2]

    float_network = nncx.models.ResNet(8, in_channels=1)
    nncx.save(float_network, tmp_path / "float.safetensors")
    assert result.float_file_bytes == (tmp_path / "float.safetensors").stat().st_size
    assert result.ratio == result.float_file_bytes / result.file_bytes
    assert (result.ratio == 1) == (layers == "float")
    assert result.parameters == sum(p.numel() for p in float_network.parameters())


@pytest.mark.parametrize("optimizer", _recipe.OPTIMIZERS)
@pytest.mark.parametrize(
    ("layers", "method"),
    [("binaryconnect", nncx.compress.binary_connect), ("ttq", nncx.compress.ttq)],
)
def test_layers_learn_at_the_rates_of_their_method(
    layers: str, method: ModuleType, optimizer: str
) -> None:
    recipe = replace(SMALL, layers=layers, optimizer=optimizer)
    model = _recipe.build(recipe, _recipe.splits_of(recipe))
    stage = Stage("supervised", nncx.train.Supervised(model))
    groups = _recipe.student_optimizer(recipe, model, stage).param_groups
    expected = method.parameter_groups(model, recipe.lr, squared=optimizer == "sgd")
    assert [group["lr"] for group in groups] == [group["lr"] for group in expected] != [recipe.lr]
    assert [len(group["params"]) for group in groups] == [len(g["params"]) for g in expected]


def test_the_epoch_is_chosen_on_the_validation_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With validation errors as given, the second epoch of three is what the file holds."""
    error_rate = _recipe.train.error_rate

    def run(epochs: int, validations: list[float]) -> _recipe.Result:
        given = iter(validations)

        def scripted(model: torch.nn.Module, batches: DataLoader) -> float:
            value = next(given, None)
            if value is None:  # after the training
                return error_rate(model, batches)
            assert len(batches.dataset) == 143  # of the 1,438 that are not the test split
            return value

        monkeypatch.setattr(_recipe.train, "error_rate", scripted)
        recipe = replace(SMALL, epochs=epochs, lr_decay=1.0)
        return _recipe.run(recipe, tmp_path / str(epochs))

    assert run(3, [5.0, 3.0, 4.0]).best_epoch == 2
    run(2, [5.0, 3.0])
    assert torch.equal(logits(tmp_path / "3"), logits(tmp_path / "2"))


def test_an_interrupted_run_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = replace(SMALL, layers="xnor", epochs=3)
    whole = _recipe.run(recipe, tmp_path / "whole")

    fit = _recipe.train.fit

    def interrupted(*arguments, **settings):
        fit(*arguments, **{**settings, "epochs": 2})
        raise KeyboardInterrupt("stopped here")

    monkeypatch.setattr(_recipe.train, "fit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _recipe.run(recipe, tmp_path / "halves")
    monkeypatch.setattr(_recipe.train, "fit", fit)
    halves = _recipe.run(recipe, tmp_path / "halves")
    assert replace(halves, seconds=0) == replace(whole, seconds=0)
    assert torch.equal(logits(tmp_path / "halves"), logits(tmp_path / "whole"))


def test_another_recipe_in_the_same_folder_starts_anew(tmp_path: Path) -> None:
    first = _recipe.run(SMALL, tmp_path)
    second = _recipe.run(replace(SMALL, seed=1), tmp_path)
    assert first.history != second.history
    assert _recipe.run(SMALL, tmp_path).history == first.history


def test_the_rate_falls_exponentially_to_the_last_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates, step = [], torch.optim.Adam.step

    def recording(self, *arguments):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.Adam, "step", recording)
    _recipe.run(replace(SMALL, epochs=3, batch=2000, lr=0.1, lr_decay=0.04), tmp_path)
    assert rates == pytest.approx([0.1, 0.02, 0.004])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"layers": "ternary"}, "layers must be one of float, xnor"),
        ({"loss": "hinge"}, "loss must be one of cross-entropy"),
        ({"optimizer": "lbfgs"}, "optimizer must be one of adam, sgd, got 'lbfgs'"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"batch": -1}, "batch must be at least 1, got -1"),
        ({"lr": 0.0}, "lr must be above 0, got 0.0"),
        ({"lr_decay": float("nan")}, "lr_decay must be above 0, got nan"),
    ],
)
def test_bad_recipes_are_refused_at_once(changes: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        replace(SMALL, **changes)


def test_nothing_is_written_for_a_network_that_cannot_be(tmp_path: Path) -> None:
    impossible = (
        {"model": "resnet7"},
        {"model": "alexnet"},
        {"model": "mlp", "options": {"in_channels": 3}},  # the data decide
        {"model": "mlp", "options": {"norm": True}},
        {"data": "nowhere"},
    )
    for changes in impossible:
        with pytest.raises(ValueError):
            _recipe.run(replace(SMALL, **changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_with_the_name_of_a_data_set_is_not_meant(tmp_path: Path, monkeypatch) -> None:
    """As `--out digits` makes one."""
    (tmp_path / "digits").mkdir()
    monkeypatch.chdir(tmp_path)
    assert _recipe.load_data("digits", None, 32).name == "digits"


def test_what_is_not_finite_is_null_in_the_result(tmp_path: Path) -> None:
    @dataclass
    class Result:
        ratios: list[float]

    _recipe.write_result(Result([1.5, float("inf"), float("nan")]), tmp_path)
    assert json.loads((tmp_path / "result.json").read_text()) == {"ratios": [1.5, None, None]}
