"""The command `nncx`. Each subcommand is a thin shell over a function of the library."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Compress neural networks and really run the result.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

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
    data: Annotated[
        str, typer.Option(help="digits, mnist, fashion-mnist, or a folder of images.")
    ] = "digits",
    out: Annotated[Path, typer.Option(help="Folder for networks, table and plot.")] = Path("demo"),
    root: Annotated[
        str | None, typer.Option(help="Where mnist and fashion-mnist are; else $NNCX_DATA.")
    ] = None,
    image_size: Annotated[
        int, typer.Option(help="To what square the images of a folder are scaled.", min=8)
    ] = 32,
    epochs: Annotated[
        int | None, typer.Option(help="Of each training; by default few for large data.", min=1)
    ] = None,
    seed: Annotated[int, typer.Option(help="Of all that is random.")] = 0,
) -> None:
    """Train a teacher, distill a small and a binary student without labels, measure all three.

    On the digits (real handwriting that comes with scikit-learn) in less than 3 minutes on 2 cores.
    An interrupted run continues when the same command is given again.
    """
    with _readable_errors():
        from rich.console import Console

        from nncx import _demo

        settings = _demo.Settings(data, root, image_size, epochs, seed)
        _demo.run(settings, out, Console(highlight=False))
