"""Torch's own layers in the place of pruned ones."""

import torch
from torch import nn

from nncx.compress._counterpart import GEOMETRY, PRUNED, check_no_hooks
from nncx.compress._skip import names_of
from nncx.nn.pruned import PrunedLayer


def remove_masks(model: nn.Module) -> nn.Module:
    """Put torch's own layers in the place of pruned ones, with zeros where weights are pruned.

    In place. The layers hold the same Parameters, so optimizers stay valid; but from now on a zero
    is a weight like any other, and training changes it. A frozen layer becomes one that trains.

    Returns:
        `model`.

    Raises:
        ValueError: if the model has no pruned layer, is one itself, or if hooks would be lost.
    """
    names = {m: its for m, its in names_of(model).items() if isinstance(m, PrunedLayer)}
    if not names:
        raise ValueError(
            f"remove_masks: {type(model).__name__} must have a pruned layer, got none; there is"
            " nothing to remove"
        )
    for layer, its in names.items():
        if "" in its:
            raise ValueError(
                "remove_masks: the model must contain the pruned layers, got a bare"
                f" {type(layer).__name__}; wrap it in nn.Sequential"
            )
        check_no_hooks(layer, its[0], "remove_masks")
    for layer, its in names.items():
        plain = _plain(layer)
        for name in its:
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, plain)
    return model


@torch.no_grad()
def _plain(layer: PrunedLayer) -> nn.Module:
    kind = next(plain for pruned, plain in PRUNED.items() if isinstance(layer, pruned))
    geometry = {name: getattr(layer, name) for name in GEOMETRY[kind]}
    plain = kind(**geometry, bias=layer.bias is not None, device="meta")
    if layer.frozen:
        plain.weight = nn.Parameter(layer.masked_weight())
    else:
        plain.weight = layer.weight
        plain.weight.copy_(layer.masked_weight())
    plain.bias = layer.bias
    if layer.frozen:
        plain.requires_grad_()
    return plain.train(layer.training)
