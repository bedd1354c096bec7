"""`nncx reproduce`: the table says what the cells' files do, and no cell is trained twice."""

import csv
import json
import os
import signal
from collections.abc import Callable
from concurrent.futures import Executor, Future
from contextlib import nullcontext
from dataclasses import replace
from multiprocessing import active_children
from pathlib import Path
from statistics import mean, stdev

import pytest
import torch

from nncx import distill, models, train
from nncx.commands import _distill, _reproduce, _talk
from nncx.commands._recipe import Setup
from nncx.commands._reproduce import Cell, Reproduction

DEVICE = torch.device("cpu")
TINY = _reproduce.settings(
    "digits", quick=True, teacher_options={"width": 4}, options={"width": 4}, train_images=64
)


def trained(monkeypatch: pytest.MonkeyPatch, reproduction: Reproduction, out: Path) -> list[Path]:
    """Runs it with its cells in this process; the folders of those that were trained."""
    folders = []
    run = _distill.run

    def recording(
        distillation: _distill.Distillation, folder: Path, setup: Setup
    ) -> _distill.Distilled:
        assert setup.device is DEVICE  # cells run where there is a GPU, if there is one
        folders.append(folder)
        return run(distillation, folder, setup)

    monkeypatch.setattr(_distill, "run", recording)
    monkeypatch.setattr(_reproduce, "ProcessPoolExecutor", lambda *_: InProcess())
    monkeypatch.setattr(train, "processes", lambda: nullcontext(DEVICE))
    _reproduce.run(reproduction, out)
    monkeypatch.setattr(_distill, "run", run)
    return folders


class InProcess(Executor):
    """A pool of processes that is none."""

    def submit(self, function: Callable, cell: Cell) -> Future:
        future = Future()
        future.set_result(function(cell))
        return future


def test_the_table_says_what_the_cells_hold(tmp_path: Path, monkeypatch) -> None:
    reproduction = Reproduction("regularization", TINY, seeds=2)
    assert len(trained(monkeypatch, reproduction, tmp_path)) == 8
    folder = tmp_path / "regularization"
    assert {path.name for path in folder.iterdir()} == {
        "table.md",
        "table.csv",
        "plot.png",
        "cost.png",
    }
    rows = list(csv.DictReader((folder / "table.csv").open()))
    assert [row["row"] for row in rows[::2]] == ["none", "L1", "L2", "adversary samples"]
    cells = [json.loads(path.read_text()) for path in (tmp_path / "cells").glob("*/result.json")]
    for row in rows:
        (cell,) = (
            cell
            for cell in cells
            if cell["recipe"]["seed"] == int(row["seed"])
            and cell["recipe"]["method_options"].get("regulariser", "adversary")
            == {"none": "none", "L1": "l1", "L2": "l2"}.get(row["row"], "adversary")
        )
        assert float(row["test_error"]) == cell["test_error"]
    errors = [float(row["test_error"]) for row in rows[:2]]
    assert (
        f"| none | {mean(errors):.2f} ± {stdev(errors):.2f} |" in (folder / "table.md").read_text()
    )

    # What is done is not done again, and what tables share is trained once.
    assert trained(monkeypatch, reproduction, tmp_path) == []
    missing = next((tmp_path / "cells").iterdir())
    (missing / "result.json").unlink()
    assert trained(monkeypatch, reproduction, tmp_path) == [missing]
    inputs = trained(monkeypatch, Reproduction("inputs", TINY, seeds=1), tmp_path)
    assert len(inputs) == len(_talk.TABLES["inputs"].rows) - 1  # but features + dropout


def test_a_cell_that_cannot_be_says_why_below_the_table(tmp_path: Path, monkeypatch) -> None:
    tiny = replace(TINY, teacher="mlp", teacher_options={"width": 8, "depth": 1})
    trained(monkeypatch, Reproduction("comparison", tiny, seeds=1), tmp_path)
    text = (tmp_path / "comparison" / "table.md").read_text()
    assert "| FSP | - | - |" in text
    assert "- FSP: fsp: MLP must have children of type nn.Sequential" in text
    assert "| KD | " in text and "| KD | - |" not in text


def test_refuses_to_run_several_times_at_once(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="must run in one process, got 2 of torchrun"):
        _reproduce.run(Reproduction("inputs", TINY, seeds=1), tmp_path)
    assert not any(tmp_path.iterdir())


def test_processes_train_what_one_process_does(tmp_path: Path, monkeypatch) -> None:
    """Two real ones; the errors are those of cells in this process."""
    reproduction = Reproduction("regularization", TINY, seeds=1, jobs=2)
    trained(monkeypatch, reproduction, tmp_path / "here")
    monkeypatch.undo()
    _reproduce.run(reproduction, tmp_path / "there")
    here, there = (
        [
            row["test_error"]
            for row in csv.DictReader((tmp_path / name / "regularization" / "table.csv").open())
        ]
        for name in ("here", "there")
    )
    assert here == there


class Killed:
    """A cell whose process the system ends, as for lack of memory."""

    @property
    def folder(self) -> Path:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_was_killed_is_not_waited_for() -> None:
    with pytest.raises(OSError, match="was killed, .*; run again, with fewer jobs"):
        _reproduce._train([Killed(), Killed()], jobs=1)
    assert not active_children()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"table": "magic"}, "a table is one of discriminators, regularization"),
        ({"seeds": 0}, "seeds must be at least 1"),
        ({"jobs": 0}, "jobs must be at least 1"),
    ],
)
def test_bad_settings_are_refused_at_once(changes: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        replace(Reproduction("inputs", TINY), **changes)


def test_the_published_figures_are_whole() -> None:
    """Each row of a table has a figure where any row has one, so that columns can be compared."""
    for name, table in _talk.TABLES.items():
        if name != "comparison":  # which is of different networks
            known = [set(row.published) for row in table.rows]
            assert all(each == known[0] for each in known), name


@pytest.mark.parametrize(
    ("data", "channels", "size"), [("mnist", 1, 28), ("cifar10", 3, 32), ("digits", 1, 8)]
)
def test_every_row_fits_the_networks_of_the_talk(data: str, channels: int, size: int) -> None:
    """But FSP on MNIST, where NiN and LeNet have no stages: the table says so."""
    settings = _reproduce.settings(data, quick=False)
    arguments = {"in_channels": channels, "num_classes": 10, "image_size": size}
    teacher = models.by_name(settings.teacher, **arguments).eval()
    student = models.by_name(settings.model, **arguments)
    images = torch.randn(2, channels, size, size)
    misfits = []
    for table in _talk.TABLES.values():
        for row in table.rows:
            try:
                distill.by_name(
                    row.method, student, teacher, example=images, steps=10, **row.options
                )
            except ValueError:
                misfits.append(row.label)
    assert misfits == (["FSP"] if data == "mnist" else [])
