"""`nncx distill`: that a student learns by every method, and that what is reported is true."""

import json
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

import nncx
from nncx import distill
from nncx.commands import _distill, _recipe
from nncx.commands._distill import Distillation

SMALL = Distillation(
    model="resnet8",
    options={"width": 4},
    teacher="resnet14",
    teacher_options={"width": 4},
    epochs=2,
    train_images=128,
    lr=5e-3,
)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("teacher")
    recipe = _distill.teacher_recipe(SMALL)
    assert recipe is not None
    return _distill.trained_teacher(replace(recipe, epochs=8), out)


def given(teacher: Path, **changes: object) -> Distillation:
    return replace(SMALL, teacher=str(teacher), teacher_options={}, **changes)


def error(model: torch.nn.Module) -> float:
    images, labels = nncx.data.load("digits").test.tensors
    with torch.no_grad():
        return 100 * (model.eval()(images).argmax(1) != labels).double().mean().item()


@pytest.mark.parametrize(
    ("method", "layers"), [*((name, "float") for name in distill.METHODS), ("anc", "xnor")]
)
def test_every_figure_is_that_of_the_files(
    tmp_path: Path, teacher: Path, method: str, layers: str
) -> None:
    result = _distill.run(given(teacher, method=method, layers=layers), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"model.safetensors", "result.json"}
    assert not list(tmp_path.glob("*.checkpoint"))
    assert json.loads((tmp_path / "result.json").read_text()) == asdict(result)
    assert result.test_error == pytest.approx(error(nncx.load(tmp_path / "model.safetensors")))
    assert result.teacher_test_error == pytest.approx(error(nncx.load(teacher)))
    assert result.teacher_file_bytes == teacher.stat().st_size
    assert [record["epoch"] for record in result.history] == [1, 2]
    assert f"by {method} from {teacher}" in str(result)


def test_a_teacher_by_name_is_trained_once(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    first = _distill.run(SMALL, tmp_path)
    assert "teacher: digits resnet14 float: test error" in capsys.readouterr().err
    file = tmp_path / "teacher" / "model.safetensors"
    assert first.teacher_test_error == pytest.approx(error(nncx.load(file)))
    second = _distill.run(SMALL, tmp_path)
    assert "teacher: " not in capsys.readouterr().err
    assert replace(second, seconds=0) == replace(first, seconds=0)  # whoever trained before
    _distill.run(replace(SMALL, teacher_options={"width": 12}), tmp_path)
    assert "teacher: " in capsys.readouterr().err  # another one


def test_an_interrupted_run_of_two_stages_continues(
    tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distillation = given(teacher, method="fitnets", epochs=4)
    whole = _distill.run(distillation, tmp_path / "whole")
    fit = _recipe.train.fit

    def interrupted(*arguments, **settings):
        if settings["epochs"] == 1:  # the first stage of two
            return fit(*arguments, **settings)
        fit(*arguments, **{**settings, "epochs": 2})
        raise KeyboardInterrupt("stopped here")

    monkeypatch.setattr(_recipe.train, "fit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _distill.run(distillation, tmp_path / "halves")
    monkeypatch.setattr(_recipe.train, "fit", fit)
    halves = _distill.run(distillation, tmp_path / "halves")
    assert replace(halves, seconds=0) == replace(whole, seconds=0)


class Foreign(torch.nn.Sequential):
    """A teacher whose class `nncx.load` does not know, as torchvision's are."""


def test_a_teacher_of_any_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = Foreign(torch.nn.Flatten(), torch.nn.Linear(64, 10)).eval()
    monkeypatch.setattr(_distill._networks, "trained", lambda *arguments: network)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = _distill.run(replace(SMALL, teacher="theirs", teacher_options={}), tmp_path)
    assert result.teacher_test_error == pytest.approx(error(network))
    assert result.teacher_parameters == 650
    assert result.teacher_file_bytes > 4 * 650


def test_another_file_of_the_same_name_is_another_teacher(tmp_path: Path, teacher: Path) -> None:
    """Whose student never continues from the checkpoint of the first."""
    file = tmp_path / "teacher.safetensors"
    file.write_bytes(teacher.read_bytes())
    distillation = given(file)
    first = distillation.depends_on()
    nncx.save(nncx.models.ResNet(8, in_channels=1, width=4), file)
    assert distillation.depends_on() != first
    nncx.save(nncx.load(teacher), file)
    assert distillation.depends_on() == first


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"method": "magic"}, "method must be one of supervised, l2"),
        ({"loss": "squared-hinge"}, "a distillation's loss is its method's"),
        ({"discriminator_lr": 0.0}, "discriminator_lr must be above 0"),
        ({"train_images": 0}, "train_images must be at least 1, got 0"),
    ],
)
def test_bad_settings_are_refused_at_once(changes: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        replace(SMALL, **changes)


def test_an_option_that_the_method_does_not_have(tmp_path: Path) -> None:
    """Is refused before a teacher is trained."""
    with pytest.raises(ValueError, match="kd cannot be made with {'warmth': 4}: "):
        _distill.run(replace(SMALL, method="kd", method_options={"warmth": 4}), tmp_path)
    assert not list(tmp_path.iterdir())
