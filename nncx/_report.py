"""``nncx.report``: what a network costs, measured layer by layer."""

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, nullcontext
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

from nncx import _files
from nncx._modes import evaluated
from nncx._store import saved_temporarily
from nncx._table import elide, markdown_table, text_table
from nncx.nn import PackedLayer

WARM_UP = 3  # runs before any is timed: allocator, thread pool, choice of kernels


@dataclass(frozen=True)
class Row:
    """Cost of one layer, or of the whole network.

    Attributes:
        name: Path in ``named_modules()``; ``"total"`` for the whole.
        type: Class name.
        precision: ``"float32"``, ``"binary"``, ...; ``"binary (unfrozen)"`` while the float weights
            are still there; ``"mixed"`` for a whole with several.
        parameters: Logical parameters: a packed layer counts the weights that it stands for (its
            geometry says how many), pruned and shared ones too, and its bias.
        bytes: What is stored, buffers (codebooks, scales, running statistics) included: in the file
            if one was named, else in ``state_dict``.
        bits_per_weight: Bits of those bytes per parameter; ``None`` where there is no parameter.
        macs: Multiply-accumulates *per sample* of convolutions and linear layers.
        latency_ms: Median milliseconds *per batch*; ``None`` for a layer that was not called.
    """

    name: str
    type: str
    precision: str
    parameters: int
    bytes: int
    bits_per_weight: float | None
    macs: int
    latency_ms: float | None


@dataclass(frozen=True)
class Report:
    """Measured cost of a network; ``str(report)`` is a plain table of at most 100 columns.

    Attributes:
        layers: One row per module that itself owns parameters or buffers. Its latency includes the
            hooks that measure it and its submodules, and what owns nothing (activations, pooling,
            functions) has no row: the latencies do not add up to the total.
        total: The whole network, timed on its own, without hooks. With a file its bytes are the
            file's: those of the layers and of the header.
        macs: Multiply-accumulates per sample, by precision.
        batch, device, threads, repeats: How the latencies were measured.
        file_bytes: Size of the file, if one was named.
        header_bytes: What of it is in no tensor: names, architecture, digest.
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
    header_bytes: int | None = None
    baseline: "Report | None" = None

    @property
    def ratios(self) -> dict[str, float]:
        """Baseline over this network: above 1 means smaller or faster.

        Empty without a baseline; a ratio with a zero or an unknown side is left out, and that of
        bytes where one side is a file and the other is not.
        """
        if self.baseline is None:
            return {}
        before, after = self.baseline, self
        pairs = {
            "parameters": (before.total.parameters, after.total.parameters),
            "bytes": (before.total.bytes, after.total.bytes),
            "macs": (before.total.macs, after.total.macs),
            "latency": (before.total.latency_ms, after.total.latency_ms),
        }
        if (before.file_bytes is None) != (after.file_bytes is None):
            del pairs["bytes"]
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
        table = markdown_table([header, *rows], texts=3)
        return "\n\n".join((table, *self._notes()))

    def __str__(self) -> str:
        header, *rows = self._cells()
        cells = [header, *([name, elide(kind, 16), *rest] for name, kind, *rest in rows)]
        return "\n".join((text_table(cells, texts=3, footer=True), "", *self._notes()))

    def _cells(self) -> list[list[str]]:
        """Header, layers, perhaps that of the file, total: 3 columns of text, 5 of numbers."""
        header = ["layer", "type", "precision", "parameters", "bytes", "bits", "MACs", "ms"]
        cells = [header, *map(_cells_of, self.layers)]
        if self.header_bytes is not None:
            cells.append(["(header)", "", "", "", f"{self.header_bytes:,}", "", "", ""])
        return [*cells, _cells_of(self.total)]

    def _notes(self) -> Iterator[str]:
        yield (
            f"MACs per sample; ms per batch of {self.batch}, median of {self.repeats} runs on "
            f"{self.device}, CPU threads: {self.threads}"
        )
        if len(self.macs) > 1:
            yield "MACs: " + ", ".join(f"{_short(n)} {name}" for name, n in self.macs.items())
        stored_in = "state dict" if self.file_bytes is None else "file"
        yield f"bytes, and bits per parameter, as stored in the {stored_in}"
        if self.baseline is not None:
            ratios = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in self.ratios.items())
            yield f"{self.baseline.total.type} (baseline) over this: {ratios}"


def _cells_of(row: Row) -> list[str]:
    return [row.name or "(itself)", row.type, row.precision, *figures(row)]


def figures(row: Row) -> list[str]:
    """Parameters, bytes, bits, MACs and milliseconds as a table has them."""
    return [
        f"{row.parameters:,}",
        f"{row.bytes:,}",
        "-" if row.bits_per_weight is None else f"{row.bits_per_weight:.2f}",
        _short(row.macs),
        "-" if row.latency_ms is None else f"{row.latency_ms:.3f}",
    ]


def report(
    model: nn.Module,
    example: Tensor | tuple[Tensor, ...],
    baseline: nn.Module | Report | None = None,
    *,
    repeats: int = 20,
    file: str | os.PathLike | None = None,
) -> Report:
    """Measure what ``model`` costs on ``example``, per layer and in total.

    Bytes are those of ``file`` or else of ``state_dict``, MACs follow from the shapes that passed
    through the layers, latencies are wall-clock medians, device-synchronised; model and baseline
    take turns. The model runs in eval mode without gradients; its modes and hooks are left as they
    were. Report the original of a compiled model: compilation hides the layers.

    Args:
        model: Any network, on one device.
        example: Input batch (a tuple for several inputs), on the model's device.
        baseline: Network or report to compare with; a network is measured on the same example and,
            if there is a ``file``, saved to a temporary one.
        repeats: Timed runs for the total, and again for the layers.
        file: File that ``nncx.save`` wrote of the network. Each layer counts what it takes there,
            and what no layer does, the header, is a line of its own: the sum is the file's size.

    Raises:
        ValueError: If ``repeats`` is not positive, the example holds no sample, or ``file`` is not
            whole or holds other tensors than the network.
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
    if not isinstance(baseline, nn.Module):
        (this,) = measure([model], [file], inputs, repeats)
        return replace(this, baseline=baseline)
    with nullcontext() if file is None else saved_temporarily(baseline) as baseline_file:
        files = [file, baseline_file]
        this, baseline = measure([model, baseline], files, inputs, repeats)
    return replace(this, baseline=baseline)


def measure(
    models: Sequence[nn.Module],
    files: Sequence[str | os.PathLike | None],
    inputs: tuple[Tensor, ...],
    repeats: int,
) -> list[Report]:
    """A report of each model, perhaps with its file; for the latencies they take turns."""
    stored = [_stored_bytes(*pair) for pair in zip(models, files, strict=True)]
    with ExitStack() as modes, torch.no_grad():
        for model in models:
            modes.enter_context(evaluated(model))
        latencies = latency(models, inputs, repeats)
        return [
            _profile(model, *sizes, inputs, repeats, latency)
            for model, sizes, latency in zip(models, stored, latencies, strict=True)
        ]


def _profile(
    model: nn.Module,
    stored: Counter[str],
    header_bytes: int | None,
    inputs: tuple[Tensor, ...],
    repeats: int,
    latency_ms: float,
) -> Report:
    layers = _layers(model)
    parameters = _parameters(layers)
    macs, latencies = _macs(model, layers, inputs), _latencies(model, layers, inputs, repeats)
    batch, device = inputs[0].shape[0], inputs[0].device
    rows = tuple(
        Row(
            name=name,
            type=type(layer).__name__,
            precision=_precision(layer),
            parameters=parameters[name],
            bytes=stored[name],
            bits_per_weight=_bits_per_weight(stored[name], parameters[name]),
            macs=macs[name] // batch,
            latency_ms=latencies.get(name),
        )
        for name, layer in layers.items()
    )
    macs_by_precision: Counter[str] = Counter()
    for row in rows:
        macs_by_precision[row.precision] += row.macs
    precisions = {row.precision for row in rows}
    all_bytes, all_parameters = stored.total() + (header_bytes or 0), parameters.total()
    return Report(
        layers=rows,
        total=Row(
            name="total",
            type=type(model).__name__,
            precision="mixed" if len(precisions) > 1 else "".join(precisions),
            parameters=all_parameters,
            bytes=all_bytes,
            bits_per_weight=_bits_per_weight(all_bytes, all_parameters),
            macs=macs_by_precision.total(),
            latency_ms=latency_ms,
        ),
        macs={name: count for name, count in macs_by_precision.items() if count},
        batch=batch,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        threads=torch.get_num_threads(),
        repeats=repeats,
        file_bytes=None if header_bytes is None else all_bytes,
        header_bytes=header_bytes,
    )


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that themselves own parameters or buffers, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if is_parametrized(module)
        or any(True for _ in chain(module.parameters(recurse=False), module.buffers(recurse=False)))
    }


def _stored_bytes(
    model: nn.Module, file: str | os.PathLike | None
) -> tuple[Counter[str], int | None]:
    """Bytes by module, and those of the file's header; a shared tensor counts for the first."""
    tensors: dict[int, tuple[str, Tensor]] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if isinstance(value, Tensor):
            tensors.setdefault(id(value), (name, value))
    sizes = {name: tensor.nbytes for name, tensor in tensors.values()}
    header_bytes = None
    if file is not None:
        held, metadata = _files.read(file)
        in_file = {name: tensor.nbytes for name, tensor in held.items()}
        if fault := _difference(sizes, in_file, metadata.get("coded", ())):
            raise ValueError(
                f"report: the file must hold the tensors of the model, got {os.fspath(file)}, where"
                f" {fault}; save the model as it is"
            )
        sizes, header_bytes = in_file, Path(file).stat().st_size - sum(in_file.values())
    stored: Counter[str] = Counter()
    for name, size in sizes.items():
        stored[name.rpartition(".")[0]] += size
    return stored, header_bytes


def _difference(
    sizes: dict[str, int], in_file: dict[str, int], coded: Collection[str]
) -> str | None:
    """The first tensor by name that a file has not as a model has it; `coded` ones may be short."""
    for name in sorted(sizes.keys() | in_file.keys()):
        if name not in in_file:
            return f"'{name}' is missing"
        if name not in sizes:
            return f"'{name}' is too many"
        if sizes[name] != in_file[name] and name not in coded:
            return f"'{name}' is of another size"
    return None


def _parameters(layers: dict[str, nn.Module]) -> Counter[str]:
    """Logical parameters by layer; one shared by several counts for the first."""
    counts: Counter[str] = Counter()
    seen: set[nn.Parameter] = set()
    for name, layer in layers.items():
        own = dict(layer.named_parameters(recurse=False))
        new = {key: parameter for key, parameter in own.items() if parameter not in seen}
        seen.update(new.values())
        packed = isinstance(layer, PackedLayer) and not is_parametrized(layer)
        if packed and own.get("weight") is new.get("weight"):  # not tied to an earlier one
            new = {"bias": new["bias"]} if "bias" in new else {}
            counts[name] = _weights(layer)
        counts[name] += sum(parameter.numel() for parameter in new.values())
    return counts


def _bits_per_weight(stored: int, parameters: int) -> float | None:
    return 8 * stored / parameters if parameters else None


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
