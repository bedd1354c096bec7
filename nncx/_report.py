"""``nncx.report``: what a network costs, measured layer by layer."""

import importlib.util
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from math import prod
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from nncx._modes import evaluated
from nncx._table import elide, text_table

WARM_UP = 3  # runs before any is timed: allocator, thread pool, choice of kernels


@dataclass(frozen=True)
class Row:
    """Cost of one layer, or of the whole network.

    Attributes:
        name: Path in ``named_modules()``; ``"total"`` for the whole.
        type: Class name.
        precision: ``"float32"``, ``"binary"``, ...; ``"binary (unfrozen)"`` while the float weights
            are still there; ``"mixed"`` for a whole with several.
        parameters: Logical parameters: a packed layer counts its weights, not its bytes.
        bytes: What ``state_dict`` holds, buffers included.
        macs: Multiply-accumulates *per sample* of convolutions and linear layers.
        latency_ms: Median milliseconds *per batch*; ``None`` for a layer that was not called.
    """

    name: str
    type: str
    precision: str
    parameters: int
    bytes: int
    macs: int
    latency_ms: float | None


@dataclass(frozen=True)
class Report:
    """Measured cost of a network; ``str(report)`` is a plain table of at most 100 columns.

    Attributes:
        layers: One row per module that itself owns parameters or buffers. Its latency includes the
            hooks that measure it and its submodules, and what owns nothing (activations, pooling,
            functions) has no row: the latencies do not add up to the total.
        total: The whole network, timed on its own, without hooks.
        macs: Multiply-accumulates per sample, by precision.
        batch, device, threads, repeats: How the latencies were measured.
        file_bytes: Size of the file, if one was named.
        baseline: Report of the network compared with, if one was given.
    """

    layers: tuple[Row, ...]
    total: Row
    macs: dict[str, int]
    batch: int
    device: str
    threads: int
    repeats: int
    file_bytes: int | None = None
    baseline: "Report | None" = None

    @property
    def ratios(self) -> dict[str, float]:
        """Baseline over this network: above 1 means smaller or faster.

        Empty without a baseline; a ratio with a zero or an unknown side is left out.
        """
        if self.baseline is None:
            return {}
        before, after = self.baseline, self
        pairs = {
            "parameters": (before.total.parameters, after.total.parameters),
            "bytes": (before.total.bytes, after.total.bytes),
            "file": (before.file_bytes, after.file_bytes),
            "macs": (before.total.macs, after.total.macs),
            "latency": (before.total.latency_ms, after.total.latency_ms),
        }
        return {name: old / new for name, (old, new) in pairs.items() if old and new}

    def to_dict(self) -> dict:
        """Plain dicts, lists, strings and numbers, fit for ``json.dumps``."""
        return {
            **asdict(replace(self, baseline=None)),
            "layers": [asdict(row) for row in self.layers],
            "baseline": self.baseline.to_dict() if self.baseline else None,
            "ratios": self.ratios,
        }

    def to_markdown(self) -> str:
        """Table with a footer of how it was measured."""
        header, *rows = self._cells()
        lines = [header, ["---"] * 3 + ["---:"] * 4, *rows]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return "\n\n".join((table, *self._notes()))

    def __str__(self) -> str:
        header, *rows = self._cells()
        cells = [header, *([name, elide(kind, 16), *rest] for name, kind, *rest in rows)]
        return "\n".join((text_table(cells, texts=3, footer=True), "", *self._notes()))

    def _cells(self) -> list[list[str]]:
        """Header, layers, total: three columns of text, four of numbers."""
        return [
            ["layer", "type", "precision", "parameters", "bytes", "MACs", "ms"],
            *(
                [
                    row.name or "(itself)",
                    row.type,
                    row.precision,
                    f"{row.parameters:,}",
                    f"{row.bytes:,}",
                    _short(row.macs),
                    "-" if row.latency_ms is None else f"{row.latency_ms:.3f}",
                ]
                for row in (*self.layers, self.total)
            ),
        ]

    def _notes(self) -> Iterator[str]:
        yield (
            f"MACs per sample; ms per batch of {self.batch}, median of {self.repeats} runs on "
            f"{self.device}, CPU threads: {self.threads}"
        )
        if len(self.macs) > 1:
            yield "MACs: " + ", ".join(f"{_short(n)} {name}" for name, n in self.macs.items())
        if self.file_bytes is not None:
            yield f"file: {self.file_bytes:,} bytes"
        if self.baseline is not None:
            ratios = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in self.ratios.items())
            yield f"{self.baseline.total.type} (baseline) over this: {ratios}"


def report(
    model: nn.Module,
    example: Tensor | tuple[Tensor, ...],
    baseline: nn.Module | Report | None = None,
    *,
    repeats: int = 20,
    file: str | os.PathLike | None = None,
) -> Report:
    """Measure what ``model`` costs on ``example``, per layer and in total.

    Bytes are those of ``state_dict``, MACs follow from the shapes that passed through the layers,
    latencies are wall-clock medians, device-synchronised; model and baseline take turns. The model
    runs in eval mode without gradients; its modes and hooks are left as they were. Report the
    original of a compiled model: compilation hides the layers.

    Args:
        model: Any network, on one device.
        example: Input batch (a tuple for several inputs), on the model's device.
        baseline: Network or report to compare with; a network is measured on the same example.
        repeats: Timed runs for the total, and again for the layers.
        file: File that the network was saved to, whose size is reported.

    Raises:
        ValueError: If ``repeats`` is not positive or the example holds no sample.
        OSError: If ``file`` cannot be read.
    """
    inputs = example if isinstance(example, tuple) else (example,)
    if not inputs or not all(isinstance(each, Tensor) for each in inputs):
        raise ValueError(
            "report: the example must be a tensor or a tuple of tensors, got "
            f"{type(example).__name__} {[type(each).__name__ for each in inputs]}"
        )
    if repeats < 1:
        raise ValueError(f"report: repeats must be positive, got {repeats}: try 20")
    if inputs[0].dim() == 0 or inputs[0].shape[0] == 0:
        raise ValueError(
            "report: the example must be a batch of at least one sample, got shape "
            f"{tuple(inputs[0].shape)}: add a batch dimension"
        )
    file_bytes = None if file is None else Path(file).stat().st_size
    if isinstance(baseline, nn.Module):
        this, baseline = _measure([model, baseline], inputs, repeats)
    else:
        (this,) = _measure([model], inputs, repeats)
    return replace(this, file_bytes=file_bytes, baseline=baseline)


def scatter(points: Sequence[tuple[str, float, float]], path: str | os.PathLike) -> None:
    """Plot error over size and write it to ``path`` (PNG unless its suffix says otherwise).

    Args:
        points: ``(label, bytes, error in percent)``; bytes are positive, their axis logarithmic.
        path: File to write.

    Raises:
        ValueError: If there are no points or a size is not positive.
        ImportError: If matplotlib is not installed.
    """
    if not points or not all(size > 0 for _, size, _ in points):
        raise ValueError(
            f"scatter: needs points (label, bytes > 0, error %), got {list(points)}: "
            "take bytes from a report"
        )
    require_matplotlib()
    from matplotlib.figure import Figure  # without pyplot: no display, no global state
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(
        xscale="log", xlabel="stored bytes", ylabel="error (%)", title="error over size"
    )
    axes.scatter([size for _, size, _ in points], [error for *_, error in points], zorder=3)
    axes.margins(0.25, 0.15)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_formatter(EngFormatter(unit="B"))
    axes.grid(alpha=0.3)
    texts = [
        axes.annotate(label, (size, error), (6, 4), textcoords="offset points", fontsize=9)
        for label, size, error in sorted(points, key=lambda point: point[2])
    ]
    figure.draw_without_rendering()  # settles where the texts are
    for above, text in enumerate(texts):  # from below, each rises until it covers no other
        while any(
            text.get_window_extent().overlaps(lower.get_window_extent()) for lower in texts[:above]
        ):
            text.xyann = (text.xyann[0], text.xyann[1] + 3)
    figure.savefig(path, dpi=150)


def require_matplotlib() -> None:
    """Raises ImportError, in one sentence, where `scatter` could not plot."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError(
            "plots need matplotlib: pip install 'nncx[demo]' (in a checkout: pip install '.[demo]')"
        )


def _measure(models: Sequence[nn.Module], inputs: tuple[Tensor, ...], repeats: int) -> list[Report]:
    with ExitStack() as modes, torch.no_grad():
        for model in models:
            modes.enter_context(evaluated(model))
        latencies = latency(models, inputs, repeats)
        return [
            _profile(model, inputs, repeats, latency)
            for model, latency in zip(models, latencies, strict=True)
        ]


def _profile(
    model: nn.Module, inputs: tuple[Tensor, ...], repeats: int, latency_ms: float
) -> Report:
    layers = _layers(model)
    stored, parameters = _stored_bytes(model), _parameters(layers)
    macs, latencies = _macs(model, layers, inputs), _latencies(model, layers, inputs, repeats)
    batch, device = inputs[0].shape[0], inputs[0].device
    rows = tuple(
        Row(
            name=name,
            type=type(layer).__name__,
            precision=_precision(layer),
            parameters=parameters[name],
            bytes=stored[name],
            macs=macs[name] // batch,
            latency_ms=latencies.get(name),
        )
        for name, layer in layers.items()
    )
    macs_by_precision: Counter[str] = Counter()
    for row in rows:
        macs_by_precision[row.precision] += row.macs
    precisions = {row.precision for row in rows}
    return Report(
        layers=rows,
        total=Row(
            name="total",
            type=type(model).__name__,
            precision="mixed" if len(precisions) > 1 else "".join(precisions),
            parameters=sum(parameters.values()),
            bytes=sum(stored.values()),
            macs=sum(macs_by_precision.values()),
            latency_ms=latency_ms,
        ),
        macs={name: count for name, count in macs_by_precision.items() if count},
        batch=batch,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        threads=torch.get_num_threads(),
        repeats=repeats,
    )


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that themselves own parameters or buffers, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if is_parametrized(module)
        or any(True for _ in chain(module.parameters(recurse=False), module.buffers(recurse=False)))
    }


def _stored_bytes(model: nn.Module) -> Counter[str]:
    """Bytes in ``state_dict`` by module; a tensor shared by several counts for the first."""
    tensors: dict[int, tuple[str, Tensor]] = {}
    for key, value in model.state_dict(keep_vars=True).items():
        if isinstance(value, Tensor):
            tensors.setdefault(id(value), (key.rpartition(".")[0], value))
    stored: Counter[str] = Counter()
    for name, tensor in tensors.values():
        stored[name] += tensor.nbytes
    return stored


def _parameters(layers: dict[str, nn.Module]) -> dict[str, int]:
    """Logical parameters by layer; one shared by several counts for the first."""
    counts: dict[str, int] = {}
    seen: set[nn.Parameter] = set()
    for name, layer in layers.items():
        own = dict(layer.named_parameters(recurse=False))
        counts[name] = sum(parameter.numel() for parameter in set(own.values()) - seen)
        seen.update(own.values())
        if getattr(layer, "frozen", False) and "weight" not in own:  # packed into a buffer
            counts[name] += _weights(layer)
    return counts


def _weights(layer: nn.Module) -> int:
    """Weights of a convolution or linear layer, from its geometry; 0 for any other layer."""
    if all(hasattr(layer, n) for n in ("in_features", "out_features")):
        return layer.in_features * layer.out_features
    if all(hasattr(layer, n) for n in ("in_channels", "out_channels", "groups", "kernel_size")):
        return layer.out_channels * (layer.in_channels // layer.groups) * prod(layer.kernel_size)
    return 0


def _precision(layer: nn.Module) -> str:
    if precision := getattr(layer, "precision", None):
        return precision if getattr(layer, "frozen", True) else f"{precision} (unfrozen)"
    tensor = next(chain(layer.parameters(), layer.buffers()))
    return str(tensor.dtype).removeprefix("torch.")


def _macs(
    model: nn.Module, layers: dict[str, nn.Module], inputs: tuple[Tensor, ...]
) -> Counter[str]:
    """Multiply-accumulates of one run over the whole batch, by layer."""
    macs: Counter[str] = Counter()

    def count(name: str, layer: nn.Module, args: tuple, output: Tensor) -> None:
        # Every weight is used once per position: of the output, or of the input if transposed.
        if getattr(layer, "transposed", False):
            positions = args[0].numel() // layer.in_channels
        elif hasattr(layer, "out_features"):
            positions = output.numel() // layer.out_features
        else:
            positions = output.numel() // layer.out_channels
        macs[name] += _weights(layer) * positions

    with ExitStack() as hooks:
        for name, layer in layers.items():
            if _weights(layer):
                hook = partial(count, name)
                hooks.enter_context(layer.register_forward_hook(hook))
        model(*inputs)
    return macs


def latency(models: Sequence[nn.Module], inputs: tuple[Tensor, ...], repeats: int) -> list[float]:
    """Median milliseconds of a run of each model as it is: no hooks, no change of mode.

    The models take turns, so that a slow moment of the machine strikes all of them.
    """
    clock = _clock(inputs[0].device)
    times: list[list[float]] = [[] for _ in models]
    for _ in range(WARM_UP + repeats):
        for model, seconds in zip(models, times, strict=True):
            start = clock()
            model(*inputs)
            seconds.append(clock() - start)
    return [1e3 * median(seconds[WARM_UP:]) for seconds in times]


def _latencies(
    model: nn.Module, layers: dict[str, nn.Module], inputs: tuple[Tensor, ...], repeats: int
) -> dict[str, float]:
    """Median milliseconds by layer; a layer called several times in a run counts their sum."""
    clock = _clock(inputs[0].device)
    started: dict[str, float] = {}
    elapsed: Counter[str] = Counter()
    times: defaultdict[str, list[float]] = defaultdict(list)

    def start(name: str, *_: object) -> None:
        started[name] = clock()

    def stop(name: str, *_: object) -> None:
        elapsed[name] += clock() - started[name]

    with ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.enter_context(layer.register_forward_pre_hook(partial(start, name)))
            hooks.enter_context(layer.register_forward_hook(partial(stop, name), prepend=True))
        for _ in range(repeats):
            elapsed.clear()
            model(*inputs)
            for name, seconds in elapsed.items():
                times[name].append(seconds)
    return {name: 1e3 * median(seconds) for name, seconds in times.items()}


def _clock(device: torch.device) -> Callable[[], float]:
    if device.type == "cpu":
        return perf_counter

    def synchronised() -> float:
        torch.accelerator.synchronize(device)
        return perf_counter()

    return synchronised


def _short(count: int) -> str:
    """Four digits and a unit: 40551424 is ``40.55 M``."""
    if count < 1000:
        return str(count)
    power = min((len(str(count)) - 1) // 3, 4)
    return f"{count / 1000**power:.4g} {' kMGT'[power]}"
