"""Checks an op, times it in turns with its rivals, and prints one line a shape.

A rival runs in the same process, on the same tensors and threads, under torch.inference_mode. In
every round each contender has one turn: a call to warm its caches, then as many calls as fill
TURN_SECONDS. A time is the median over the rounds. A ratio is the median of the ratios within a
round, so that a clock or a neighbour that changes slowly cancels; the order reverses from round to
round. The rival that counts is the fastest one; where rivals are of several kinds ("float32:nchw",
"quantized:onednn"), the fastest of each kind. Behind the shapes stands the geometric mean of their
ratios. A wrong result gets no time, and exit code 1. cpu.py and gpu.py say what a call is on each.
"""

import argparse
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any, NamedTuple, Protocol

import torch
from cpu import Cpu
from gpu import Gpu
from roofline import Record, Roof, Work
from torch import Tensor

from nncx import _C

ROUNDS = 21
TURN_SECONDS = 0.005
MM_SIZE = 512  # of the torch.mm that stands for the speed of the machine

COLUMNS = ("shape", "time", "rate", "against the fastest rival", "of the limit")


class WrongResult(AssertionError):
    """An op that does not give what its reference gives."""


class Device(Protocol):
    """What a benchmark runs on.

    Attributes:
        name: "cpu" or "cuda".
        path: What stands behind a shape.
        roof: The limits of a GPU.
    """

    name: str
    path: str
    roof: Roof | None

    def active(self) -> AbstractContextManager[None]:
        """Runs on this device, inside."""

    def preparing(self) -> AbstractContextManager[None]:
        """New tensors are on this device, and references exact, inside."""

    def describe(self) -> str:
        """Machine and versions, to stand over the figures."""

    def copies(self, moved: int) -> int:
        """How many sets of tensors a contender runs on, if a call moves so many bytes."""

    def contender(self, runs: Sequence[Callable[[], object]]) -> Callable[[], object]:
        """All `runs` in one call."""

    def turn(self, run: Callable[[], object], calls: int) -> float:
        """Seconds of a call of a contender."""


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
        reads: The tensors that `ours` has to read, weights as they are packed in a file.
    """

    ours: Callable[[], Tensor]
    rivals: dict[str, Callable[[], Tensor]]
    reference: Callable[[], Tensor]
    work: int
    tolerance: float = 0.0
    limits: Mapping[str, float] | None = None
    reads: Sequence[Tensor] = ()

    def check(self) -> int:
        """The bytes that a call moves: those it reads, and those of its result.

        Raises:
            WrongResult: unless `ours` gives what `reference` gives.
        """
        result, expected = self.ours(), self.reference()
        if result.shape != expected.shape:
            raise WrongResult(f"shape {[*result.shape]}, the reference has {[*expected.shape]}")
        bound = self.tolerance * expected.abs().amax()
        wrong = int(((result != expected) & ~((result - expected).abs() <= bound)).sum())
        if wrong:
            raise WrongResult(f"{wrong} of {expected.numel()} values differ from the reference")
        return sum(tensor.nbytes for tensor in (*self.reads, result))


class Measurement(NamedTuple):
    """One shape.

    Attributes:
        cells: What its line says behind its name.
        ratios: To the fastest rival of each kind.
        seconds: Of a call.
        work: What a call had to do.
    """

    cells: list[str]
    ratios: dict[str, float]
    seconds: float
    work: Work


@dataclass(frozen=True)
class Benchmark:
    """An op, its shapes and its rivals.

    Attributes:
        name: The op.
        unit: "GMAC/s" or "GB/s": unit of `Case.work` per nanosecond.
        rival: What the rivals are, together; of those of a kind the kind says it.
        shapes: By device, anything whose `str` names it in a line.
        prepare: Makes the case of a shape, for the device and CPU path that are active.
        limits: What a CPU path could reach at most, as a multiple of the rate of torch.mm.
        peak: The unit of roofline.py that does the MACs on a GPU.
    """

    name: str
    unit: str
    rival: str
    shapes: Mapping[str, Sequence[Any]]
    prepare: Callable[[Any], Case]
    limits: Mapping[str, float] = field(default_factory=dict)
    peak: str = ""

    def measure(self, shape: Any, rounds: int, device: Device) -> Measurement:
        """Checks and times one shape.

        Raises:
            WrongResult: before anything is timed.
        """
        torch.manual_seed(0)
        with device.preparing():
            case = self.prepare(shape)
            moved = case.check()
            cases = [case, *(self.prepare(shape) for _ in range(device.copies(moved) - 1))]
        contenders = {"ours": device.contender([case.ours for case in cases])}
        for name in case.rivals:
            contenders[name] = device.contender([case.rivals[name] for case in cases])
        limit = (self.limits if case.limits is None else case.limits).get(device.path)
        if limit:
            contenders["mm"] = _matmul()
        seconds = {
            name: [turn / len(cases) for turn in turns]
            for name, turns in take_turns(contenders, rounds, device).items()
        }

        time = median(seconds["ours"])
        rivals = ", ".join(f"{name} {_ms(median(seconds[name]))}" for name in case.rivals)
        ratios = {
            kind or self.rival: _median_ratio(seconds[_fastest(names, seconds)], seconds["ours"])
            for kind, names in _by_kind(case.rivals).items()
        }
        work = Work(moved, 2 * case.work if self.peak else 0, self.peak)
        rate = _rate(work, time) if device.roof else f"{_per_ns(case.work, time)} {self.unit}"
        cells = [_ms(time), rate, f"{_ratios_text(ratios)} ({rivals})"]
        if device.roof:
            floor, unit = device.roof.floor(work)
            cells.append(f"{floor / time:.0%} of the {unit} roof")
        elif limit:
            of_mm = _median_ratio(seconds["mm"], seconds["ours"]) * case.work / MM_SIZE**3
            cells.append(f"{of_mm / limit:.0%} of {limit}x torch.mm")
        return Measurement(cells, ratios, time, work)


def _rate(work: Work, seconds: float) -> str:
    """Operations, or bytes read and written."""
    if work.operations:
        return f"{_per_ns(work.operations / 1e3, seconds)} TOP/s"
    return f"{_per_ns(work.moved, seconds)} GB/s"


def _per_ns(count: float, seconds: float) -> str:
    return _digits(count / seconds / 1e9, 3)


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


def take_turns(
    contenders: dict[str, Callable[[], object]], rounds: int, device: Device
) -> dict[str, list[float]]:
    """Seconds of one call, per contender and round."""
    calls = {name: _calls_in_a_turn(run, device) for name, run in contenders.items()}
    seconds = {name: [] for name in contenders}
    order = list(contenders)
    for _ in range(rounds):
        for name in order:
            seconds[name].append(device.turn(contenders[name], calls[name]))
        order.reverse()
    return seconds


def _calls_in_a_turn(run: Callable[[], object], device: Device) -> int:
    return max(1, round(TURN_SECONDS / min(device.turn(run, 1) for _ in range(3))))


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
    correct = True
    for device in _devices(options):
        shapes = [s for s in benchmark.shapes[device.name] if options.shapes in str(s)]
        if not shapes:
            raise SystemExit(f"{benchmark.name}: no shape contains {options.shapes!r}")
        with device.active(), torch.inference_mode():
            correct &= _run(benchmark, shapes, device, options)
    return 0 if correct else 1


def _options(benchmark: Benchmark, arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=f"Times {benchmark.name} against its rivals.")
    parser.add_argument("--device", choices=tuple(benchmark.shapes), default="cpu")
    parser.add_argument("--threads", type=_positive, nargs="+", help="of the CPU")
    parser.add_argument("--isa", nargs="+", choices=_C.supported_isas(), help="paths of the CPU")
    parser.add_argument("--shapes", default="", metavar="TEXT", help="those whose name contains it")
    parser.add_argument("--rounds", type=_positive, default=ROUNDS)
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="append the results to it")
    parser.add_argument(
        "--records", type=Path, metavar="FILE", help="append for roofline.py (with --device cuda)"
    )
    options = parser.parse_args(arguments)
    if options.device == "cuda" and (options.threads or options.isa):
        parser.error("--threads and --isa are of the CPU, got --device cuda; leave them out")
    if options.device == "cpu" and options.records:
        parser.error("--records needs the limits of a GPU, got --device cpu; use --markdown")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs an NVIDIA GPU that torch sees, found none")
    return options


def _devices(options: argparse.Namespace) -> list[Device]:
    if options.device == "cuda":
        return [Gpu()]
    isas = options.isa or [_C.isa()]
    return [Cpu(isa, n) for isa in isas for n in options.threads or [torch.get_num_threads()]]


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _run(
    benchmark: Benchmark, shapes: Sequence[Any], device: Device, options: argparse.Namespace
) -> bool:
    rounds = f"median of {options.rounds} round{'s' * (options.rounds != 1)}"
    header = f"{device.describe()}; {rounds}"
    print(header)
    width = max(len(str(shape)) for shape in shapes)
    rows, ratios, correct = [], {}, True
    file = options.markdown
    before = file.read_text() if file and file.exists() else ""

    def tell(row: list[str]) -> None:
        """At once, for a run that is stopped."""
        rows.append(row)
        if file:
            file.write_text(before + _as_markdown(benchmark.name, header, rows))

    for shape in shapes:
        try:
            measured = benchmark.measure(shape, options.rounds, device)
        except (WrongResult, RuntimeError) as error:  # a GPU may have too little memory for one
            kind = "wrong" if isinstance(error, WrongResult) else "failed"
            cells, correct = [f"{kind}: {str(error).splitlines()[0]}"], False
        else:
            cells = measured.cells
            for rival, ratio in measured.ratios.items():
                ratios.setdefault(rival, []).append(ratio)
            if options.records:
                record = Record(
                    benchmark.name, str(shape), measured.seconds, measured.work, device.roof
                )
                record.append_to(options.records)
        name = f"{benchmark.name}  {shape}  {device.path}"
        padding = " " * (width - len(str(shape)))
        print(" | ".join([name + padding, *cells]), flush=True)
        tell([str(shape), *cells])
    means = {rival: geometric_mean(values) for rival, values in ratios.items()}
    footer = f"geometric mean of {len(rows)} shapes: {_ratios_text(means)}"
    if len(rows) > 1 and means:
        print(footer)
        tell([footer])
    return correct


def _as_markdown(name: str, header: str, rows: Sequence[Sequence[str]]) -> str:
    columns = COLUMNS[: max(map(len, rows))]
    padded = [[*row, *[""] * (len(columns) - len(row))] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *padded)]
    return "\n".join([f"## {name}", "", header, "", *lines, "", ""])
