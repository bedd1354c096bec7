"""What `nncx.train.fit` writes for people: a table, TensorBoard's events, a plot of the curves."""

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nncx import _files, _plots

Record = dict[str, float]

HISTORY = "history.csv"


class Logs:
    """The folder `folder`: history.csv, one row an epoch, and TensorBoard's events if asked for.

    A run that continues has its epochs once: the table is that of its whole history, and
    TensorBoard forgets what it was told of later epochs.

    Args:
        history: the epochs that are done.

    Raises:
        ImportError: if TensorBoard is asked for and missing.
        OSError: if the folder cannot be made.
    """

    def __init__(
        self, folder: str | os.PathLike[str], history: Sequence[Record], tensorboard: bool
    ) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.events = _events(self.folder, len(history) + 1) if tensorboard else None
        if history:
            self._write_table(history)

    def add(self, history: Sequence[Record]) -> None:
        """Its last epoch is new."""
        self._write_table(history)
        if self.events is not None:
            record = history[-1]
            for name, value in record.items():
                if name != "epoch":
                    self.events.add_scalar(name, value, record["epoch"])
            self.events.flush()

    def close(self) -> None:
        if self.events is not None:
            self.events.close()

    def _write_table(self, history: Sequence[Record]) -> None:
        _files.replace(self.folder / HISTORY, to_csv(history).encode())


def to_csv(history: Sequence[Record]) -> str:
    """A row for each epoch; empty where it has no value for a column."""
    text = io.StringIO()
    writer = csv.DictWriter(text, _columns(history), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    return text.getvalue()


def plot(history: Sequence[Record], path: str | os.PathLike[str]) -> None:
    """Plot what `fit` returned over the epochs, and write it to `path` (PNG by default).

    The scalars of the task share one panel; "validation", if it is there, has its own below it.

    Raises:
        ValueError: for a history without epochs.
        ImportError: if matplotlib is not installed.
    """
    if not history:
        raise ValueError("plot: the history must have at least one epoch, got none; train first")
    _plots.require_matplotlib()
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    names = [name for name in _columns(history) if name != "epoch"]
    panels = [[name for name in names if name != "validation"]]
    if "validation" in names:
        panels.append(["validation"])
    figure = Figure(figsize=(8, 3 * len(panels) + 1), layout="constrained")
    for axes, panel in zip(
        figure.subplots(len(panels), sharex=True, squeeze=False).flat, panels, strict=True
    ):
        for name in panel:
            points = [(each["epoch"], each[name]) for each in history if name in each]
            axes.plot(*zip(*points, strict=True), marker=".", label=name)
        axes.legend()
        axes.grid(alpha=0.3)
    axes.set_xlabel("epoch")
    axes.xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(path, dpi=150)


def _columns(history: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(name for record in history for name in record))


def _events(folder: Path, first_epoch: int) -> Any:
    """TensorBoard's writer, which takes back what is in `folder` of that epoch and later ones."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "events for TensorBoard need tensorboard: pip install 'nncx[logs]' (in a checkout: "
            "pip install '.[logs]')"
        ) from error
    return SummaryWriter(folder, purge_step=first_epoch)
