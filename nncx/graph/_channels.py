"""Channel dependencies of a graph: which channels can only be removed together, and which not.

Every channel that a layer makes has a number. A value of the graph is followed as a tensor of such
numbers in the shape of the value: each element says which channel it would vanish with. Operations
that move elements (concatenate, reshape, transpose, shuffle, split) are run on the numbers
themselves, so that a shuffle written as view, transpose and view needs no rule of its own. Where
two channels meet, as in an addition, they are tied: one cannot be removed without the other. A
*unit* is what is tied together, and has the number of one of its channels.

What a value keeps must be a block of it, so its numbers may differ along one dimension only. Where
a reshape would spread them over several, as the view of a shuffle does, those along the others are
tied. Groups of a convolution must stay equally large, so their channels are tied by position.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nncx._modes import evaluated
from nncx.graph._graph import Graph, Node
from nncx.graph._operations import GETITEM, LAYER, run

_CONVOLUTIONS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)
PRODUCERS = (*_CONVOLUTIONS, nn.Linear)  # whose output channels are sums over all their inputs
FOLLOWERS = (  # which have tensors for each channel that passes through
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
    nn.PReLU,
)


class LayerChannels(NamedTuple):
    """The units that the channels of a layer belong to, in order.

    Attributes:
        inputs, outputs: `[in]`, `[out]`; those of a follower are the same.
        makes: whether the outputs are channels of its own, not those that pass through.
        positions: how often each weight is used for one sample, over all calls.
    """

    inputs: Tensor
    outputs: Tensor
    makes: bool
    positions: int


class ChannelSet(NamedTuple):
    """Layers whose output channels are tied to each other.

    Attributes:
        layers: their paths in the graph, in order of execution.
        units: of their channels, in order of the first layer's, then of the second's...
        free: those of them that can be removed.
        reason: why the others cannot, the end of a sentence; None if all are free.
    """

    layers: tuple[str, ...]
    units: tuple[int, ...]
    free: tuple[int, ...]
    reason: str | None


class Channels(NamedTuple):
    """What `follow` finds in a graph.

    Attributes:
        layers: by layer, in order of execution. Those that are not here stay whole.
        kept: the units that cannot be removed, and why: the end of a sentence.
        moves: by the name of a node whose arguments may depend on numbers of channels, the units of
            the elements of its first input and of its value (or values).
        count: units are below it.
    """

    layers: dict[nn.Module, LayerChannels]
    kept: dict[int, str]
    moves: dict[str, tuple[Tensor, Any]]
    count: int


def follow(graph: Graph, inputs: tuple[Tensor, ...]) -> Channels:
    """The channel dependencies of `graph`, which is run once on the first sample of `inputs`."""
    with evaluated(graph), torch.no_grad():
        walk = _Walk(graph)
        walk.through([each[:1] for each in inputs])
    return walk.found()


def sets(graph: Graph, channels: Channels) -> list[ChannelSet]:
    """The layers that make channels, those with common units together, in order of execution."""
    paths = {layer: path for path, layer in reversed(graph.named_layers().items())}
    makers = {paths[m]: each.outputs for m, each in channels.layers.items() if each.makes}
    ties = _Ties()
    ties.new(channels.count)
    for units in makers.values():
        ties.tie(units[:1], units)
    together: dict[int, list[str]] = {}
    for path, units in makers.items():
        together.setdefault(int(ties.of(units[:1])), []).append(path)
    return [_set(paths, makers, channels.kept) for paths in together.values()]


def _set(paths: list[str], makers: dict[str, Tensor], kept: dict[int, str]) -> ChannelSet:
    units = tuple(dict.fromkeys(unit for path in paths for unit in makers[path].tolist()))
    reasons = [kept[unit] for unit in units if unit in kept]
    free = tuple(unit for unit in units if unit not in kept)
    return ChannelSet(tuple(paths), units, free, reasons[0] if reasons else None)


class _Ties:
    """Numbers, and which of them are tied."""

    def __init__(self) -> None:
        self._parent: list[int] = []

    def __len__(self) -> int:
        return len(self._parent)

    def new(self, count: int) -> Tensor:
        first = len(self._parent)
        self._parent.extend(range(first, first + count))
        return torch.arange(first, first + count)

    def tie(self, numbers: Tensor, others: Tensor) -> None:
        """Each with its counterpart, as they broadcast."""
        pairs = torch.stack(torch.broadcast_tensors(numbers, others)).flatten(1)
        for a, b in pairs.unique(dim=1).t().tolist():
            self._parent[self._first(b)] = self._first(a)

    def of(self, numbers: Tensor) -> Tensor:
        """For each the one that stands for all it is tied to."""
        distinct, index = numbers.unique(return_inverse=True)
        return torch.tensor([self._first(number) for number in distinct.tolist()])[index]

    def _first(self, number: int) -> int:
        while self._parent[number] != number:
            self._parent[number] = self._parent[self._parent[number]]
            number = self._parent[number]
        return number


class _Walk:
    """Follows the channels through a graph, node by node."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._ties = _Ties()
        self._kept: list[tuple[Tensor, str]] = []
        self._layers: dict[nn.Module, LayerChannels] = {}
        self._moves: dict[str, tuple[Tensor, Any]] = {}
        self._shared = _shared_layers(graph)

    def through(self, inputs: list[Tensor]) -> None:
        values: dict[str, Any] = dict(zip(self._graph.input_names, inputs, strict=True))
        numbers: dict[str, Any] = {
            name: self._whole(value.shape, f"'{name}' is an input of the network")
            for name, value in values.items()
        }
        for node in self._graph.nodes:
            read = [values[name] for name in node.inputs]
            value = values[node.name] = self._graph.value(node, read)
            before = [self._canonical(numbers[name]) for name in node.inputs]
            rule = _Walk._layer if node.operation == LAYER else _RULES[node.operation]
            after = rule(self, node, before, read, value)
            numbers[node.name] = self._canonical(after, longest=node.operation == "reshape")
            if node.operation in _MOVES:
                self._moves[node.name] = (numbers[node.inputs[0]], numbers[node.name])
        for name in self._graph.output_names:
            self._keep(numbers[name], f"'{name}' is an output of the network")

    def found(self) -> Channels:
        final = self._final
        kept: dict[int, str] = {}
        for numbers, reason in self._kept:
            for unit in final(numbers).unique().tolist():
                kept.setdefault(unit, reason)
        layers = {
            layer: each._replace(inputs=final(each.inputs), outputs=final(each.outputs))
            for layer, each in self._layers.items()
        }
        moves = {name: (final(a), final(b)) for name, (a, b) in self._moves.items()}
        return Channels(layers, kept, moves, len(self._ties))

    def _final(self, numbers: Any) -> Any:
        if isinstance(numbers, list):
            return [self._final(each) for each in numbers]
        small = _varying(numbers)
        return self._ties.of(small).expand(numbers.shape)

    def _canonical(self, numbers: Any, longest: bool = False) -> Any:
        """The same, tied so that they differ along one dimension at most, others being expanded."""
        if isinstance(numbers, list):
            return [self._canonical(each) for each in numbers]
        small = _varying(self._ties.of(_varying(numbers)))
        dims = [dim for dim, size in enumerate(small.shape) if size > 1]
        if len(dims) > 1:
            along = max(dims, key=lambda dim: small.shape[dim]) if longest else dims[0]
            rows = small.movedim(along, 0).flatten(1)
            self._ties.tie(rows[:, :1], rows)
            small = _varying(self._ties.of(small))
        return small.expand(numbers.shape)

    def _whole(self, shape: Iterable[int], reason: str) -> Tensor:
        """Numbers of a value that must stay as it is."""
        number = self._ties.new(1)
        self._keep(number, reason)
        return number.view([1 for _ in shape]).expand(*shape)

    def _keep(self, numbers: Tensor, reason: str) -> None:
        self._kept.append((_varying(numbers), reason))

    # Rules: of a node, the numbers of what it reads, the values that it reads, and its value. They
    # return the numbers of the value.

    def _elementwise(
        self, node: Node, numbers: list[Tensor], read: list[Tensor], value: Tensor
    ) -> Tensor:
        """Elements that meet vanish together, unless one is spread over several channels."""
        padded = [each.view(*[1] * (value.dim() - each.dim()), *each.shape) for each in numbers]
        spread = [
            each
            for each in padded
            if any(_differ(o, d) and each.shape[d] == 1 for o in padded for d in range(o.dim()))
        ]
        for each in spread:
            self._keep(each, f"'{node.name}' spreads it over other channels")
        rest = [each for each in padded if all(each is not one for one in spread)]
        if not rest:
            return self._whole(value.shape, f"'{node.name}' spreads it over other channels")
        first, *others = rest
        for other in others:
            self._ties.tie(_varying(first), _varying(other))
        return first.expand(value.shape)

    def _along(
        self, node: Node, numbers: list[Tensor], read: list[Tensor], value: Any
    ) -> Tensor | list[Tensor]:
        """What combines elements along some dimensions, such as a pooling."""
        if isinstance(value, tuple):  # with the positions of the maxima
            return [self._along(node, numbers, read, each) for each in value]
        (before,) = numbers
        given = node.arguments.get("dim", (-2, -1))
        dims = (given,) if isinstance(given, int) else given or range(before.dim())
        if any(_differ(before, dim) for dim in dims):
            reason = f"'{node.name}' ({node.operation}) combines channels"
            self._keep(before, reason)
            return self._whole(value.shape, reason)
        small = _varying(before)
        if value.dim() < small.dim():
            small = small.squeeze(tuple(dims))
        return small.expand(value.shape)

    def _move(self, node: Node, numbers: list[Any], read: list[Any], value: Any) -> Any:
        return run(node.operation, numbers, node.arguments)

    def _move_if_whole(
        self, node: Node, numbers: list[Tensor], read: list[Tensor], value: Tensor
    ) -> Tensor:
        """What would do something else if there were fewer channels along its dimension."""
        (before,) = numbers
        if _differ(before, node.arguments["dim"]):
            self._keep(before, f"'{node.name}' ({node.operation}) counts channels")
        return run(node.operation, numbers, node.arguments)

    def _slice(
        self, node: Node, numbers: list[Tensor], read: list[Tensor], value: Tensor
    ) -> Tensor:
        if node.arguments.get("step", 1) != 1:
            arguments = {"dim": 0} | node.arguments
            return self._move_if_whole(node._replace(arguments=arguments), numbers, read, value)
        return run(node.operation, numbers, node.arguments)

    def _pad(self, node: Node, numbers: list[Tensor], read: list[Tensor], value: Tensor) -> Tensor:
        """Padding is part of the channel that it surrounds; whole channels of it stay."""
        (before,) = numbers
        pad = node.arguments["pad"]
        amounts = {before.dim() - 1 - i // 2: pad[i : i + 2] for i in range(0, len(pad), 2)}
        crossed = [d for d, both in amounts.items() if any(both) and _differ(before, d)]
        if not crossed:
            return _varying(before).expand(value.shape)
        (dim,) = crossed
        front, back = amounts[dim]
        constant = node.arguments.get("mode", "constant") == "constant"
        if not constant or min(front, back) < 0:
            reason = f"'{node.name}' (pad) counts channels"
            self._keep(before, reason)
            return self._whole(value.shape, reason)
        more = self._whole([1], f"'{node.name}' pads with whole channels")
        units = torch.cat([more.expand(front), _channels_of(before, dim), more.expand(back)])
        return _spread(units, dim, value.shape)

    def _shuffle(
        self, node: Node, numbers: list[Tensor], read: list[Tensor], value: Tensor
    ) -> Tensor:
        """A shuffle keeps groups of equal size; pixels come from so many channels each."""
        rows = _channels_of(numbers[0])
        if rows is None:
            self._keep(numbers[0], f"'{node.name}' ({node.operation}) combines channels")
        elif node.operation == "channel_shuffle":
            self._tie_groups(rows, node.arguments["groups"])
        else:
            pixels = rows.view(-1, node.arguments["upscale_factor"] ** 2)
            self._ties.tie(pixels[:, :1], pixels)
        return run(node.operation, [self._canonical(numbers[0])], node.arguments)

    def _tie_groups(self, units: Tensor, groups: int) -> None:
        """Channels at the same position of the groups."""
        rows = units.view(groups, -1)
        self._ties.tie(rows[:1], rows)

    def _layer(
        self, node: Node, numbers: list[Tensor], read: list[Tensor], value: Tensor
    ) -> Tensor:
        layer = self._graph.get_submodule(node.layer)
        if type(layer) in PRODUCERS and layer not in self._shared:
            return self._producer(node, layer, numbers[0], read[0], value)
        if type(layer) is nn.PReLU and layer.num_parameters == 1:
            return numbers[0]
        if type(layer) in FOLLOWERS and layer not in self._shared:
            units = self._channels(node, numbers[0], 1)
            self._add(layer, LayerChannels(units, units, False, 0))
            return _spread(units, 1, value.shape)
        reason = f"'{node.name}' ({type(layer).__name__}) cannot lose channels"
        self._keep(numbers[0], reason)
        return self._whole(value.shape, reason)

    def _producer(
        self, node: Node, layer: nn.Module, before: Tensor, read: Tensor, value: Tensor
    ) -> Tensor:
        dim = -1 if isinstance(layer, nn.Linear) else 1
        inputs = self._channels(node, before, dim)
        groups, outs = getattr(layer, "groups", 1), value.shape[dim]
        passes = 1 < groups == len(inputs)  # each group is a channel
        if layer in self._layers:
            outputs = self._layers[layer].outputs
        elif passes:
            outputs = inputs.repeat_interleave(outs // groups)
        else:
            outputs = self._ties.new(outs)
            self._tie_groups(outputs, groups)
        if not passes:
            self._tie_groups(inputs, groups)
        transposed = getattr(layer, "transposed", False)
        positions = read.numel() // len(inputs) if transposed else value.numel() // outs
        self._add(layer, LayerChannels(inputs, outputs, not passes, positions))
        return _spread(outputs, dim, value.shape)

    def _add(self, layer: nn.Module, found: LayerChannels) -> None:
        """A call of a layer; what another call reads is tied to what the first one read."""
        if first := self._layers.get(layer):
            self._ties.tie(first.inputs, found.inputs)
            found = first._replace(positions=first.positions + found.positions)
        self._layers[layer] = found

    def _channels(self, node: Node, numbers: Tensor, dim: int) -> Tensor:
        """The units along a dimension, which must not differ along another one."""
        units = _channels_of(numbers, dim)
        if units is None:
            reason = f"'{node.name}' does not read channels along dimension {dim}"
            self._keep(numbers, reason)
            units = self._whole([numbers.shape[dim]], reason)
        return units


def _shared_layers(graph: Graph) -> set[nn.Module]:
    """Layers that hold a parameter of another layer."""
    holders: dict[nn.Parameter, list[nn.Module]] = {}
    for layer in dict.fromkeys(graph.named_layers().values()):
        for parameter in layer.parameters():
            holders.setdefault(parameter, []).append(layer)
    return {layer for each in holders.values() if len(each) > 1 for layer in each}


def _varying(numbers: Tensor) -> Tensor:
    """The same with size 1 along every dimension in which they do not differ."""
    for dim in range(numbers.dim()):
        if not _differ(numbers, dim):
            numbers = numbers.narrow(dim, 0, 1)
    return numbers


def _differ(numbers: Tensor, dim: int) -> bool:
    """Whether they do along a dimension."""
    if numbers.shape[dim] < 2 or numbers.stride(dim) == 0:
        return False
    return not torch.equal(numbers, numbers.narrow(dim, 0, 1).expand(numbers.shape))


def _channels_of(numbers: Tensor, dim: int = 1) -> Tensor | None:
    """Those along a dimension, None if they differ along another one."""
    small = _varying(numbers)
    size = small.shape[dim]
    return small.flatten().expand(numbers.shape[dim]) if small.numel() == size else None


def _spread(units: Tensor, dim: int, shape: torch.Size) -> Tensor:
    """Units of channels as those of every element of a value with these channels."""
    view = [1 for _ in shape]
    view[dim] = -1
    return units.view(view).expand(shape)


Rule = Callable[[_Walk, Node, list[Any], list[Any], Any], Any]

_ELEMENTWISE = """
    relu hardtanh leaky_relu elu sigmoid tanh hardswish hardsigmoid silu gelu mish selu softplus
    clamp add sub rsub mul div
""".split()
_ALONG = """
    softmax log_softmax mean max_pool2d avg_pool2d adaptive_avg_pool2d adaptive_max_pool2d
    upsample_nearest2d upsample_bilinear2d
""".split()
_MOVE = "cat chunk split split_with_sizes flatten reshape permute transpose unsqueeze".split()
_RULES: dict[str, Rule] = {
    **dict.fromkeys(_ELEMENTWISE, _Walk._elementwise),
    **dict.fromkeys(_ALONG, _Walk._along),
    **dict.fromkeys((*_MOVE, "pixel_unshuffle", GETITEM), _Walk._move),
    **dict.fromkeys(("squeeze", "select"), _Walk._move_if_whole),
    **dict.fromkeys(("channel_shuffle", "pixel_shuffle"), _Walk._shuffle),
    "slice": _Walk._slice,
    "pad": _Walk._pad,
}
# Those whose arguments may depend on numbers of channels.
_MOVES = {"reshape", "chunk", "split", "split_with_sizes", "slice"}
