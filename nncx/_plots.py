"""Plots; matplotlib is imported when one is drawn."""

import importlib.util
import math
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

_LARGEST = 900  # area of a marker, in square points
_PLAIN = 36


class Point(NamedTuple):
    """A network in `scatter`: its stored bytes, its error in percent, perhaps its latency."""

    label: str
    bytes: int
    error: float
    latency_ms: float | None = None


def scatter(points: Sequence[Point], path: str | os.PathLike) -> None:
    """Plot error over size and write it to ``path`` (PNG unless its suffix says otherwise).

    Args:
        points: Bytes are positive, their axis logarithmic. Where all latencies are known, the area
            of a marker is proportional to them; a legend says which is how many milliseconds.
        path: File to write.

    Raises:
        ValueError: If there are no points or a size is not positive.
        ImportError: If matplotlib is not installed.
    """
    if not points or not all(point.bytes > 0 for point in points):
        raise ValueError(
            f"scatter: needs points (label, bytes > 0, error %), got {list(points)}: "
            "take bytes from a report"
        )
    require_matplotlib()
    from matplotlib.figure import Figure  # without pyplot: no display, no global state
    from matplotlib.ticker import EngFormatter

    areas = _areas([point.latency_ms for point in points])
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(
        xscale="log", xlabel="stored bytes", ylabel="error (%)", title="error over size"
    )
    axes.scatter(
        [point.bytes for point in points],
        [point.error for point in points],
        [areas(point.latency_ms) for point in points],
        alpha=0.7,
        zorder=3,
    )
    axes.margins(0.25, 0.15)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_formatter(EngFormatter(unit="B"))
    axes.grid(alpha=0.3)
    if None not in (latencies := [point.latency_ms for point in points]):
        for latency in _round_numbers(min(latencies), max(latencies)):
            axes.scatter([], [], areas(latency), color="C0", alpha=0.7, label=f"{latency:g} ms")
        figure.legend(
            title="latency",
            loc="outside right center",
            frameon=False,
            labelspacing=2,
            handlelength=3,
            borderpad=1,
        )
    texts = [
        axes.annotate(
            point.label,
            (point.bytes, point.error),
            (math.sqrt(areas(point.latency_ms) / math.pi) + 3, 4),
            textcoords="offset points",
            fontsize=9,
        )
        for point in sorted(points, key=lambda point: point.error)
    ]
    figure.draw_without_rendering()  # settles where the texts are
    for above, text in enumerate(texts):  # from below, each rises until it covers no other
        while any(
            text.get_window_extent().overlaps(lower.get_window_extent()) for lower in texts[:above]
        ):
            text.xyann = (text.xyann[0], text.xyann[1] + 3)
    figure.savefig(path, dpi=150)


def require_matplotlib() -> None:
    """Raises ImportError, in one sentence, where no plot could be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError(
            "plots need matplotlib: pip install 'nncx[demo]' (in a checkout: pip install '.[demo]')"
        )


def _areas(latencies: Sequence[float | None]) -> Callable[[float | None], float]:
    """From milliseconds to the area of a marker; a constant if one of them is not known."""
    if None in latencies:
        return lambda _: _PLAIN
    return lambda latency: _LARGEST * latency / max(latencies)


def _round_numbers(low: float, high: float) -> list[float]:
    """At most three of 1, 2, 5, 10, 20, ...: those next to `low`, `high` and the middle."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    numbers = [float(f"{digit}e{power}") for power in powers for digit in (1, 2, 5)]
    wanted = (low, math.sqrt(low * high), high)
    return sorted({min(numbers, key=lambda n: abs(math.log(n / value))) for value in wanted})
