"""Post-training quantization: from a float network and some batches to one of int8 layers."""

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from nncx._table import text_table
from nncx.compress._batches import inputs_of
from nncx.compress._counterpart import check_no_hooks, check_weight
from nncx.compress._fold import fold_batch_norm
from nncx.compress._skip import Skip, names_of, skipped
from nncx.compress.int8 import Int8
from nncx.compress.observers import MinMax, Observer
from nncx.graph import Graph, trace
from nncx.nn import PackedLayer


def quantize(
    model: nn.Module,
    batches: Iterable[Any],
    observer: Observer | None = None,
    *,
    skip: Skip | None = None,
    per_channel: bool = True,
    symmetric: bool = False,
) -> Graph:
    """The network that `model` is in eval mode, in int8, without any training.

    The model is traced (`nncx.graph.trace`), BatchNorms are folded into the layers before them, the
    batches run through the float graph while observers watch the input of every layer, and each
    `nn.Conv2d` and `nn.Linear` becomes an `nncx.Int8Conv2d` or `nncx.Int8Linear` with that range.
    Between the layers values are float. `nncx.freeze` the result to store it in int8; it trains on,
    too. A file holds the graph, so that `nncx.load` does not need the class of the model.

    Args:
        model: any convolutional network or perceptron that can be traced, or its graph, with one
            input; not changed.
        batches: 128 to 1024 samples are enough, in batches: inputs, or tuples as of a data loader,
            whose first item is the input. Read once, one batch at a time.
        observer: how a range follows from values, one of `nncx.compress.observers`: MinMax (the
            default), MovingAverage, Percentile, Entropy, MSE.
        skip: layers that stay float, by name (of a layer, or of a block for all inside), or a
            predicate of (name, layer). Default: none.
        per_channel: a scale of the weight for each output channel, or one for each layer.
        symmetric: whether inputs have the zero point 0.

    Returns:
        A new graph in eval mode that shares nothing with the model.

    Raises:
        ValueError: if there is no batch, a batch holds or leads to NaN or infinity, the model
            cannot be traced, a layer has hooks or a reparametrised weight, nothing is left to
            quantize, or `skip` names what is not there.
        TypeError: if a batch holds no tensor.

    Paper: Jacob et al., "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference", CVPR 2018; Krishnamoorthi, "Quantizing deep convolutional
    networks for efficient inference", 2018.
    """
    first, inputs = inputs_of(batches, "quantize")
    graph = _float_graph(model, first, "quantize")
    method = Int8(per_channel=per_channel, symmetric=symmetric)
    swaps = _calibrated(graph, inputs, observer or MinMax(), method, skip, "quantize")
    _put(graph, swaps)
    return graph


def vanhoucke(model: nn.Module, batches: Iterable[Any]) -> Graph:
    """`quantize` as in the first paper: a scale for each layer's weight, the input layer float.

    Activations take all 256 codes from their least to their largest value, which for the paper's
    sigmoids is about 0 to 1.

    Args, Returns, Raises: as `quantize`.

    Paper: Vanhoucke, Senior and Mao, "Improving the speed of neural networks on CPUs", 2011.
    """
    first, inputs = inputs_of(batches, "vanhoucke")
    graph = _float_graph(model, first, "vanhoucke")
    input_layer = [name for name, layer in graph.named_layers().items() if Int8().replaces(layer)]
    return quantize(graph, inputs, MinMax(), skip=input_layer[:1], per_channel=False)


@dataclass(frozen=True)
class SensitivityRow:
    """What quantizing one layer does to the network.

    Attributes:
        name: path of the layer; "all" for the network with every layer quantized.
        type: its class.
        weights: how many it has.
        snr_db: signal to noise of the network's output in decibels, `10 log10(sum y^2 / sum (y -
            y_q)^2)` over all batches; infinite where not a bit differs.
        metric: what the user's function gives for the network; None without one.
    """

    name: str
    type: str
    weights: int
    snr_db: float
    metric: float | None


@dataclass(frozen=True)
class Sensitivity:
    """How much each layer suffers from int8; `str` is a table.

    Attributes:
        layers: in order of execution.
        total: of the network with all of them quantized.
        metric: of the float network, if a function was given.
    """

    layers: tuple[SensitivityRow, ...]
    total: SensitivityRow
    metric: float | None

    def __str__(self) -> str:
        header = ["layer", "type", "weights", "SNR (dB)"]
        lines = [
            [row.name, row.type, f"{row.weights:,}", f"{row.snr_db:.1f}"]
            + ([] if row.metric is None else [f"{row.metric:.4g}"])
            for row in (*self.layers, self.total)
        ]
        if self.metric is None:
            return text_table([header, *lines], texts=2, footer=True)
        table = text_table([[*header, "metric"], *lines], texts=2, footer=True)
        return f"{table}\n\nmetric of the float network: {self.metric:.4g}"


def sensitivity(
    model: nn.Module,
    batches: Iterable[Any],
    observer: Observer | None = None,
    *,
    skip: Skip | None = None,
    per_channel: bool = True,
    symmetric: bool = False,
    metric: Callable[[nn.Module], float] | None = None,
) -> Sensitivity:
    """What `quantize` with the same arguments costs, layer by layer: with that layer alone in int8.

    Layers with a low ratio are those to `skip`.

    Args:
        batches: as for `quantize`; all are kept, with the float network's outputs.
        metric: a figure of a network, such as its error on validation data.

    Raises:
        ValueError, TypeError: as `quantize`.
    """
    first, inputs = inputs_of(batches, "sensitivity")
    kept = list(inputs)
    graph = _float_graph(model, first, "sensitivity")
    method = Int8(per_channel=per_channel, symmetric=symmetric)
    swaps = _calibrated(graph, kept, observer or MinMax(), method, skip, "sensitivity")
    wanted = _outputs(graph, kept)

    def row(name: str, kind: str, layers: dict[nn.Module, nn.Module]) -> SensitivityRow:
        _put(graph, layers)
        weights = sum(layer.weight.numel() for layer in layers)
        snr = _snr_db(wanted, _outputs(graph, kept))
        figure = None if metric is None else float(metric(graph))
        _put(graph, {new: old for old, new in layers.items()})
        return SensitivityRow(name, kind, weights, snr, figure)

    names = names_of(graph)
    return Sensitivity(
        layers=tuple(row(names[old][0], type(old).__name__, {old: swaps[old]}) for old in swaps),
        total=row("all", type(graph).__name__, swaps),
        metric=None if metric is None else float(metric(graph)),
    )


def _float_graph(model: nn.Module, example: Tensor, task: str) -> Graph:
    graph = model if _is_flat(model) else trace(model, example)
    for name, layer in graph.named_layers().items():
        check_weight(layer, name, task)
        check_no_hooks(layer, name, task)
    return fold_batch_norm(copy.deepcopy(graph).eval(), example)


def _is_flat(model: nn.Module) -> bool:
    """Whether it is a graph all of whose layers are nodes: those that `nncx.LowRank` puts in the
    place of one are a network of their own."""
    return isinstance(model, Graph) and not any(
        isinstance(layer, nn.Sequential) for layer in model.named_layers().values()
    )


def _calibrated(
    graph: Graph,
    inputs: Iterable[Tensor],
    observer: Observer,
    method: Int8,
    skip: Skip | None,
    task: str,
) -> dict[nn.Module, nn.Module]:
    """For each layer of the float graph to be quantized, in order of execution, that of int8."""
    names = names_of(graph)
    kept = skipped(names, skip or (), task)
    layers = dict.fromkeys(graph.named_layers().values())
    targets = [layer for layer in layers if method.replaces(layer) and layer not in kept]
    if not targets:
        compressed = any(isinstance(layer, PackedLayer) for layer in layers)
        raise ValueError(
            f"{task}: the model must have a Conv2d or Linear that is not skipped, got none; pass"
            + (" the float model, not one that is compressed" if compressed else " another skip")
        )
    observers = {layer: observer.new(names[layer][0]) for layer in targets}
    hooks = [
        layer.register_forward_pre_hook(lambda layer, args: observers[layer].observe(args[0]))
        for layer in targets
    ]
    try:
        with torch.no_grad():
            for each in inputs:
                graph(each)
    finally:
        for hook in hooks:
            hook.remove()
    return {
        layer: _int8(layer, names[layer][0], seen, method, task)
        for layer, seen in observers.items()
    }


def _int8(layer: nn.Module, name: str, seen: Observer, method: Int8, task: str) -> nn.Module:
    try:
        new = method.replace(layer)
    except ValueError as error:
        raise ValueError(f"{task}: '{name}' cannot be int8 ({error}); skip it") from error
    new.set_input_range(*seen.range(method.symmetric))
    if reason := new.why_not_freezable():
        raise ValueError(f"{task}: '{name}' {reason}")
    return new


def _put(graph: Graph, swaps: dict[nn.Module, nn.Module]) -> None:
    """Layers in the place of others, under all names that the nodes call them by."""
    for path, layer in graph.named_layers().items():
        if layer in swaps:
            graph.put_layer(path, swaps[layer])


@torch.no_grad()
def _outputs(graph: Graph, inputs: list[Tensor]) -> list[tuple[Tensor, ...]]:
    outputs = (graph(each) for each in inputs)
    return [each if isinstance(each, tuple) else (each,) for each in outputs]


def _snr_db(wanted: list[tuple[Tensor, ...]], got: list[tuple[Tensor, ...]]) -> float:
    signal = noise = 0.0
    for y, y_q in zip(chain(*wanted), chain(*got), strict=True):
        signal += y.double().square().sum().item()
        noise += (y.double() - y_q.double()).square().sum().item()
    if not noise:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf
