"""The command `nncx`. Each subcommand is a thin shell over a function of the library."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from nncx import _compress, _eval, _recipe
from nncx._compress import METHODS, OBSERVERS, Compression
from nncx._recipe import AMP, LAYERS, LOSSES, OPTIMIZERS, Recipe
from nncx.train import processes

app = typer.Typer(
    help="Compress neural networks and really run the result.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

# Of several commands.
_Data = Annotated[str, typer.Option(help="digits, mnist, fashion-mnist, or a folder of images.")]
_Root = Annotated[
    str | None, typer.Option(help="Where mnist and fashion-mnist are; else $NNCX_DATA.")
]
_ImageSize = Annotated[int, typer.Option(help="To what square the images of a folder are scaled.")]

# What a user can cause, and mend: one sentence, no traceback.
_USER_ERRORS = (ValueError, ImportError, OSError, FloatingPointError)


@contextmanager
def _readable_errors() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt as interrupt:
        print(f"\nnncx: {str(interrupt) or 'interrupted'}", file=sys.stderr)
        raise typer.Exit(130) from interrupt
    except _USER_ERRORS as error:
        print(f"nncx: {error}", file=sys.stderr)
        raise typer.Exit(1) from error


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
    data: _Data = "digits",
    out: Annotated[Path, typer.Option(help="Folder for networks, table and plot.")] = Path("demo"),
    root: _Root = None,
    image_size: Annotated[
        int, typer.Option(help="To what square the images of a folder are scaled.", min=8)
    ] = 32,
    epochs: Annotated[
        int | None, typer.Option(help="Of each training; by default few for large data.", min=1)
    ] = None,
    seed: Annotated[int, typer.Option(help="Of all that is random.")] = 0,
) -> None:
    """Train a teacher, distill a small student without labels, in float, int8 and binary; measure.

    On the digits (real handwriting that comes with scikit-learn) in less than 3 minutes on 2 cores.
    An interrupted run continues when the same command is given again.
    """
    with _readable_errors():
        from rich.console import Console

        from nncx import _demo

        settings = _demo.Settings(data, root, image_size, epochs, seed)
        _demo.run(settings, out, Console(highlight=False))


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="Folder for model.safetensors and result.json.")],
    data: _Data = Recipe.data,
    root: _Root = Recipe.root,
    image_size: _ImageSize = Recipe.image_size,
    model: Annotated[
        str,
        typer.Option(
            help="lenet300100, lenet4, lenet5, mlp, mobilenet, nin, shufflenet, shufflenetv2, vgg9,"
            " or resnet with its depth."
        ),
    ] = Recipe.model,
    option: Annotated[
        list[str] | None,
        typer.Option(help="Of the network, as norm=true or dropout=0.5; can be repeated."),
    ] = None,
    layers: Annotated[str, typer.Option(help=f"{', '.join(LAYERS)}.")] = Recipe.layers,
    loss: Annotated[str, typer.Option(help=f"{', '.join(LOSSES)}.")] = Recipe.loss,
    epochs: Annotated[int, typer.Option(help="The best on the validation split is kept.")] = (
        Recipe.epochs
    ),
    batch: Annotated[int, typer.Option(help="Images per step.")] = Recipe.batch,
    optimizer: Annotated[str, typer.Option(help=f"{', '.join(OPTIMIZERS)}.")] = Recipe.optimizer,
    lr: Annotated[float, typer.Option(help="Learning rate of the first epoch.")] = Recipe.lr,
    lr_decay: Annotated[
        float, typer.Option(help="That of the last epoch by that of the first; exponential.")
    ] = Recipe.lr_decay,
    weight_decay: Annotated[float, typer.Option(help="Of the optimizer.")] = Recipe.weight_decay,
    amp: Annotated[str, typer.Option(help=f"Mixed precision: {', '.join(AMP)}.")] = Recipe.amp,
    patience: Annotated[
        int | None,
        typer.Option(help="Stop after so many epochs without a lower validation error.", min=1),
    ] = Recipe.patience,
    seed: Annotated[int, typer.Option(help="Of all that is random.")] = Recipe.seed,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Write events for TensorBoard, too.")
    ] = False,
    plot: Annotated[bool, typer.Option("--plot", help="Draw the history to curves.png.")] = False,
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
            result = _recipe.run(recipe, out, device, tensorboard=tensorboard, plot=plot)
        if result is not None:
            print(result)


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Option(help="A file of nncx.save.")],
    data: _Data = Recipe.data,
    root: _Root = Recipe.root,
    image_size: _ImageSize = Recipe.image_size,
    out: Annotated[Path | None, typer.Option(help="Folder for result.json.")] = None,
) -> None:
    """Report what a file does: test error, size, and milliseconds an image.

    On the test split, which `nncx train` and `nncx compress` never choose by.
    """
    with _readable_errors():
        print(_eval.run(model, data, root, image_size, out))


@app.command()
def compress(
    model: Annotated[
        str,
        typer.Option(
            help="A file of nncx.save; or lenet5, resnet20 and so on; or torchvision:resnet18."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for model.safetensors and result.json.")],
    weights: Annotated[
        str | None,
        typer.Option(help="A state dict for a network by name; torchvision's have their own."),
    ] = Compression.weights,
    option: Annotated[
        list[str] | None,
        typer.Option(help="Of a network by name, as norm=true; can be repeated."),
    ] = None,
    method: Annotated[str, typer.Option(help=f"{', '.join(METHODS)}.")] = Compression.method,
    data: _Data = Compression.data,
    root: _Root = Compression.root,
    image_size: _ImageSize = Compression.image_size,
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
    seed: Annotated[int, typer.Option(help="Of the draw of images.")] = Compression.seed,
) -> None:
    """Store a trained network in fewer bits, without training; report what its file does.

    Test error, file and latency are those of the file, loaded again, beside the float network's.
    """
    with _readable_errors():
        compression = Compression(
            model=model,
            weights=weights,
            options=_options(option),
            method=method,
            data=data,
            root=root,
            image_size=image_size,
            calibration_images=calibration_images,
            observer=observer,
            symmetric=symmetric,
            per_layer=per_layer,
            skip=tuple(skip or ()),
            vanhoucke=vanhoucke,
            sensitivity=sensitivity,
            seed=seed,
        )
        print(_compress.run(compression, out))


@app.command()
def doctor() -> None:
    """Say which kernels run here and why, and test each against its reference.

    The exit code is 1 if anything is wrong; each such line says what mends it.
    """
    with _readable_errors():
        from rich.console import Console

        from nncx import _doctor

        diagnosis = _doctor.examine()
        _doctor.show(diagnosis, Console(highlight=False))
        if diagnosis.problems:
            raise typer.Exit(1)
