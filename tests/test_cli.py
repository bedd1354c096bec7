import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import nncx
from nncx import cli
from nncx.commands import _compress, _demo, _recipe

DEMO_FILES = {"plot.png", "results.json", "table.md", "teacher.safetensors"}
DEMO_FILES |= {f"{name}student.safetensors" for name in ("", "int8-", "xnor-")}


def run(*arguments: str):
    return CliRunner().invoke(cli.app, list(arguments))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks so small that a demo takes seconds."""
    monkeypatch.setattr(_demo, "WIDTH", 4)
    monkeypatch.setattr(_demo, "TEACHER_DEPTH", 8)
    monkeypatch.setattr(_demo, "TIMED_RUNS", 2)


def images(folder: Path, size: int = 12) -> Path:
    """An image folder of two classes: bright and dark squares."""
    from PIL import Image

    for label, name in enumerate(("dark", "bright")):
        (folder / name).mkdir(parents=True)
        for i in range(20):
            pixels = torch.rand(size, size + i % 3, 3).mul(60).add(150 * label).byte().numpy()
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


def test_version() -> None:
    assert run("--version").output.strip() == nncx.__version__


def test_demo_writes_what_it_promises(small: None, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run("demo", "--out", str(out), "--epochs", "1")
    assert result.exit_code == 0, result.output
    assert {path.name for path in out.iterdir()} == DEMO_FILES
    teacher, student, int8, binary = json.loads((out / "results.json").read_text())["results"]
    assert teacher["macs"].keys() == student["macs"].keys() == {"float32"}
    assert binary["macs"]["binary"] > 10 * binary["macs"]["float32"]
    assert int8["macs"] == {"int8": student["macs"]["float32"]}
    assert int8["file_bytes"] < student["file_bytes"]
    for row in (teacher, student, int8, binary):
        assert row["file_bytes"] == (out / row["file"]).stat().st_size
        assert f"{row['file_bytes']:,} B" in result.output
    assert binary["parameters"] == student["parameters"]
    assert nncx._C.isa() in result.output  # which kernels ran
    images, labels = nncx.data.load("digits").test.tensors
    for row in (int8, binary):
        model = nncx.load(out / row["file"])
        wrong = (model(images).argmax(1) != labels).float().mean().item()
        assert row["test_error"] == pytest.approx(100 * wrong)
    assert "| test error |" in (out / "table.md").read_text()


def test_demo_on_an_image_folder(small: None, tmp_path: Path) -> None:
    folder = images(tmp_path / "photos")
    out = tmp_path / "out"
    result = run(
        *("demo", "--data", str(folder), "--image-size", "8", "--epochs", "2"), "--out", str(out)
    )
    assert result.exit_code == 0, result.output
    assert {path.name for path in out.iterdir()} == DEMO_FILES


def test_an_interrupted_demo_continues(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the second training; what was done is not done again, and the end is the same."""
    arguments = ("demo", "--epochs", "2", "--out")
    assert run(*arguments, str(tmp_path / "whole")).exit_code == 0

    fit, calls = _demo.train.fit, []

    def interrupted(task, data, **settings):
        calls.append(settings["checkpoint"])
        if len(calls) == 2:
            fit(task, data, **{**settings, "epochs": 1})
            raise KeyboardInterrupt("stopped here")
        return fit(task, data, **settings)

    monkeypatch.setattr(_demo.train, "fit", interrupted)
    stopped = run(*arguments, str(tmp_path / "halves"))
    assert stopped.exit_code == 130
    monkeypatch.setattr(_demo.train, "fit", fit)
    assert run(*arguments, str(tmp_path / "halves")).exit_code == 0

    for name in ("teacher", "student", "int8-student", "xnor-student"):
        whole, halves = (
            nncx.load(tmp_path / d / f"{name}.safetensors") for d in ("whole", "halves")
        )
        for key, tensor in whole.state_dict().items():
            assert torch.equal(tensor, halves.state_dict()[key]), key
    assert {path.name for path in (tmp_path / "halves").iterdir()} == DEMO_FILES


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--data", "no-such-thing"], "a data set is one of"),
        (["--data", "{tmp}"], "must hold one folder of images per class"),
        (["--out", "{tmp}/file/out"], "file"),
    ],
)
def test_bad_input_gets_one_sentence(tmp_path: Path, arguments: list[str], sentence: str) -> None:
    (tmp_path / "file").write_text("in the way")
    arguments = [argument.format(tmp=tmp_path) for argument in arguments]
    result = run("demo", *arguments)
    assert result.exit_code == 1
    assert sentence in result.output and "Traceback" not in result.output


@pytest.mark.parametrize(
    ("setting", "code", "sentence"),
    [
        ("nonsense", 1, "nncx: NNCX_ISA must be a path that was built .*, got 'nonsense'\n"),
        ("scalar", 0, ""),
    ],
)
def test_the_console_script_also_says_what_import_refuses(
    setting: str, code: int, sentence: str
) -> None:
    """In a process of its own, which takes the path anew."""
    program = "import sys, _nncx_command; sys.argv[1:] = ['--version']; _nncx_command.main()"
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        cwd=Path(nncx.__file__).parents[1],
        env={**os.environ, "NNCX_ISA": setting},
        capture_output=True,
        text=True,
    )
    assert result.returncode == code
    assert re.fullmatch(sentence, result.stderr)


def test_train_prints_what_the_file_does(tmp_path: Path) -> None:
    """Every option reaches the recipe."""
    options = {
        "data": "digits",
        "model": "lenet5",
        "options": {"padding": 2, "norm": True},
        "layers": "xnor",
        "loss": "squared-hinge",
        "epochs": 1,
        "batch": 100,
        "optimizer": "sgd",
        "lr": 0.05,
        "lr_decay": 0.5,
        "weight_decay": 1e-4,
        "amp": "bfloat16",
        "patience": 5,
        "seed": 3,
        "image_size": 16,
        "train_images": 500,
        "augment": "crop",
        "root": str(tmp_path),
    }
    flags = [
        f"--{name.replace('_', '-')}={value}"
        for name, value in options.items()
        if name != "options"
    ]
    flags += ["--option=padding=2", "--option", "norm=true"]
    result = run("train", "--out", str(tmp_path), *flags, "--plot")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "curves.png").exists() and (tmp_path / "history.csv").exists()
    record = json.loads((tmp_path / "result.json").read_text())
    assert record["recipe"] == options
    line = result.stdout.strip()
    assert line.startswith(f"digits lenet5 xnor: test error {record['test_error']:.2f} % of 359")
    assert f"{(tmp_path / 'model.safetensors').stat().st_size:,} B" in line

    file, out = tmp_path / "model.safetensors", tmp_path / "again"
    result = run("eval", "--model", str(file), "--data", "digits", "--out", str(out))
    assert result.exit_code == 0, result.output
    again = json.loads((out / "result.json").read_text())
    for name in ("test_error", "test_images", "file_bytes", "parameters"):
        assert again[name] == record[name]
    assert again["latency_ms"] > 0 and again["macs"].keys() == {"float32", "binary"}
    assert f"test error {again['test_error']:.2f} % of 359 images" in result.stdout


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--model={tmp}/absent.safetensors"], "No such file"),
        (["--model={tmp}/grey.safetensors", "--data=none"], "a data set is one of"),
        (["--model={tmp}/colour.safetensors"], "must take images [1, 8, 8] of digits"),
        (["--model={tmp}/grey.safetensors"], "a logit for each of the 10 classes"),
        (["--model={tmp}/checkpoint"], "it holds no model; pass a file of nncx.save"),
    ],
)
def test_bad_evaluation_gets_one_sentence(
    tmp_path: Path, options: list[str], sentence: str
) -> None:
    for name, channels in (("grey", 1), ("colour", 3)):
        model = nncx.models.ResNet(8, in_channels=channels, num_classes=3, width=4)
        nncx.save(model, tmp_path / f"{name}.safetensors")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = [(torch.zeros(2, 3, 8, 8), torch.tensor([0, 1]))]
    nncx.train.fit(model, data, epochs=1, optimizer=optimizer, checkpoint=tmp_path / "checkpoint")
    result = run("eval", *(option.format(tmp=tmp_path) for option in options))
    assert result.exit_code == 1
    assert sentence in result.output and "Traceback" not in result.output


def test_distill_prints_what_the_file_does(tmp_path: Path) -> None:
    """Every option reaches the distillation, and with it the recipe."""
    options = {
        "teacher": "mlp",
        "teacher_options": {"width": 16, "depth": 1},
        "teacher_weights": None,
        "method": "anc",
        "method_options": {"hidden": [8], "regulariser": "l2"},
        "discriminator_lr": 0.002,
        "cache_teacher": True,
        "data": "digits",
        "root": str(tmp_path),
        "image_size": 16,
        "train_images": 100,
        "augment": "none",
        "student": "mlp",
        "options": {"width": 8, "depth": 2},
        "layers": "float",
        "epochs": 1,
        "batch": 50,
        "optimizer": "sgd",
        "lr": 0.05,
        "lr_decay": 0.5,
        "weight_decay": 1e-4,
        "amp": "none",
        "patience": 3,
        "seed": 3,
    }
    flags = ["--cache-teacher"]
    for name, value in options.items():
        if isinstance(value, dict):
            flag = "--" + name.removesuffix("s").replace("_", "-")
            flags += [f"{flag}={key}={json.dumps(each)}" for key, each in value.items()]
        elif value is not None and not isinstance(value, bool):
            flags.append(f"--{name.replace('_', '-')}={value}")
    result = run("distill", "--out", str(tmp_path), *flags)
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "result.json").read_text())
    options["model"] = options.pop("student")
    assert record["recipe"] == {**options, "loss": "cross-entropy"}
    assert f"test error {record['test_error']:.2f} % of 359" in result.stdout
    assert "by anc from mlp" in result.stdout


def test_reproduce_prints_the_table(tmp_path: Path) -> None:
    """Every option reaches the cells; what is not given is the data set's."""
    flags = "--quick --train-images=64 --epochs=1 --batch=32 --lr=0.01 --seeds=1 --jobs=2".split()
    flags += "--teacher=mlp --teacher-option=width=8 --student=mlp --option=width=4".split()
    result = run("reproduce", "inputs", "--out", str(tmp_path), "--data=digits", *flags)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "inputs" / "table.md").read_text().strip() in result.stdout
    recipes = [
        json.loads(path.read_text())["recipe"] for path in tmp_path.glob("cells/*/result.json")
    ]
    assert len(recipes) == 5
    for recipe in recipes:
        names = ("train_images", "epochs", "batch", "lr")
        assert [recipe[name] for name in names] == [64, 1, 32, 0.01]
        assert (recipe["model"], recipe["options"]) == ("mlp", {"width": 4})
        assert recipe["teacher"] == str(tmp_path / "teacher" / "model.safetensors")


def test_no_seeds_are_not_the_default(tmp_path: Path) -> None:
    result = run("reproduce", "inputs", "--out", str(tmp_path), "--seeds=0")
    assert result.exit_code == 1 and "seeds must be at least 1, got 0" in result.output


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--data=no-such-thing"], "a data set is one of"),
        (["--amp=int8"], "amp must be one of none, bfloat16, float16"),
        (["--model=lenet5"], "image_size must leave something"),
        (["--layers=ternary"], "layers must be one of"),
        (["--option=norm"], "an option must be a name and a JSON value"),
        (["--option=norm=yes"], "an option must be a name and a JSON value"),
        (["--option=norm=true"], "resnet8 cannot be made with {'norm': True}: "),
        (["--lr=1e30", "--epochs=1"], "lower the learning rate"),
    ],
)
def test_bad_training_gets_one_sentence(tmp_path: Path, options: list[str], sentence: str) -> None:
    result = run("train", "--out", str(tmp_path), *options)
    assert result.exit_code == 1
    assert sentence in result.output and "Traceback" not in result.output


def test_compress_prints_what_the_file_does(tmp_path: Path) -> None:
    """Every option reaches the compression."""
    weights = tmp_path / "weights.safetensors"
    nncx.save(nncx.models.LeNet5(padding=2, image_size=8, norm=True), weights)
    settings = {
        "model": "lenet5",
        "weights": str(weights),
        "options": {"padding": 2, "norm": True},
        "data": "digits",
        "root": str(tmp_path),
        "image_size": 16,
        "calibration_images": 20,
        "observer": "percentile",
        "symmetric": True,
        "per_layer": True,
        "skip": ["conv1", "fc2"],
        "vanhoucke": False,
        "sensitivity": True,
        "seed": 3,
    }
    flags = [
        f"--{name.replace('_', '-')}={value}"
        for name, value in settings.items()
        if name not in ("options", "skip") and not isinstance(value, bool)
    ]
    flags += ["--option=padding=2", "--option=norm=true", "--skip=conv1", "--skip", "fc2"]
    flags += ["--symmetric", "--per-layer", "--sensitivity"]
    result = run("compress", "--out", str(tmp_path / "out"), *flags)
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "out" / "result.json").read_text())
    compression = record["compression"]
    assert {name: compression[name] for name in settings} == settings
    assert compression["methods"] == ["int8"]
    before, after = record["float_test_error"], record["test_error"]
    line = result.stdout.strip().splitlines()[-1]
    assert line.startswith(f"digits lenet5 int8: test error {before:.2f} -> {after:.2f} % of 359")
    assert f"{(tmp_path / 'out' / 'model.safetensors').stat().st_size:,} B" in line
    assert "1 thread" in line
    assert "SNR (dB)" in result.stdout


def test_compress_hands_on_what_trainings_depend_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(_compress, "run", lambda *arguments: calls.append(arguments))
    settings = {
        "model": "net.safetensors",
        "train_images": 100,
        "augment": "crop",
        "loss": "squared-hinge",
        "epochs": 3,
        "batch": 8,
        "optimizer": "sgd",
        "lr": 0.02,
        "lr_decay": 0.5,
        "weight_decay": 1e-4,
        "amp": "bfloat16",
        "patience": 2,
        "seed": 4,
    }
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    flags += ["--method=xnor", "--method=int8", '--method-option=xnor.scale="none"', "--symmetric"]
    result = run("compress", f"--out={tmp_path}", "--tensorboard", *flags)
    assert result.exit_code == 0, result.output
    wanted = _compress.Compression(
        **settings,
        methods=("xnor", "int8"),
        method_options={"xnor.scale": "none"},
        symmetric=True,
    )
    assert calls == [(wanted, tmp_path, _recipe.Setup(tensorboard=True))]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--model=no.safetensors"], "nncx: no.safetensors cannot be used: No such file"),
        (["--model=lenet5"], "or have weights, got 'lenet5'"),
        (["--model=lenet5", "--method=int3"], "a method must be one of"),
        (
            ["--model=lenet5", "--method=xnor", "--method-option=b=1"],
            "xnor has no option 'b'; it has",
        ),
        (["--model=lenet5", "--epochs=3"], "epochs means nothing to the method int8"),
        (["--model=lenet5", "--option=norm"], "an option must be a name and a JSON value"),
        (["--model=lenet5", "--vanhoucke", "--symmetric"], "symmetric means nothing to vanhoucke"),
        (["--model=lenet5", "--data=no-such-thing"], "a data set is one of"),
    ],
)
def test_bad_compression_gets_one_sentence(
    tmp_path: Path, options: list[str], sentence: str
) -> None:
    result = run("compress", "--out", str(tmp_path / "out"), *options)
    assert result.exit_code == 1
    assert sentence in result.output and "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


def test_vanhoucke_is_a_flag(tmp_path: Path) -> None:
    nncx.save(nncx.models.ResNet(8, in_channels=1, width=4), tmp_path / "model.safetensors")
    model = f"--model={tmp_path / 'model.safetensors'}"
    assert run("compress", model, f"--out={tmp_path}", "--vanhoucke").exit_code == 0
    record = json.loads((tmp_path / "result.json").read_text())
    assert record["compression"]["vanhoucke"] and record["macs"].keys() == {"float32", "int8"}
