"""The command `nncx`. Each subcommand is a thin shell over a function of the library."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from nncx import _plots, models
from nncx._compare import Comparison
from nncx._report import Report
from nncx.commands import _compress, _distill, _eval, _recipe, _reproduce
from nncx.commands._compress import METHODS, OBSERVERS, Compression
from nncx.commands._distill import Distillation
from nncx.commands._recipe import AMP, LAYERS, LOSSES, OPTIMIZERS, Recipe, Setup
from nncx.commands._talk import TABLES
from nncx.data import AUGMENTATIONS, NAMED
from nncx.distill import METHODS as DISTILLATIONS
from nncx.train import processes

app = typer.Typer(
    help="Compress neural networks and really run the result.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

# What a user can cause, and mend: one sentence, no traceback.
_USER_ERRORS = (ValueError, ImportError, OSError, FloatingPointError)


# What several commands take.
Data = Annotated[str, typer.Option(help=f"{', '.join(NAMED)}, or a folder or .npz file of images.")]
Root = Annotated[str | None, typer.Option(help="Where the data sets by name are; else $NNCX_DATA.")]
ImageSize = Annotated[int, typer.Option(help="To what square the images of a folder are scaled.")]
TrainImages = Annotated[
    int | None, typer.Option(help="Train on so many of the training images at most.")
]
Augment = Annotated[str, typer.Option(help=f"{', '.join(AUGMENTATIONS)}.")]
Out = Annotated[Path, typer.Option(help="Folder for model.safetensors and result.json.")]
Network = Annotated[str, typer.Option(help=f"{', '.join(models.NAMES)}, or torchvision:NAME.")]
Options = Annotated[
    list[str] | None,
    typer.Option(help="Of the network, as norm=true or dropout=0.5; can be repeated."),
]
Layers = Annotated[str, typer.Option(help=f"{', '.join(LAYERS)}.")]
Loss = Annotated[str, typer.Option(help=f"{', '.join(LOSSES)}.")]
Epochs = Annotated[int, typer.Option(help="The best on the validation split is kept.")]
Batch = Annotated[int, typer.Option(help="Images per step.")]
Optimizer = Annotated[str, typer.Option(help=f"{', '.join(OPTIMIZERS)}.")]
Rate = Annotated[float, typer.Option(help="Learning rate of the first epoch.")]
RateDecay = Annotated[
    float, typer.Option(help="That of the last epoch by that of the first; exponential.")
]
WeightDecay = Annotated[float, typer.Option(help="Of the optimizer.")]
Amp = Annotated[str, typer.Option(help=f"Mixed precision: {', '.join(AMP)}.")]
Patience = Annotated[
    int | None,
    typer.Option(help="Stop after so many epochs without a lower validation error.", min=1),
]
Seed = Annotated[int, typer.Option(help="Of all that is random.")]
TensorBoard = Annotated[
    bool, typer.Option("--tensorboard", help="Write events for TensorBoard, too.")
]
Plot = Annotated[bool, typer.Option("--plot", help="Draw the history to curves.png.")]
Teacher = Annotated[
    str,
    typer.Option(
        help="A file of nncx.save; torchvision:NAME; or a network by name, which is trained first."
    ),
]
TeacherOptions = Annotated[
    list[str] | None, typer.Option(help="As --option, of a teacher by name.")
]


@contextmanager
def _readable_errors() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt as interrupt:
        print(f"\nnncx: {str(interrupt) or 'interrupted'}", file=sys.stderr)
        raise typer.Exit(130) from interrupt
    except _USER_ERRORS as error:
        print(f"nncx: {_sentence(error)}", file=sys.stderr)
        raise typer.Exit(1) from error


def _sentence(error: Exception) -> str:
    """What is wrong; of the system's errors without their number."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename} cannot be used: {error.strerror}; check its path"
    return str(error)


def _name_and_value(option: str) -> tuple[str, Any]:
    """What `norm=true` says; values are JSON's."""
    name, _, value = option.partition("=")
    try:
        return name, json.loads(value)
    except ValueError as error:
        raise ValueError(
            f"an option must be a name and a JSON value, as norm=true, got {option!r}"
        ) from error


def _options(texts: list[str] | None) -> dict[str, Any]:
    return dict(map(_name_and_value, texts or ()))


def _sizes(shape: str) -> list[int]:
    """What `1x28x28` says."""
    sizes = shape.split("x")
    if not all(size.isdecimal() and int(size) for size in sizes):
        raise ValueError(f"a shape must be sizes of at least 1, as 1x28x28, got {shape!r}")
    return [int(size) for size in sizes]


def _print(result: object | None) -> None:
    """In the first of several processes, which has one."""
    if result is not None:
        print(result)


def _print_version(wanted: bool) -> None:
    if wanted:
        from nncx import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    """Compress neural networks and really run the result."""


@app.command()
def demo(
    data: Data = "digits",
    out: Annotated[Path, typer.Option(help="Folder for networks, table and plot.")] = Path("demo"),
    root: Root = None,
    image_size: Annotated[
        int, typer.Option(help="To what square the images of a folder are scaled.", min=8)
    ] = 32,
    epochs: Annotated[
        int | None, typer.Option(help="Of each training; by default few for large data.", min=1)
    ] = None,
    seed: Seed = 0,
) -> None:
    """Train a teacher, distill a small student without labels, in float, int8 and binary; measure.

    On the digits (real handwriting that comes with scikit-learn) in less than 3 minutes on 2 cores.
    An interrupted run continues when the same command is given again.
    """
    with _readable_errors():
        from rich.console import Console

        from nncx.commands import _demo

        settings = _demo.Settings(data, root, image_size, epochs, seed)
        _demo.run(settings, out, Console(highlight=False))


@app.command()
def train(
    out: Out,
    data: Data = Recipe.data,
    root: Root = Recipe.root,
    image_size: ImageSize = Recipe.image_size,
    train_images: TrainImages = Recipe.train_images,
    augment: Augment = Recipe.augment,
    model: Network = Recipe.model,
    option: Options = None,
    layers: Layers = Recipe.layers,
    loss: Loss = Recipe.loss,
    epochs: Epochs = Recipe.epochs,
    batch: Batch = Recipe.batch,
    optimizer: Optimizer = Recipe.optimizer,
    lr: Rate = Recipe.lr,
    lr_decay: RateDecay = Recipe.lr_decay,
    weight_decay: WeightDecay = Recipe.weight_decay,
    amp: Amp = Recipe.amp,
    patience: Patience = Recipe.patience,
    seed: Seed = Recipe.seed,
    tensorboard: TensorBoard = False,
    plot: Plot = False,
) -> None:
    """Train a network from labels; report what its frozen file does when it is loaded again.

    On the GPU if there is one. An interrupted run continues when the same command is given again.
    On several GPUs, or in several processes on a CPU: torchrun --nproc-per-node N -m nncx train ...
    """
    with _readable_errors():
        recipe = Recipe(
            data=data,
            root=root,
            image_size=image_size,
            train_images=train_images,
            augment=augment,
            model=model,
            options=_options(option),
            layers=layers,
            loss=loss,
            epochs=epochs,
            batch=batch,
            optimizer=optimizer,
            lr=lr,
            lr_decay=lr_decay,
            weight_decay=weight_decay,
            amp=amp,
            patience=patience,
            seed=seed,
        )
        with processes() as device:
            _print(_recipe.run(recipe, out, Setup(device, tensorboard, plot)))


@app.command()
def distill(
    out: Out,
    teacher: Teacher = Distillation.teacher,
    teacher_option: TeacherOptions = None,
    teacher_weights: Annotated[
        str | None, typer.Option(help="A state dict for the teacher, which then is not trained.")
    ] = Distillation.teacher_weights,
    method: Annotated[str, typer.Option(help=f"{', '.join(DISTILLATIONS)}.")] = (
        Distillation.method
    ),
    method_option: Annotated[
        list[str] | None,
        typer.Option(help="Of the method, as temperature=4 or hidden=[64,64]; can be repeated."),
    ] = None,
    discriminator_lr: Annotated[float, typer.Option(help="Of anc's discriminator; Adam.")] = (
        Distillation.discriminator_lr
    ),
    cache_teacher: Annotated[
        bool, typer.Option("--cache-teacher", help="Run the teacher once; without augmentation.")
    ] = Distillation.cache_teacher,
    data: Data = Distillation.data,
    root: Root = Distillation.root,
    image_size: ImageSize = Distillation.image_size,
    train_images: TrainImages = Distillation.train_images,
    augment: Augment = Distillation.augment,
    student: Network = Distillation.model,
    option: Options = None,
    layers: Layers = Distillation.layers,
    epochs: Epochs = Distillation.epochs,
    batch: Batch = Distillation.batch,
    optimizer: Optimizer = Distillation.optimizer,
    lr: Rate = Distillation.lr,
    lr_decay: RateDecay = Distillation.lr_decay,
    weight_decay: WeightDecay = Distillation.weight_decay,
    amp: Amp = Distillation.amp,
    patience: Patience = Distillation.patience,
    seed: Seed = Distillation.seed,
    tensorboard: TensorBoard = False,
    plot: Plot = False,
) -> None:
    """Train a student by a teacher; report what its frozen file does when it is loaded again.

    On the GPU if there is one, and under torchrun as `nncx train`. An interrupted run continues
    when the same command is given again.
    """
    with _readable_errors():
        distillation = Distillation(
            teacher=teacher,
            teacher_options=_options(teacher_option),
            teacher_weights=teacher_weights,
            method=method,
            method_options=_options(method_option),
            discriminator_lr=discriminator_lr,
            cache_teacher=cache_teacher,
            data=data,
            root=root,
            image_size=image_size,
            train_images=train_images,
            augment=augment,
            model=student,
            options=_options(option),
            layers=layers,
            epochs=epochs,
            batch=batch,
            optimizer=optimizer,
            lr=lr,
            lr_decay=lr_decay,
            weight_decay=weight_decay,
            amp=amp,
            patience=patience,
            seed=seed,
        )
        with processes() as device:
            _print(_distill.run(distillation, out, Setup(device, tensorboard, plot)))


@app.command()
def reproduce(
    table: Annotated[str, typer.Argument(help=f"{', '.join(TABLES)}.")],
    out: Annotated[Path, typer.Option(help="Folder for the tables and their trainings.")],
    data: Data = "digits",
    quick: Annotated[
        bool, typer.Option("--quick", help="Few images, 2 epochs, 1 seed: to see that it runs.")
    ] = False,
    seeds: Annotated[int | None, typer.Option(help="Trainings of each row; 3.")] = None,
    jobs: Annotated[int, typer.Option(help="Trainings at the same time.")] = 1,
    root: Root = None,
    image_size: ImageSize = Recipe.image_size,
    train_images: TrainImages = None,
    teacher: Annotated[
        str | None, typer.Option(help="As in nncx distill; else the talk's for these data.")
    ] = None,
    teacher_option: TeacherOptions = None,
    student: Annotated[str | None, typer.Option(help="Else the talk's for these data.")] = None,
    option: Options = None,
    epochs: Annotated[int | None, typer.Option(help="Of each training.")] = None,
    batch: Annotated[int | None, typer.Option(help="Images per step.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate of the first epoch.")] = None,
) -> None:
    """Train what a table of the talk compares, on your data; print it beside the talk's figures.

    An interrupted run continues when the same command is given again; what is trained stays.
    """
    with _readable_errors():
        given = {
            "train_images": train_images,
            "teacher": teacher,
            "model": student,
            "epochs": epochs,
            "batch": batch,
            "lr": lr,
        }
        distillation = _reproduce.settings(
            data,
            quick,
            root=root,
            image_size=image_size,
            teacher_options=_options(teacher_option),
            options=_options(option),
            **{name: value for name, value in given.items() if value is not None},
        )
        if seeds is None:
            seeds = 1 if quick else 3
        print(_reproduce.run(_reproduce.Reproduction(table, distillation, seeds, jobs), out))


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Option(help="A file of nncx.save.")],
    data: Data = Recipe.data,
    root: Root = Recipe.root,
    image_size: ImageSize = Recipe.image_size,
    out: Annotated[Path | None, typer.Option(help="Folder for result.json.")] = None,
) -> None:
    """Report what a file does: test error, size, and milliseconds an image.

    On the test split, which `nncx train` and `nncx compress` never choose by.
    """
    with _readable_errors():
        print(_eval.run(model, data, root, image_size, out))


@app.command()
def report(
    files: Annotated[list[str], typer.Argument(help="Of nncx.save.")],
    data: Annotated[
        str | None,
        typer.Option(help="As in nncx train: the errors on its test split are reported, too."),
    ] = None,
    root: Root = None,
    image_size: ImageSize = Recipe.image_size,
    shape: Annotated[
        str | None, typer.Option(help="Of an image, as 1x28x28, where there are no data.")
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(help="A file to compare with; else the first is.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all figures as JSON.")] = False,
    as_markdown: Annotated[
        bool, typer.Option("--markdown", help="Print tables in Markdown.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Draw error over bytes over latency to this PNG.")
    ] = None,
) -> None:
    """Report what files store, bit for bit, and what they cost: one by layers, several in a table.

    The bytes are those of the file, layer by layer and with its header; latencies are measured on
    one image, all files in turns.
    """
    with _readable_errors():
        if as_json and as_markdown:
            raise ValueError("report: pass --json or --markdown, got both; leave one out")
        if plot is not None:
            if data is None:
                raise ValueError("report: --plot draws errors, got no --data; pass both")
            _plots.require_matplotlib()  # now rather than after the measurements
        comparison = _eval.compare(
            files if baseline is None else [baseline, *(f for f in files if f != baseline)],
            data=data,
            root=root,
            image_size=image_size,
            shape=None if shape is None else _sizes(shape),
        )
        tables: list[Report | Comparison] = [comparison]
        if len(files) == 1:
            tables.insert(0, comparison.networks[-1].report)
        if as_json:
            print(json.dumps(comparison.to_dict(), indent=2))
        else:
            print("\n\n".join(each.to_markdown() if as_markdown else str(each) for each in tables))
        if plot is not None:
            comparison.plot(plot)


@app.command()
def compress(
    model: Annotated[
        str,
        typer.Option(
            help="A file of nncx.save; or lenet5, resnet20 and so on; or torchvision:resnet18."
        ),
    ],
    out: Out,
    weights: Annotated[
        str | None,
        typer.Option(help="A state dict for a network by name; torchvision's have their own."),
    ] = Compression.weights,
    option: Annotated[
        list[str] | None,
        typer.Option(help="Of a network by name, as norm=true; can be repeated."),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(help=f"{', '.join(METHODS)}; by default int8. Several are applied in order."),
    ] = None,
    method_option: Annotated[
        list[str] | None,
        typer.Option(
            help="Of a method that trains, as bits=5; of several, inq.bits=5. Can be repeated."
        ),
    ] = None,
    data: Data = Compression.data,
    root: Root = Compression.root,
    image_size: ImageSize = Compression.image_size,
    train_images: TrainImages = Compression.train_images,
    augment: Augment = Compression.augment,
    loss: Loss = Compression.loss,
    epochs: Annotated[
        int, typer.Option(help="Of each training, one for each step of a method; the best is kept.")
    ] = Compression.epochs,
    batch: Batch = Compression.batch,
    optimizer: Optimizer = Compression.optimizer,
    lr: Rate = Compression.lr,
    lr_decay: RateDecay = Compression.lr_decay,
    weight_decay: WeightDecay = Compression.weight_decay,
    amp: Amp = Compression.amp,
    patience: Patience = Compression.patience,
    calibration_images: Annotated[
        int, typer.Option(help="Training images, at most, from which int8 takes its ranges.")
    ] = Compression.calibration_images,
    observer: Annotated[str, typer.Option(help=f"{', '.join(OBSERVERS)}.")] = Compression.observer,
    symmetric: Annotated[
        bool, typer.Option("--symmetric", help="Inputs of int8 layers have the zero point 0.")
    ] = Compression.symmetric,
    per_layer: Annotated[
        bool, typer.Option("--per-layer", help="One scale for all weights of an int8 layer.")
    ] = Compression.per_layer,
    skip: Annotated[
        list[str] | None, typer.Option(help="A layer or block that stays float; can be repeated.")
    ] = None,
    vanhoucke: Annotated[
        bool,
        typer.Option("--vanhoucke", help="The first scheme: --per-layer, input layer float."),
    ] = Compression.vanhoucke,
    sensitivity: Annotated[
        bool, typer.Option("--sensitivity", help="Print also what each int8 layer alone loses.")
    ] = Compression.sensitivity,
    seed: Seed = Compression.seed,
    tensorboard: TensorBoard = False,
    plot: Plot = False,
) -> None:
    """Make a trained network smaller, by any method; report what its file does.

    Test error, file and latency are those of the file, loaded again, beside the float network's.
    int8, float16 and bfloat16 need no training. The other methods train on, on the GPU if there is
    one, and under torchrun as `nncx train`; an interrupted run continues when the same command is
    given again.
    """
    with _readable_errors():
        compression = Compression(
            model=model,
            weights=weights,
            options=_options(option),
            methods=tuple(method or Compression.methods),
            method_options=_options(method_option),
            data=data,
            root=root,
            image_size=image_size,
            train_images=train_images,
            augment=augment,
            loss=loss,
            epochs=epochs,
            batch=batch,
            optimizer=optimizer,
            lr=lr,
            lr_decay=lr_decay,
            weight_decay=weight_decay,
            amp=amp,
            patience=patience,
            calibration_images=calibration_images,
            observer=observer,
            symmetric=symmetric,
            per_layer=per_layer,
            skip=tuple(skip or ()),
            vanhoucke=vanhoucke,
            sensitivity=sensitivity,
            seed=seed,
        )
        with processes() as device:
            _print(_compress.run(compression, out, Setup(device, tensorboard, plot)))


@app.command()
def doctor() -> None:
    """Say which kernels run here and why, and test each against its reference.

    The exit code is 1 if anything is wrong; each such line says what mends it.
    """
    with _readable_errors():
        from rich.console import Console

        from nncx.commands import _doctor

        diagnosis = _doctor.examine()
        _doctor.show(diagnosis, Console(highlight=False))
        if diagnosis.problems:
            raise typer.Exit(1)
