"""Filters of least weight taken out of a network, with all that reads them."""

import bisect
import math
import numbers
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nncx.compress._network import Example, Network, network_of
from nncx.compress._scan import Scan, ScanRow
from nncx.compress._skip import Skip, names_of, skipped
from nncx.graph import Graph
from nncx.graph._channels import ChannelSet, sets
from nncx.graph._narrow import filters, inputs_of_a_group, mask, narrow, with_one_left

AMOUNTS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
_ORDERS = {"L1": 1, "L2": 2}
_SCHEMES = ("independent", "greedy")
_SLACK = 1e-9  # 0.29 * 100 is a little below 29

Amounts = list[tuple[ChannelSet, float]]


def prune_filters(
    model: nn.Module,
    example: Example,
    amount: float | Mapping[str, float] | None = None,
    *,
    macs: float | None = None,
    criterion: str = "L1",
    scheme: str = "independent",
    skip: Skip = (),
    tied: bool = False,
    minimum: int = 1,
    multiple: int = 1,
) -> Graph:
    """A smaller network: each convolution loses the filters with the least weights.

        s_j = sum |F_j|        ("L2": the root of sum F_j^2)

    With filter j go its bias, its entries in the BatchNorm behind it, and the weights of the next
    layers for its map. In eval mode the result computes what `model` does if those weights of the
    next layers are 0. Train it on as any network: it consists of plain layers of torch.

    Channels that an addition, a shuffle or the groups of a convolution tie to each other go
    together, by the mean of their s. Where several layers are tied, as at the ends of residual
    blocks, they stay whole unless `tied`: so of a basic block the first convolution is pruned, of a
    bottleneck the first two. What the network returns stays whole, and linear layers do unless
    they are named.

    Args:
        model: any network that can be traced, or its graph; not changed.
        example: an input, or a tuple of several, as for `nncx.graph.trace`.
        amount: the fraction of its filters that each convolution loses, rounded down; or fractions
            by the name of a layer, convolution or linear, or of a block for the convolutions
            inside. Of several names the longest counts.
        macs: instead of `amount`: which share of the multiply-accumulates of convolutions and
            linear layers may remain. All convolutions lose the same fraction, the least that will
            do.
        criterion: "L1" or "L2".
        scheme: "independent"; or "greedy", where s leaves out the weights for maps of earlier
            layers that are gone already.
        skip: layers that keep all filters, by name (of a layer, or of a block for all inside), or a
            predicate of (name, layer).
        tied: whether layers that are tied to each other are pruned, too.
        minimum: filters that each layer keeps at least.
        multiple: of what the number of filters that are kept is a multiple (of a grouped
            convolution: the filters of a group); rather more are kept. Kernels like 8 or 16.

    Returns:
        A new graph in the mode of `model`, which shares nothing with it.

    Raises:
        ValueError: if the model cannot be traced, an argument is not as it must be, a layer or all
            of a block that is named must stay whole, no layer can be pruned, `macs` cannot be
            reached, or a layer has hooks or a reparametrised weight.
        TypeError: if the arguments are no module and tensors.

    Paper: Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017.
    """
    task = "prune_filters"
    if (amount is None) == (macs is None):
        raise ValueError(f"{task}: one of amount and macs must be given, got both or none")
    for each in amount.values() if isinstance(amount, Mapping) else (amount, macs):
        _check_fraction(each, task)
    _check_rule(task, criterion, scheme, minimum, multiple)
    network = network_of(model, example, task)
    rule = _Rule(network, criterion, scheme, minimum, multiple)
    candidates = _Candidates.of(network, skip, tied, task)
    if isinstance(amount, Mapping):
        removed = rule.removed(candidates.by_name(amount))
    elif macs is None:
        removed = rule.removed([(each, amount) for each in candidates.convolutions()])
    else:
        removed = _down_to(macs, rule, candidates.convolutions())
    return narrow(network.graph, network.channels, removed)


def filter_sensitivity(
    model: nn.Module,
    example: Example,
    metric: Callable[[nn.Module], float],
    amounts: Sequence[float] = AMOUNTS,
    *,
    criterion: str = "L1",
    skip: Skip = (),
    tied: bool = False,
) -> Scan:
    """What `prune_filters` costs, layer by layer: with that layer alone pruned, without training.

    Args:
        metric: a figure of a network, such as its error on validation data.
        amounts: the fractions of its filters that a layer loses.
        model, example, criterion, skip, tied: as of `prune_filters`.

    Raises:
        ValueError, TypeError: as `prune_filters`.
    """
    task = "filter_sensitivity"
    for each in amounts:
        _check_fraction(each, task)
    _check_rule(task, criterion)
    network = network_of(model, example, task)
    rule = _Rule(network, criterion)
    graph, channels = network.graph, network.channels

    def row(each: ChannelSet) -> ScanRow:
        pruned = (narrow(graph, channels, rule.removed([(each, amount)])) for amount in amounts)
        kind = type(graph.get_submodule(each.layers[0])).__name__
        figures = tuple(float(metric(each)) for each in pruned)
        return ScanRow(", ".join(each.layers), kind, len(each.free), figures)

    rows = tuple(map(row, _Candidates.of(network, skip, tied, task).convolutions()))
    return Scan("filters", tuple(amounts), rows, float(metric(graph)))


class _Candidates(NamedTuple):
    """The sets of layers of a network, each with the reason why it stays whole, if there is one."""

    network: Network
    sets: list[tuple[ChannelSet, str | None]]
    task: str

    @classmethod
    def of(cls, network: Network, skip: Skip, tied: bool, task: str) -> "_Candidates":
        kept = skipped(names_of(network.graph), skip, task)
        found = []
        for each in sets(network.graph, network.channels):
            layers = [network.graph.get_submodule(path) for path in each.layers]
            reason = each.reason if not each.free else None
            if any(layer in kept for layer in layers):
                reason = "it is skipped"
            elif reason is None and len(each.units) == 1 < len(filters(layers[0])):
                reason = "groups and shuffles tie all its channels together"
            elif reason is None and len(each.layers) > 1 and not tied:
                reason = f"{_listed(each.layers)} are tied; pass tied=True to prune them together"
            found.append((each, reason))
        return cls(network, found, task)

    def convolutions(self) -> list[ChannelSet]:
        found = [each for each, reason in self.sets if reason is None and self._convolves(each)]
        if not found:
            reasons = [f"'{each.layers[0]}': {reason}" for each, reason in self.sets if reason]
            raise ValueError(
                f"{self.task}: the model must have a convolution that may lose filters, got none"
                f" ({'; '.join(reasons[:3]) or 'no convolution at all'})"
            )
        return found

    def by_name(self, amounts: Mapping[str, float]) -> Amounts:
        """The sets that `amounts` names, each with its fraction."""
        known = {name for names in names_of(self.network.graph).values() for name in names}
        if unknown := [name for name in amounts if name not in known]:
            raise ValueError(
                f"{self.task}: amount names '{unknown[0]}', which the model does not have; take"
                " names from model.named_modules()"
            )
        result, idle = [], set(amounts)
        for each, reason in self.sets:
            names = {path for path in each.layers if path in amounts}
            if names and reason:
                raise ValueError(f"{self.task}: '{min(names)}' must stay whole: {reason}")
            idle -= names
            if self._convolves(each) and reason is None:
                named = [[n for n in _blocks(path) if n in amounts] for path in each.layers]
                idle.difference_update(*named)
                names = names or {blocks[-1] for blocks in named if blocks}
            if len({amounts[name] for name in names}) > 1:
                raise ValueError(
                    f"{self.task}: {_listed(sorted(names))} must lose the same fraction, being"
                    f" tied, got {[amounts[name] for name in sorted(names)]}"
                )
            if names:
                result.append((each, amounts[min(names)]))
        if idle:
            raise ValueError(
                f"{self.task}: amount names '{min(idle)}', where no convolution may lose filters;"
                " name a layer to be told why"
            )
        return result

    def _convolves(self, each: ChannelSet) -> bool:
        layers = map(self.network.graph.get_submodule, each.layers)
        return any(isinstance(layer, nn.modules.conv._ConvNd) for layer in layers)


def _blocks(path: str) -> list[str]:
    """What a layer is in, the innermost last."""
    parts = path.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def _listed(names: Sequence[str]) -> str:
    shown = [f"'{name}'" for name in names[:3]] + ["..."] * (len(names) > 3)
    return ", ".join(shown)


class _Rule(NamedTuple):
    """How filters are chosen: the settings of `prune_filters`."""

    network: Network
    criterion: str = "L1"
    scheme: str = "independent"
    minimum: int = 1
    multiple: int = 1

    def removed(self, amounts: Amounts) -> set[int]:
        """The units that go when each set, in order of execution, loses that fraction."""
        gone: set[int] = set()
        for each, amount in amounts:
            gone |= self._least(each, amount, mask(self.network.channels, gone))
        return with_one_left(self.network.channels, gone)

    def _least(self, each: ChannelSet, amount: float, stays: Tensor) -> set[int]:
        layers = self.network.channels.layers
        made = [layers[self.network.graph.get_submodule(path)].outputs for path in each.layers]
        sizes = [Counter(units.tolist()) for units in made]
        left = [len(units) for units in made]
        count = len(each.free) - math.floor(amount * len(each.free) + _SLACK)
        count = math.ceil(count / self.multiple) * self.multiple
        scores = self._scores(each, stays)
        gone: set[int] = set()
        for unit in sorted(each.free, key=scores.__getitem__):
            after = [n - size[unit] for n, size in zip(left, sizes, strict=True)]
            if len(each.free) - len(gone) > count and all(
                n >= self.minimum or n == before for n, before in zip(after, left, strict=True)
            ):
                gone.add(unit)
                left = after
        return gone

    def _scores(self, each: ChannelSet, stays: Tensor) -> list[float]:
        """By unit, the mean norm of its filters."""
        channels = self.network.channels
        total = torch.zeros(channels.count, dtype=torch.float64)
        count = torch.zeros_like(total)
        for path in each.layers:
            layer = self.network.graph.get_submodule(path)
            found, weight = channels.layers[layer], filters(layer).cpu().double()
            if self.scheme == "greedy":
                weight = weight[:, stays[inputs_of_a_group(layer, found)]]
            norms = torch.linalg.vector_norm(weight.flatten(1), _ORDERS[self.criterion], dim=1)
            total.index_add_(0, found.outputs, norms)
            count.index_add_(0, found.outputs, torch.ones_like(norms))
        return (total / count).tolist()

    def macs(self, removed: set[int]) -> int:
        """Multiply-accumulates of one sample without these units."""
        stays = mask(self.network.channels, removed)
        total = 0
        for layer, found in self.network.channels.layers.items():
            if found.positions:
                inputs = stays[inputs_of_a_group(layer, found)].sum() if found.makes else 1
                outputs = stays[found.outputs].sum()
                total += found.positions * int(outputs * inputs) * filters(layer).shape[2]
        return total


def _down_to(share: float, rule: _Rule, found: list[ChannelSet]) -> set[int]:
    """What goes when all lose the least fraction that leaves `share` of the MACs."""
    target = share * rule.macs(set())
    fractions = sorted({n / len(each.free) for each in found for n in range(len(each.free))})

    def removed(fraction: float) -> set[int]:
        return rule.removed([(each, fraction) for each in found])

    at = bisect.bisect_left(fractions, True, key=lambda f: rule.macs(removed(f)) <= target)
    if at == len(fractions):
        least = rule.macs(removed(fractions[-1])) / rule.macs(set())
        raise ValueError(
            f"prune_filters: macs must be at least {least:.4f}, which is what remains when each"
            f" convolution keeps what it must, got {share}; prune more layers, or less"
        )
    return removed(fractions[at])


def _check_fraction(value: object, task: str) -> None:
    if value is not None and not (isinstance(value, numbers.Real) and 0 <= value < 1):
        raise ValueError(f"{task}: a fraction must be a number in [0, 1), got {value!r}")


def _check_rule(
    task: str,
    criterion: str,
    scheme: str = "independent",
    minimum: int = 1,
    multiple: int = 1,
) -> None:
    words = {"criterion": (criterion, tuple(_ORDERS)), "scheme": (scheme, _SCHEMES)}
    for name, (value, known) in words.items():
        if value not in known:
            raise ValueError(f"{task}: {name} must be one of {', '.join(known)}, got {value!r}")
    for name, value in (("minimum", minimum), ("multiple", multiple)):
        if not isinstance(value, numbers.Integral) or value < 1:
            raise ValueError(f"{task}: {name} must be an integer of at least 1, got {value!r}")
