"""Checks an op, times it in turns with its rivals, and prints one line a shape.

A rival runs in the same process, on the same tensors and threads, under torch.inference_mode. In
every round each contender has one turn: a call to warm its caches, then as many calls as fill
TURN_SECONDS. A time is the median over the rounds. A ratio is the median of the ratios within a
round, so that a clock or a neighbour that changes slowly cancels; the order reverses from round to
round. The rival that counts is the fastest one; where rivals are of several kinds ("float32:nchw",
"quantized:onednn"), the fastest of each kind. Behind the shapes stands the geometric mean of their
ratios. A wrong result gets no time, and exit code 1.
"""

import argparse
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import geometric_mean, median
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nncx import _C
from nncx._machine import describe

ROUNDS = 21
TURN_SECONDS = 0.005
MM_SIZE = 512  # of the torch.mm that stands for the speed of the machine

COLUMNS = ("shape", "time", "rate", "against the fastest rival", "of the limit")


class WrongResult(AssertionError):
    """An op that does not give what its reference gives."""


@dataclass(frozen=True)
class Case:
    """One shape of a benchmark, ready to run.

    Attributes:
        ours: The call that is timed.
        rivals: What it is compared with, by the names that the line prints.
        reference: Gives the same values as `ours`, to the bit or within `tolerance`.
        work: MACs or bytes of one call.
        tolerance: How far a value may be off, as a share of the largest in the reference.
        limits: As those of the benchmark, and instead of them.
    """

    ours: Callable[[], Tensor]
    rivals: dict[str, Callable[[], Tensor]]
    reference: Callable[[], Tensor]
    work: int
    tolerance: float = 0.0
    limits: Mapping[str, float] | None = None

    def check(self) -> None:
        """Raises WrongResult unless `ours` gives what `reference` gives."""
        result, expected = self.ours(), self.reference()
        if result.shape != expected.shape:
            raise WrongResult(f"shape {[*result.shape]}, the reference has {[*expected.shape]}")
        bound = self.tolerance * expected.abs().amax()
        wrong = int(((result != expected) & ~((result - expected).abs() <= bound)).sum())
        if wrong:
            raise WrongResult(f"{wrong} of {expected.numel()} values differ from the reference")


class Measurement(NamedTuple):
    """What a shape's line says behind its name, and the ratio to the fastest rival of each kind."""

    cells: list[str]
    ratios: dict[str, float]


@dataclass(frozen=True)
class Benchmark:
    """An op, its shapes and its rivals.

    Attributes:
        name: The op.
        unit: Unit of `Case.work` per nanosecond.
        rival: What the rivals are, together; of those of a kind the kind says it.
        shapes: Anything whose `str` names it in a line.
        prepare: Makes the case of a shape, for the CPU path that is active.
        limits: What a path could reach at most, as a multiple of the rate of torch.mm.
    """

    name: str
    unit: str
    rival: str
    shapes: Sequence[Any]
    prepare: Callable[[Any], Case]
    limits: Mapping[str, float] = field(default_factory=dict)

    def measure(self, shape: Any, rounds: int) -> Measurement:
        """Checks and times one shape.

        Raises:
            WrongResult: before anything is timed.
        """
        torch.manual_seed(0)
        case = self.prepare(shape)
        case.check()
        contenders = {"ours": case.ours, **case.rivals}
        limit = (self.limits if case.limits is None else case.limits).get(_C.isa())
        if limit:
            contenders["mm"] = _matmul()
        seconds = take_turns(contenders, rounds)

        time = median(seconds["ours"])
        rivals = ", ".join(f"{name} {_ms(median(seconds[name]))}" for name in case.rivals)
        ratios = {
            kind or self.rival: _median_ratio(seconds[_fastest(names, seconds)], seconds["ours"])
            for kind, names in _by_kind(case.rivals).items()
        }
        cells = [
            _ms(time),
            f"{_digits(case.work / time / 1e9, 3)} {self.unit}",
            f"{_ratios_text(ratios)} ({rivals})",
        ]
        if limit:
            of_mm = _median_ratio(seconds["mm"], seconds["ours"]) * case.work / MM_SIZE**3
            cells.append(f"{of_mm / limit:.0%} of {limit}x torch.mm")
        return Measurement(cells, ratios)


def _by_kind(rivals: Iterable[str]) -> dict[str, list[str]]:
    """The rivals of each kind; "" is that of rivals without one."""
    kinds: dict[str, list[str]] = {}
    for name in rivals:
        kinds.setdefault(name.rpartition(":")[0], []).append(name)
    return kinds


def _fastest(names: Iterable[str], seconds: Mapping[str, Sequence[float]]) -> str:
    return min(names, key=lambda name: median(seconds[name]))


def _ratios_text(ratios: Mapping[str, float]) -> str:
    return ", ".join(f"{_digits(ratio, 2)}x {rival}" for rival, ratio in ratios.items())


def take_turns(contenders: dict[str, Callable[[], Tensor]], rounds: int) -> dict[str, list[float]]:
    """Seconds of one call, per contender and round."""
    calls = {name: _calls_in_a_turn(run) for name, run in contenders.items()}
    seconds = {name: [] for name in contenders}
    order = list(contenders)
    for _ in range(rounds):
        for name in order:
            seconds[name].append(_turn(contenders[name], calls[name]))
        order.reverse()
    return seconds


def _turn(run: Callable[[], Tensor], calls: int) -> float:
    run()
    start = perf_counter()
    for _ in range(calls):
        run()
    return (perf_counter() - start) / calls


def _calls_in_a_turn(run: Callable[[], Tensor]) -> int:
    return max(1, round(TURN_SECONDS / min(_turn(run, 1) for _ in range(3))))


def _matmul() -> Callable[[], Tensor]:
    a, b = torch.randn(2, MM_SIZE, MM_SIZE)
    return lambda: torch.mm(a, b)


def _median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    return median(n / d for n, d in zip(numerators, denominators, strict=True))


def _digits(value: float, significant: int) -> str:
    """`value` with that many significant digits, never in scientific notation."""
    decimals = significant - 1 - math.floor(math.log10(value))
    return f"{value:.{max(0, decimals)}f}"


def _ms(seconds: float) -> str:
    return f"{_digits(seconds * 1e3, 3)} ms"


def main(benchmark: Benchmark, arguments: Sequence[str] | None = None) -> int:
    """The command line of a benchmark; returns the exit code: 1 if a result is wrong."""
    options = _options(benchmark, arguments)
    shapes = [shape for shape in benchmark.shapes if options.shapes in str(shape)]
    if not shapes:
        raise SystemExit(f"{benchmark.name}: no shape contains {options.shapes!r}")
    correct = True
    for isa in options.isa:
        for threads in options.threads:
            with _running_on(isa, threads), torch.inference_mode():
                correct &= _run(benchmark, shapes, options.rounds, options.markdown)
    return 0 if correct else 1


def _options(benchmark: Benchmark, arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=f"Times {benchmark.name} against its rivals.")
    parser.add_argument("--threads", type=_positive, nargs="+", default=[torch.get_num_threads()])
    parser.add_argument("--isa", nargs="+", choices=_C.supported_isas(), default=[_C.isa()])
    parser.add_argument("--shapes", default="", metavar="TEXT", help="those whose name contains it")
    parser.add_argument("--rounds", type=_positive, default=ROUNDS)
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="append the results to it")
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


@contextmanager
def _running_on(isa: str, threads: int) -> Iterator[None]:
    before = _C.isa(), torch.get_num_threads()
    try:
        _C.set_isa(isa)
        torch.set_num_threads(threads)
        yield
    finally:
        _C.set_isa(before[0])
        torch.set_num_threads(before[1])


def _run(benchmark: Benchmark, shapes: Sequence[Any], rounds: int, markdown: Path | None) -> bool:
    header = f"{describe()}; median of {rounds} round{'s' * (rounds != 1)}"
    print(header)
    width = max(len(str(shape)) for shape in shapes)
    rows, ratios, correct = [], {}, True
    for shape in shapes:
        try:
            cells, of_shape = benchmark.measure(shape, rounds)
        except WrongResult as wrong:
            cells, of_shape, correct = [f"wrong: {wrong}"], {}, False
        for rival, ratio in of_shape.items():
            ratios.setdefault(rival, []).append(ratio)
        name = f"{benchmark.name}  {shape}  {_C.isa()}"
        padding = " " * (width - len(str(shape)))
        print(" | ".join([name + padding, *cells]), flush=True)
        rows.append([str(shape), *cells])
    means = {rival: geometric_mean(values) for rival, values in ratios.items()}
    footer = f"geometric mean of {len(rows)} shapes: {_ratios_text(means)}"
    if len(rows) > 1 and means:
        print(footer)
        rows.append([footer])
    if markdown:
        with markdown.open("a") as file:
            file.write(_as_markdown(benchmark.name, header, rows))
    return correct


def _as_markdown(name: str, header: str, rows: Sequence[Sequence[str]]) -> str:
    columns = COLUMNS[: max(map(len, rows))]
    padded = [[*row, *[""] * (len(columns) - len(row))] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *padded)]
    return "\n".join([f"## {name}", "", header, "", *lines, "", ""])
