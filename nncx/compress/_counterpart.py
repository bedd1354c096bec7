"""The layer that a method puts in the place of one of torch's."""

from typing import TypeVar

from torch import nn

from nncx.nn.packed import PackedLayer
from nncx.nn.pruned import PrunedConv2d, PrunedLinear

GEOMETRY = {
    nn.Conv2d: (
        *("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"),
        "padding_mode",
    ),
    nn.Linear: ("in_features", "out_features"),
}

WEIGHTED = (nn.modules.conv._ConvNd, nn.Linear, nn.Bilinear)
"""Layers with weights that multiply their input."""

# Layers that are torch's but for a `mask` of their weight, which layers of a codebook take over.
PRUNED = {PrunedConv2d: nn.Conv2d, PrunedLinear: nn.Linear}

Layer = TypeVar("Layer", bound=PackedLayer)


def torch_type(module: nn.Module) -> type[nn.Module] | None:
    """nn.Conv2d or nn.Linear, if `module` is exactly that, or a pruned one with a float weight."""
    if type(module) in GEOMETRY:
        return type(module)
    return None if module._parameters.get("weight") is None else PRUNED.get(type(module))


def counterpart(module: nn.Module, cls: type[Layer], **extras: object) -> Layer:
    """A `cls` with the geometry, the mode, the very Parameters and the mask of `module`.

    Args:
        module: a layer that has a `torch_type`.
        cls: a drop-in for that type; if `module` has a mask, one that takes it.
        extras: the constructor arguments that torch's layer lacks.
    """
    geometry = {name: getattr(module, name) for name in GEOMETRY[torch_type(module)]}
    pruned = type(module) in PRUNED
    if pruned:
        extras["masked"] = True
    layer = cls(**geometry, bias=module.bias is not None, device="meta", **extras)
    layer.weight, layer.bias = module.weight, module.bias
    if pruned:
        layer.mask = module.mask
    layer.reset_buffers()
    return layer.train(module.training)


def check_weight(module: nn.Module, name: str, task: str) -> None:
    """Refuse a weight that is computed from others, of which a swap would know nothing."""
    if not isinstance(getattr(module, "weight", None), nn.Parameter | None):
        raise ValueError(
            f"{task}: '{name}' must be a plain layer, got one with a reparametrised weight,"
            " which the swap would lose; remove that first"
        )


def check_no_hooks(module: nn.Module, name: str, task: str) -> None:
    """Refuse hooks, which a swap would lose."""
    hooks = (
        *(module._forward_hooks, module._forward_pre_hooks),
        *(module._backward_hooks, module._backward_pre_hooks),
    )
    if any(hooks):
        raise ValueError(
            f"{task}: '{name}' must be a plain layer, got one with hooks, which the swap would"
            " lose; remove them first"
        )
