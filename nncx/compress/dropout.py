"""Dropouts of a pruned network, which has less left to overfit with."""

import math
from collections.abc import Mapping

from torch import fx, nn

from nncx.compress._counterpart import WEIGHTED
from nncx.compress._signs import DROPOUTS
from nncx.compress._skip import names_of
from nncx.compress._trace import called_module, trace
from nncx.nn.pruned import PrunedLayer


def adjust_dropout(model: nn.Module, rate: float | Mapping[str, float]) -> dict[str, float]:
    """Lower the dropouts before pruned layers, which have less left to overfit with; in place.

    Each `nn.Dropout` (also 1d, 2d, 3d) gets `p = rate * sqrt(survivors / weights)` of the pruned
    layers that read what it gives, through whatever has no weights. Call it after each step; what
    it sets depends on `rate` and the masks alone, and not on the `p` of before.

    Args:
        rate: `p` of the network that was trained dense, for all such dropouts or by their names.

    Returns:
        The new `p` by name of the dropout.

    Raises:
        ValueError: if the model cannot be traced, a rate is not in [0, 1], or there is no such
            dropout, or none of a name.

    Paper: Han et al., 2015, section 3.2.
    """
    try:
        graph = trace(model)
    except ValueError as error:
        raise ValueError(
            f"adjust_dropout: torch.fx must be able to trace {type(model).__name__}, got"
            f" {error.__cause__}; set the p of its dropouts yourself"
        ) from error
    readers: dict[nn.Module, set[PrunedLayer]] = {}
    for node in graph.nodes:
        if isinstance(called_module(node), DROPOUTS) and (layers := _pruned_readers(node)):
            readers.setdefault(called_module(node), set()).update(layers)
    names = {names[0]: module for module, names in names_of(model).items() if module in readers}
    rates = dict(rate) if isinstance(rate, Mapping) else dict.fromkeys(names, rate)
    for name, each in rates.items():
        if name not in names:
            raise ValueError(
                f"adjust_dropout: a rate must be of a dropout before a pruned layer, got {name!r};"
                f" the model has {', '.join(names) or 'none'}"
            )
        if not 0 <= each <= 1:
            raise ValueError(f"adjust_dropout: a rate must be at least 0 and at most 1, got {each}")
    if not names:
        raise ValueError(
            f"adjust_dropout: {type(model).__name__} must have an nn.Dropout before a pruned layer,"
            " got none; there is nothing to adjust"
        )
    for name, each in rates.items():
        layers = readers[names[name]]
        left = sum(layer.survivors for layer in layers)
        names[name].p = each * math.sqrt(
            left / sum(math.prod(layer.weight_shape) for layer in layers)
        )
    return {name: names[name].p for name in rates}


def _pruned_readers(node: fx.Node) -> set[PrunedLayer]:
    """The pruned layers that read `node`, be it through what has no weights."""
    found, seen, waiting = set(), set(), list(node.users)
    while waiting:
        reader = waiting.pop()
        if reader in seen:
            continue
        seen.add(reader)
        module = called_module(reader)
        if isinstance(module, PrunedLayer):
            found.add(module)
        elif not isinstance(module, WEIGHTED):
            waiting.extend(reader.users)
    return found
