"""`nncx demo`: the whole of nncx on one small data set, in a few minutes on two cores.

A teacher is trained with labels. Two students learn from it without any label, by adversarial
network compression: a smaller one in float, and the same one with binary layers. The float one is
also quantized to int8 as it is, without training. All four are saved, loaded again, checked, timed,
and put into one table.

Each training keeps a checkpoint in the output folder until the demo is through, so a run that is
interrupted continues when the same command is given again.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import CosineAnnealingLR

from nncx import _files, _machine, _plots, _report, data, distill, train
from nncx._plots import Point
from nncx._table import markdown_table
from nncx.commands import _compress, _recipe
from nncx.compress import XNOR, convert, freeze, quantize
from nncx.models import ResNet

WIDTH = 32
TEACHER_DEPTH, STUDENT_DEPTH = 20, 8
BATCH = 64
# How many images each training sees, repetitions counted: 10, 20 and 30 epochs of the digits.
TEACHER_IMAGES, STUDENT_IMAGES, BINARY_IMAGES = 13_000, 26_000, 39_000
CALIBRATION_IMAGES = 512
TIMED_RUNS = 50


@dataclass(frozen=True)
class Settings:
    """What a run of the demo depends on."""

    data: str = "digits"
    root: str | None = None
    image_size: int = 32  # of an image folder; other data sets have their own
    epochs: int | None = None  # of each training; None: what TEACHER_IMAGES and so on come to
    seed: int = 0


@dataclass(frozen=True)
class Result:
    """One column of the table: a network, as it came back from its file."""

    name: str
    network: str
    learned_from: str
    test_error: float  # percent
    test_images: int
    parameters: int
    file: str
    file_bytes: int
    macs: dict[str, int]  # of one image, by precision
    latency_ms: dict[int, float]  # of a batch, by batch size


def run(settings: Settings, out: Path, console: Console) -> list[Result]:
    """Run the demo; write networks, table, results and plot to `out`.

    Raises:
        ValueError: for a data set that cannot be read, or `epochs` below 1.
        KeyboardInterrupt: as it came; the same call continues from the checkpoints.
    """
    if settings.epochs is not None and settings.epochs < 1:
        raise ValueError(f"epochs must be at least 1, got {settings.epochs}")
    _plots.require_matplotlib()  # now rather than after the trainings
    splits = _recipe.load_data(settings.data, settings.root, settings.image_size)
    out.mkdir(parents=True, exist_ok=True)
    console.print(
        f"[bold]{escape(splits.name)}[/bold]: {len(splits.train)} training images, "
        f"{len(splits.test)} test images, {splits.num_classes} classes, "
        f"{splits.image_size} x {splits.image_size} pixels"
    )
    console.print(f"on {_machine.describe()}\n")

    trainings = _Trainings(settings, splits, out)
    console.print(f"[bold]1[/bold] teacher: ResNet-{TEACHER_DEPTH}, with labels")
    teacher = trainings.teacher()
    console.print(f"[bold]2[/bold] student: ResNet-{STUDENT_DEPTH}, from the teacher, no labels")
    student = trainings.student(trainings.new(STUDENT_DEPTH), "student", STUDENT_IMAGES, teacher)
    console.print("[bold]3[/bold] the same student with binary layers, from the teacher, no labels")
    binary = convert(trainings.new(STUDENT_DEPTH), XNOR())
    binary = trainings.student(binary, "xnor-student", BINARY_IMAGES, teacher)
    freeze(binary)
    console.print("[bold]4[/bold] the float student in int8, without training")
    images = _compress.calibration_images(splits, CALIBRATION_IMAGES, settings.seed)
    int8 = freeze(quantize(student, images))

    console.print("[bold]5[/bold] saving, loading again, measuring")
    networks = {
        "teacher": (teacher, f"ResNet-{TEACHER_DEPTH}", "labels"),
        "student": (student, f"ResNet-{STUDENT_DEPTH}", "the teacher"),
        "int8-student": (int8, f"ResNet-{STUDENT_DEPTH}, int8", "the teacher"),
        "xnor-student": (binary, f"ResNet-{STUDENT_DEPTH}, binary", "the teacher"),
    }
    results = _measure(networks, splits, out)
    _write(results, settings, out)
    trainings.remove_checkpoints()
    _print(results, out, console)
    return results


class _Trainings:
    """The three trainings; each is seeded on its own, so that a resumed run repeats the others."""

    def __init__(self, settings: Settings, splits: data.Splits, out: Path) -> None:
        self.settings = settings
        self.splits = splits
        self.out = out
        self._checkpoint = f"{_recipe.run_key(asdict(settings), splits)}.checkpoint"

    def new(self, depth: int) -> ResNet:
        torch.manual_seed(self.settings.seed)
        return ResNet(depth, self.splits.in_channels, self.splits.num_classes, WIDTH)

    def teacher(self) -> nn.Module:
        model = self.new(TEACHER_DEPTH)
        decay = dict(momentum=0.9, nesterov=True, weight_decay=5e-4)
        optimizer = SGD(model.parameters(), lr=0.1, **decay)
        self._fit(model, model, "teacher", TEACHER_IMAGES, [optimizer])
        return model.eval()

    def student(self, model: nn.Module, name: str, images: int, teacher: nn.Module) -> nn.Module:
        task = distill.anc(model, teacher)
        optimizers = [
            Adam(task.student_parameters(), lr=5e-3),
            Adam(task.discriminator_parameters(), lr=1e-3),
        ]
        self._fit(task, model, name, images, optimizers)
        return model.eval()

    def _fit(
        self,
        task: nn.Module,
        model: nn.Module,
        name: str,
        images: int,
        optimizers: list[torch.optim.Optimizer],
    ) -> None:
        seed, splits = self.settings.seed, self.splits
        epochs = self.settings.epochs or max(1, round(images / len(splits.train)))
        validation = data.loader(splits.validation, 256)
        torch.manual_seed(seed)
        train.fit(
            task,
            data.loader(splits.train, BATCH, shuffle=True, seed=seed),
            epochs=epochs,
            optimizer=optimizers,
            scheduler=CosineAnnealingLR(optimizers[0], epochs),
            validate=partial(train.error_rate, model, validation),
            checkpoint=self.out / f"{name}.{self._checkpoint}",
        )

    def remove_checkpoints(self) -> None:
        for path in self.out.glob(f"*.{self._checkpoint}"):
            path.unlink()


def _measure(
    networks: dict[str, tuple[nn.Module, str, str]], splits: data.Splits, out: Path
) -> list[Result]:
    """Everything is measured on what comes back from the files."""
    images = torch.stack([splits.test[i % len(splits.test)][0] for i in range(BATCH)])
    loaded = [
        _recipe.reloaded(model, out / f"{name}.safetensors", images)
        for name, (model, *_) in networks.items()
    ]
    latencies = {}
    with torch.inference_mode():
        for batch in (1, BATCH):
            latencies[batch] = _report.latency(loaded, (images[:batch],), TIMED_RUNS)
    test = data.loader(splits.test, 256)
    results = []
    for i, (name, (_, network, learned_from)) in enumerate(networks.items()):
        file = out / f"{name}.safetensors"
        report = _report.report(loaded[i], images[:1], file=file, repeats=1)
        error = train.error_rate(loaded[i], test)
        results.append(
            Result(
                name=name,
                network=network,
                learned_from=learned_from,
                test_error=error,
                test_images=len(splits.test),
                parameters=report.total.parameters,
                file=file.name,
                file_bytes=report.file_bytes,
                macs=report.macs,
                latency_ms={batch: times[i] for batch, times in latencies.items()},
            )
        )
    return results


def _rows(results: Sequence[Result]) -> list[list[str]]:
    """The table, networks as columns: header first."""
    teacher, student, *_ = results

    def ratio(before: float, after: float) -> str:
        return f"{before / after:.1f}x"

    def milliseconds(result: Result, batch: int) -> str:
        return f"{result.latency_ms[batch]:.2f} ms"

    def macs(result: Result, precision: str) -> str:
        return f"{result.macs.get(precision, 0) / 1e6:.2f} M"

    cells = {
        "network": lambda r: r.network,
        "learned from": lambda r: r.learned_from,
        "test error": lambda r: f"{r.test_error:.2f} %",
        "parameters": lambda r: f"{r.parameters:,}",
        "file": lambda r: f"{r.file_bytes:,} B",
        "float MACs per image": lambda r: macs(r, "float32"),
        "int8 MACs per image": lambda r: macs(r, "int8"),
        "binary MACs per image": lambda r: macs(r, "binary"),
        "latency, 1 image": lambda r: milliseconds(r, 1),
        f"latency, {BATCH} images": lambda r: milliseconds(r, BATCH),
        "smaller than the teacher": lambda r: ratio(teacher.file_bytes, r.file_bytes),
        "smaller than the student": lambda r: ratio(student.file_bytes, r.file_bytes),
    }
    for batch in (1, BATCH):
        images = "1 image" if batch == 1 else f"{batch} images"
        for name, other in (("teacher", teacher), ("student", student)):
            cells[f"faster than the {name}, {images}"] = lambda r, other=other, batch=batch: ratio(
                other.latency_ms[batch], r.latency_ms[batch]
            )
    header = ["", *(result.name for result in results)]
    return [header, *([label, *map(cell, results)] for label, cell in cells.items())]


def _notes(results: Sequence[Result]) -> str:
    return (
        f"Test error on {results[0].test_images} images, one seed. Latency: median of {TIMED_RUNS} "
        f"runs of the reloaded files in turns, on {_machine.describe()}. Binary and int8 layers "
        "ran on nncx's kernels, float layers on torch's."
    )


def _write(results: Sequence[Result], settings: Settings, out: Path) -> None:
    table = markdown_table(_rows(results), texts=1)
    _files.replace(out / "table.md", f"{table}\n\n{_notes(results)}\n".encode())
    record = {
        "settings": asdict(settings),
        "machine": _machine.describe(),
        "results": [asdict(result) for result in results],
    }
    _files.replace(out / "results.json", (json.dumps(record, indent=2) + "\n").encode())
    points = [Point(result.name, result.file_bytes, result.test_error) for result in results]
    _plots.scatter(points, out / "plot.png")


def _print(results: Sequence[Result], out: Path, console: Console) -> None:
    header, *rows = _rows(results)
    table = Table(*header, box=None, header_style="bold")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*row)
    console.print()
    console.print(table)
    console.print(f"\n{_notes(results)}")
    console.print(
        f"Networks, table.md, results.json and plot.png are in [bold]{escape(str(out))}[/bold]."
    )
