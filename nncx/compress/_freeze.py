"""What is done to all nncx layers of a model at once."""

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from nncx.nn import PackedLayer
from nncx.nn.pruned import PrunedLayer


def freeze(model: nn.Module) -> nn.Module:
    """Make `model` an inference model, in place: packed weights instead of float ones.

    Every nncx layer drops its float weight and from now on runs its native kernel; the model goes
    to eval mode, and since no gradient flows through packed weights, no parameter requires one.

    Returns:
        `model`.

    Raises:
        ValueError: if it has no nncx layer that packs its weight, or one with a reparametrised
            weight, or an int8 layer whose input range is not known or whose weight is not finite;
            before anything is changed.
    """
    layers = _packed_layers(model, "freeze")
    for name, layer in model.named_modules():
        if not isinstance(layer, PackedLayer):
            continue
        if not _has_plain_weight(layer):
            raise ValueError(
                f"freeze: '{name}' must have a plain weight, got a reparametrised one; call"
                " torch.nn.utils.parametrize.remove_parametrizations (or remove_weight_norm) first"
            )
        if not layer.frozen and (reason := layer.why_not_freezable()):
            raise ValueError(f"freeze: '{name}' {reason}")
    for layer in layers:
        layer.freeze()
    return model.eval().requires_grad_(False)


def thaw(model: nn.Module) -> nn.Module:
    """Undo `freeze` in pruned layers, in place: they train on, or are converted further.

    Freezing such a layer has lost nothing but what was pruned, which stays so. `model` goes to
    training mode, and all its parameters require a gradient.

    Returns:
        `model`.

    Raises:
        ValueError: if it has a frozen layer of another family, before anything is changed.
    """
    frozen = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, PackedLayer) and layer.frozen
    }
    for name, layer in frozen.items():
        if not isinstance(layer, PrunedLayer):
            raise ValueError(
                f"thaw: a frozen layer must be a pruned one, got a {type(layer).__name__} at"
                f" '{name}', which has no float weight; take the network that it was made of"
            )
    for layer in frozen.values():
        layer.thaw()
    return model.train().requires_grad_(True)


def repack(model: nn.Module) -> nn.Module:
    """Rebuild what the native kernels read, after weights were changed in eval mode; in place.

    Returns:
        `model`.

    Raises:
        ValueError: if it has no nncx layer that packs its weight.
    """
    for layer in _packed_layers(model, "repack"):
        layer.repack()
    return model


def _has_plain_weight(layer: PackedLayer) -> bool:
    """Not so under weight_norm and its kin, be they parametrizations or hooks."""
    return not is_parametrized(layer) and "weight" in layer._parameters


def _packed_layers(model: nn.Module, task: str) -> list[PackedLayer]:
    layers = [module for module in model.modules() if isinstance(module, PackedLayer)]
    if not layers:
        raise ValueError(
            f"{task}: {type(model).__name__} has no nncx layer that packs its weight; call"
            " nncx.convert(model, ...) first, with a method that has one (XNOR, Int8, ...)"
        )
    return layers
