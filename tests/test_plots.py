"""Plots are written; what cannot be drawn is refused."""

from pathlib import Path

import pytest

from nncx import _plots
from nncx._plots import Point, scatter

POINTS = [Point("float", 1_100_000, 2.0), Point("binary", 40_000, 5.0), Point("anc", 40_000, 5.0)]


@pytest.mark.parametrize("latencies", [(None, None, None), (3.0, 0.5, 0.04), (0.3, 0.3, None)])
def test_scatter_writes_a_png(tmp_path: Path, latencies: tuple[float | None, ...]) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "plot.png"
    points = [p._replace(latency_ms=ms) for p, ms in zip(POINTS, latencies, strict=True)]
    scatter(points, path)
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n") and len(data) > 5000


@pytest.mark.parametrize("points", [[], [Point("empty", 0, 1.0)]])
def test_scatter_needs_sizes(points: list[Point], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs points"):
        scatter(points, tmp_path / "plot.png")


def test_the_area_of_a_marker_is_proportional_to_the_latency() -> None:
    areas = _plots._areas([0.5, 2.0])
    assert areas(2.0) == 4 * areas(0.5)
    assert _plots._areas([0.5, None])(0.5) == _plots._areas([None])(None)


@pytest.mark.parametrize(
    ("low", "high", "numbers"),
    [
        (0.15, 2.5, [0.2, 0.5, 2]),
        (0.37, 0.37, [0.5]),
        (10, 10, [10]),
        (0.9, 1000, [1, 20, 1000]),
        (1e-3, 3e-3, [0.001, 0.002]),
    ],
)
def test_the_legend_has_round_numbers(low: float, high: float, numbers: list[float]) -> None:
    assert _plots._round_numbers(low, high) == numbers
