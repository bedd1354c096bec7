"""A graph with fewer channels: smaller layers of the same types, and the arguments that follow."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from nncx.graph._channels import Channels, LayerChannels
from nncx.graph._graph import Graph, Node

# Tensors of a layer that have an element for each channel.
_BY_CHANNEL = ("bias", "running_mean", "running_var")


def narrow(graph: Graph, channels: Channels, removed: Iterable[int]) -> Graph:
    """A copy of `graph` without the units `removed`, none of which is kept.

    Args:
        channels: what `follow` found in this graph.
    """
    stays = mask(channels, removed)
    result = copy.deepcopy(graph)
    layers = graph.named_layers()
    made: dict[nn.Module, nn.Module] = {}
    for path, layer in layers.items():
        found = channels.layers.get(layer)
        if found and not (stays[found.inputs].all() and stays[found.outputs].all()):
            made.setdefault(layer, _narrowed(layer, found, stays))
            result.put_layer(path, made[layer])
    for name, (before, after) in channels.moves.items():
        result.replace(_adapted(graph.node(name), before, after, stays))
    return result


def mask(channels: Channels, removed: Iterable[int]) -> Tensor:
    """For each unit whether it stays."""
    stays = torch.ones(channels.count, dtype=torch.bool)
    stays[list(removed)] = False
    return stays


def with_one_left(channels: Channels, removed: Iterable[int]) -> set[int]:
    """`removed` without those that some layer needs to have an input and an output at all."""
    removed = set(removed)
    for found in channels.layers.values():
        for units in (found.inputs, found.outputs):
            if removed.issuperset(units.tolist()):
                removed.discard(int(units[0]))
    return removed


def filters(layer: nn.Module) -> Tensor:
    """The weight of a layer that makes channels, or of a depthwise one, as `[out, in of a group,
    elements of the kernel]`."""
    weight = layer.weight.detach()
    if getattr(layer, "transposed", False):  # [in, out of a group, ...]
        grouped = weight.unflatten(0, (layer.groups, -1)).transpose(1, 2)
        return grouped.flatten(0, 1).flatten(2)
    return weight.flatten(2) if weight.dim() > 2 else weight.unsqueeze(2)


def inputs_of_a_group(layer: nn.Module, found: LayerChannels) -> Tensor:
    """The units of the inputs of a filter of `filters`, which are the same in all groups."""
    return found.inputs[: filters(layer).shape[1]]


def _narrowed(layer: nn.Module, found: LayerChannels, stays: Tensor) -> nn.Module:
    inputs, outputs = (stays[units].nonzero().flatten() for units in (found.inputs, found.outputs))
    result = copy.deepcopy(layer)
    if isinstance(layer, nn.Linear):
        result.in_features, result.out_features = len(inputs), len(outputs)
        weight = _at(layer.weight, outputs, inputs)
    elif isinstance(layer, nn.modules.conv._ConvNd):
        result.in_channels, result.out_channels = len(inputs), len(outputs)
        rows, columns = (inputs, outputs) if layer.transposed else (outputs, inputs)
        columns = columns[columns < layer.weight.shape[1]]  # those of the first group
        if not found.makes:  # a group is a channel
            result.groups = len(inputs)
            columns = torch.arange(layer.weight.shape[1])
        weight = _at(layer.weight, rows, columns)
    else:
        name = "num_parameters" if isinstance(layer, nn.PReLU) else "num_features"
        setattr(result, name, len(outputs))
        weight = None if layer.weight is None else _at(layer.weight, outputs)
    _replace(result, "weight", weight)
    for name in _BY_CHANNEL:
        if getattr(layer, name, None) is not None:
            _replace(result, name, _at(getattr(layer, name), outputs))
    return result


def _at(tensor: Tensor, rows: Tensor, columns: Tensor | None = None) -> Tensor:
    tensor = tensor.detach()[rows.to(tensor.device)]
    return tensor if columns is None else tensor[:, columns.to(tensor.device)]


def _replace(layer: nn.Module, name: str, value: Tensor | None) -> None:
    """A parameter or a buffer; a parameter learns if it did."""
    before = getattr(layer, name)
    if isinstance(before, nn.Parameter):
        value = nn.Parameter(value, before.requires_grad)
    setattr(layer, name, value)


def _adapted(node: Node, before: Tensor, after: Any, stays: Tensor) -> Node:
    """`node` with the arguments that do for fewer channels what it did before."""
    arguments = dict(node.arguments)
    if node.operation == "reshape":
        sizes = zip(arguments["shape"], _sizes(after, stays), strict=True)
        arguments["shape"] = tuple(-1 if old == -1 else new for old, new in sizes)
        return node._replace(arguments=arguments)
    dim, size = arguments.get("dim", 0), before.shape[arguments.get("dim", 0)]
    if _sizes(before, stays)[dim] == size:
        return node
    if node.operation == "slice":
        start, end, _ = slice(arguments.get("start"), arguments.get("end")).indices(size)
        left = [_sizes(before.narrow(dim, 0, edge), stays)[dim] for edge in (start, end)]
        return node._replace(arguments=arguments | {"start": left[0], "end": left[1]})
    parts = tuple(_sizes(each, stays)[dim] for each in after)
    found = {"split_sizes": parts, "dim": dim}
    return node._replace(operation="split_with_sizes", arguments=found)


def _sizes(units: Tensor, stays: Tensor) -> list[int]:
    """Of a value with these units, when only some stay."""
    left = stays[units]
    others = [[d for d in range(units.dim()) if d != dim] for dim in range(units.dim())]
    return [int(left.any(tuple(dims)).sum()) if dims else int(left.sum()) for dims in others]
