"""`nncx reproduce`: a table of the talk, on one's own data, beside the talk's figures.

A cell of a table is a distillation by `nncx distill` with one seed, in a folder of its own that is
named after all that it depends on. So a run that is interrupted continues, cells that two tables
share are trained once, and nothing is overwritten by other settings.
"""

import csv
import hashlib
import io
import json
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from multiprocessing import active_children, get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from nncx import _files, _machine, _plots, _processes, train
from nncx._plots import Point
from nncx._table import markdown_table
from nncx.commands import _distill, _recipe
from nncx.commands._distill import Distillation
from nncx.commands._recipe import Setup
from nncx.commands._talk import TABLES, Row, Table

CELLS = "cells"
# What the talk takes for each data set; of an epoch count and a rate it says little.
_MNIST = {
    "teacher": "ninmnist",
    "model": "lenet4",
    "epochs": 20,
}
_CIFAR = {
    "teacher": "resnet164",
    "model": "resnet20",
    "epochs": 200,
    "optimizer": "sgd",
    "lr": 0.1,
    "weight_decay": 2e-4,
    "augment": "crop-flip",
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "mnist": _MNIST,
    "fashion-mnist": _MNIST,
    "cifar10": _CIFAR,
    "cifar100": _CIFAR,
    "svhn": {**_CIFAR, "epochs": 60, "augment": "none"},
}
OTHERS = {"teacher": "resnet20", "model": "resnet8", "epochs": 60}  # digits, folders, files
QUICK = {"epochs": 2, "train_images": 2_000}


@dataclass(frozen=True)
class Reproduction:
    """One table on one data set.

    Args:
        table: a key of `TABLES`.
        distillation: what all cells share; each brings its own method, layers and seed.
        seeds: how many times each row is trained, with seeds 0, 1, 2, ... The teacher is one.
        jobs: processes that train cells at the same time.

    Raises:
        ValueError: for a table that is not known, or numbers below 1.
    """

    table: str
    distillation: Distillation
    seeds: int = 3
    jobs: int = 1

    def __post_init__(self) -> None:
        if self.table not in TABLES:
            raise ValueError(f"a table is one of {', '.join(TABLES)}, got {self.table!r}")
        for name in ("seeds", "jobs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Cell:
    """One training: a row of the table with one seed."""

    row: Row
    distillation: Distillation
    folder: Path

    def result(self) -> dict[str, Any] | None:
        """What its result.json holds; None if it is not there yet."""
        try:
            return json.loads((self.folder / _recipe.RESULT).read_text())
        except FileNotFoundError:
            return None


def settings(data: str, quick: bool, **given: Any) -> Distillation:
    """The defaults for `data`, fewer images and epochs if `quick`, and what is given in place."""
    defaults = {**DEFAULTS.get(data, OTHERS), **(QUICK if quick else {})}
    return Distillation(data=data, **{**defaults, **given})


def run(reproduction: Reproduction, out: Path) -> str:
    """Train what is missing; write table.md, table.csv and plot.png to `out`/TABLE.

    Returns:
        The table in Markdown.

    Raises:
        As `_distill.run`, for what concerns all cells. A cell that cannot be (a method that does
        not fit the networks) or that diverges says so below the table.
        ValueError: under torchrun.
        KeyboardInterrupt: as it came; the same call continues.
    """
    _plots.require_matplotlib()  # now rather than after the trainings
    _processes.check_alone("reproduce")
    distillation = _with_trained_teacher(reproduction.distillation, out)
    cells = _cells(TABLES[reproduction.table], distillation, reproduction.seeds, out / CELLS)
    failures = _train([cell for cell in cells if cell.result() is None], reproduction.jobs)
    folder = out / reproduction.table
    folder.mkdir(exist_ok=True)
    return _write(reproduction, cells, failures, folder)


def _with_trained_teacher(distillation: Distillation, out: Path) -> Distillation:
    """With the file of the teacher in the place of its name."""
    recipe = _distill.teacher_recipe(distillation)
    if recipe is None:
        return distillation
    with train.processes() as device:
        file = _distill.trained_teacher(recipe, out / _distill.TEACHER, Setup(device))
    return replace(distillation, teacher=str(file), teacher_options={})


def _cells(table: Table, distillation: Distillation, seeds: int, folder: Path) -> list[Cell]:
    cells = []
    for row in table.rows:
        for seed in range(seeds):
            cell = replace(
                distillation,
                method=row.method,
                method_options=dict(row.options),
                layers=row.layers,
                cache_teacher=_sees_vectors(row) and distillation.augment == "none",
                seed=seed,
            )
            cells.append(Cell(row, cell, folder / f"{row.method}-{_key(cell)}-seed{seed}"))
    return cells


def _sees_vectors(row: Row) -> bool:
    """Whether its losses see nothing larger of the teacher than its features."""
    return row.method in ("l2", "kd", "anc") and row.options.get("inputs") != "map"


def _key(distillation: Distillation) -> str:
    """Of all that it depends on but where the data are."""
    settings = {**distillation.depends_on(), "root": None}
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]


# ----------------------------------------------------------------------------
# cells in processes


def _train(cells: Sequence[Cell], jobs: int) -> dict[Path, str]:
    """Train the cells; why those that failed did, by folder."""
    failures: dict[Path, str] = {}
    if not cells:
        return failures
    threads = max(1, torch.get_num_threads() // jobs)
    with ProcessPoolExecutor(jobs, get_context("spawn"), _begin_process, (threads,)) as pool:
        futures = [pool.submit(_train_cell, cell) for cell in cells]
        try:
            for done, future in enumerate(as_completed(futures), 1):
                cell, outcome, failed = future.result()
                print(f"[{done}/{len(cells)}] {cell.row.label}: {outcome}", file=sys.stderr)
                if failed:
                    failures[cell.folder] = outcome
        except BrokenProcessPool as error:
            raise OSError(
                "a process that trained a cell was killed, as where memory runs out; run again,"
                " with fewer jobs"
            ) from error
        except BaseException:  # the processes end too: their checkpoints are of whole epochs
            for process in active_children():
                process.terminate()
            raise
    return failures


def _begin_process(threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is the parent's, which then ends this one
    torch.set_num_threads(threads)


def _train_cell(cell: Cell) -> tuple[Cell, str, bool]:
    """Outcome, and whether it is a failure; progress goes to log.txt in the cell's folder."""
    cell.folder.mkdir(parents=True, exist_ok=True)
    with open(cell.folder / "log.txt", "a", buffering=1) as log, redirect_stderr(log):
        try:
            with train.processes() as device:
                result = _distill.run(cell.distillation, cell.folder, Setup(device))
            return cell, str(result), False
        except (ValueError, FloatingPointError) as error:
            return cell, str(error), True


# ----------------------------------------------------------------------------
# the table


@dataclass(frozen=True)
class Line:
    """A row of the table as it was measured; errors in percent, one for each seed."""

    row: Row
    results: list[dict[str, Any]]
    failures: list[str]

    def errors(self, split: str) -> list[float]:
        return [result[f"{split}_error"] for result in self.results]

    def spread(self, split: str) -> str:
        errors = self.errors(split)
        if not errors:
            return "-"
        deviation = f" ± {stdev(errors):.2f}" if len(errors) > 1 else ""
        return f"{mean(errors):.2f}{deviation}"


def _lines(table: Table, cells: Sequence[Cell], failures: Mapping[Path, str]) -> list[Line]:
    lines = []
    for row in table.rows:
        own = [cell for cell in cells if cell.row is row]
        results = [result for cell in own if (result := cell.result()) is not None]
        why = [failures[cell.folder] for cell in own if cell.folder in failures]
        lines.append(Line(row, results, why))
    return lines


def _write(
    reproduction: Reproduction, cells: Sequence[Cell], failures: Mapping[Path, str], folder: Path
) -> str:
    table, data = TABLES[reproduction.table], reproduction.distillation.data
    lines = _lines(table, cells, failures)
    if not any(line.results for line in lines):
        raise ValueError(f"no cell of the table could be trained: {lines[0].failures[0]}")
    text = f"# {table.title}: {data}\n\n{_markdown(table, data, lines)}\n\n"
    text += "\n".join(f"- {note}" for note in _notes(reproduction, table, lines)) + "\n"
    _files.replace(folder / "table.md", text.encode())
    _files.replace(folder / "table.csv", _csv(data, lines).encode())
    _plot(table, data, lines, folder / "plot.png")
    _plots.scatter(_costs(lines), folder / "cost.png")
    return text


def _markdown(table: Table, data: str, lines: Sequence[Line]) -> str:
    some = next(line.results[0] for line in lines if line.results)
    rows = [
        ["", "test error (%)", "validation error (%)", "parameters", "file (bytes)", "talk (%)"],
        [
            "teacher",
            f"{some['teacher_test_error']:.2f}",
            f"{some['teacher_validation_error']:.2f}",
            f"{some['teacher_parameters']:,}",
            f"{some['teacher_file_bytes']:,}",
            _figure(table.published_teacher.get(data)),
        ],
    ]
    for line in lines:
        sizes = ["", ""]
        if line.results:
            sizes = [f"{line.results[0][name]:,}" for name in ("parameters", "file_bytes")]
        errors = [line.spread("test"), line.spread("validation")]
        rows.append([line.row.label, *errors, *sizes, _figure(line.row.published.get(data))])
    if not any(row[-1] for row in rows[1:]):  # the talk has no figures for these data
        rows = [row[:-1] for row in rows]
    return markdown_table(rows, texts=1)


def _figure(error: float | None) -> str:
    return "" if error is None else f"{error:.2f}"


def _notes(reproduction: Reproduction, table: Table, lines: Sequence[Line]) -> Iterator[str]:
    shared = reproduction.distillation
    seeds = reproduction.seeds
    yield (
        f"Test error of the student's file, loaded again: mean ± standard deviation over {seeds} "
        f"seeds, one teacher."
        if seeds > 1
        else "Test error of the student's file; one seed."
    )
    images = "all" if shared.train_images is None else f"{shared.train_images:,}"
    yield (
        f"Teacher {shared.teacher} {dict(shared.teacher_options)}, student {shared.model} "
        f"{dict(shared.options)}; {images} training images, {shared.epochs} epochs of batches of "
        f"{shared.batch}, {shared.optimizer} from {shared.lr:g} to "
        f"{shared.lr * shared.lr_decay:g}, weight decay {shared.weight_decay:g}, augmentation "
        f"{shared.augment}; the epoch is chosen on the validation split."
    )
    yield f"On {_machine.describe()}."
    yield table.note
    for line in lines:
        for reason in dict.fromkeys(line.failures):
            yield f"{line.row.label}: {reason}"


def _csv(data: str, lines: Sequence[Line]) -> str:
    """One line a cell."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        "row seed test_error validation_error best_epoch file_bytes seconds talk_error".split()
    )
    for line in lines:
        for result in line.results:
            names = "test_error validation_error best_epoch file_bytes seconds".split()
            figures = [result[name] for name in names]
            talk = line.row.published.get(data, "")
            writer.writerow([line.row.label, result["recipe"]["seed"], *figures, talk])
    return text.getvalue()


def _costs(lines: Sequence[Line]) -> list[Point]:
    """The talk's last picture: what an error costs, here in stored bytes."""
    measured = [line for line in lines if line.results]
    points = [
        Point(line.row.label, line.results[0]["file_bytes"], mean(line.errors("test")))
        for line in measured
    ]
    teacher = measured[0].results[0]
    size, error = teacher["teacher_file_bytes"], teacher["teacher_test_error"]
    return [Point("teacher", size, error), *points]


def _plot(table: Table, data: str, lines: Sequence[Line], path: Path) -> None:
    """A point a seed, a bar their mean, and a diamond the talk's figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.5 + 0.4 * len(lines)), layout="constrained")
    axes = figure.add_subplot(xlabel="test error (%)", title=f"{table.title}: {data}")
    axes.set_yticks(range(len(lines)), [line.row.label for line in lines])
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    for y, line in enumerate(lines):
        if errors := line.errors("test"):
            axes.plot(errors, [y] * len(errors), "o", color="C0", alpha=0.6)
            axes.plot([mean(errors)], [y], "|", color="C0", markersize=18)
        if (talk := line.row.published.get(data)) is not None:
            axes.plot([talk], [y], "D", color="C1")
    axes.plot([], [], "o", color="C0", label="measured, one seed")
    axes.plot([], [], "D", color="C1", label="the talk")
    axes.legend()
    figure.savefig(path, dpi=150)
