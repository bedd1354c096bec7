"""``nncx.compare``: what several networks cost, beside what they get wrong."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from nncx import _machine, _plots, _report
from nncx._plots import Point
from nncx._report import Report
from nncx._table import markdown_table, text_table


class Compared(NamedTuple):
    """One network of a comparison; `error` in percent, None where nobody measured it."""

    name: str
    report: Report
    error: float | None = None


@dataclass(frozen=True)
class Comparison:
    """Networks beside the first of them; ``str(comparison)`` is a plain table.

    Attributes:
        networks: in the order of the rows; all were timed on batches of one size, on one device.
    """

    networks: tuple[Compared, ...]

    def to_dict(self) -> dict:
        """Plain dicts, lists, strings and numbers, fit for ``json.dumps``."""
        return {
            "machine": _machine.describe(),
            "networks": [
                {
                    "name": name,
                    "error": error,
                    "report": report.to_dict(),
                    "ratios": self._ratios(report),
                }
                for name, report, error in self.networks
            ],
        }

    def to_markdown(self) -> str:
        """Table with a footer of how it was measured."""
        return "\n\n".join((markdown_table(self._cells(), texts=1), *self._notes()))

    def __str__(self) -> str:
        return "\n".join((text_table(self._cells(), texts=1), "", *self._notes()))

    def plot(self, path: str | os.PathLike) -> None:
        """Draw error over stored bytes, latency as the area of the marker, to ``path`` (PNG).

        Raises:
            ValueError: If the error of a network is not known, or it stores nothing.
            ImportError: If matplotlib is not installed.
        """
        for name, _, error in self.networks:
            if error is None:
                raise ValueError(
                    f"plot: every network needs an error, got none for '{name}'; pass it to"
                    " compare (nncx report: pass --data)"
                )
        points = [
            Point(name, report.total.bytes, error, report.total.latency_ms)
            for name, report, error in self.networks
        ]
        _plots.scatter(points, path)

    def _ratios(self, report: Report) -> dict[str, float]:
        """The first network over this one."""
        return replace(report, baseline=self.networks[0].report).ratios

    def _cells(self) -> list[list[str]]:
        header = ["", "error", "parameters", "bytes", "bits", "smaller", "MACs", "ms", "faster"]
        return [header, *map(self._line, self.networks)]

    def _line(self, compared: Compared) -> list[str]:
        name, report, error = compared
        parameters, size, bits, macs, ms = _report.figures(report.total)
        ratios = self._ratios(report)
        smaller, faster = (
            f"{ratios[which]:.2f}x" if which in ratios else "-" for which in ("bytes", "latency")
        )
        wrong = "-" if error is None else f"{error:.2f} %"
        return [name, wrong, parameters, size, bits, smaller, macs, ms, faster]

    def _notes(self) -> Iterator[str]:
        first, report, _ = self.networks[0]
        yield f"smaller, faster: than {first}; bits stored per parameter; MACs per sample"
        yield (
            f"ms per batch of {report.batch}, median of {report.repeats} runs on {report.device},"
            f" CPU threads: {report.threads}"
        )


def compare(networks: Iterable[tuple[str, Report] | tuple[str, Report, float]]) -> Comparison:
    """Put networks into one table and one plot.

        print(nncx.compare([("float", before, 1.6), ("ternary", after, 1.7)]))

    Args:
        networks: each a name, its `nncx.report`, and its error in percent if that is known. The
            others are compared with the first.

    Raises:
        ValueError: for no network, two of one name, or reports of other batches or devices.
    """
    compared = tuple(Compared(*each) for each in networks)
    if not compared:
        raise ValueError("compare: needs at least one network, got none")
    names = [each.name for each in compared]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"compare: names must differ, got {name!r} twice; rename one")
    measured = {(each.report.batch, each.report.device) for each in compared}
    if len(measured) > 1:
        raise ValueError(
            f"compare: reports must be of one batch size and device, got {sorted(measured)}; report"
            " all networks on the same example"
        )
    return Comparison(compared)
