"""The layer that a method puts in the place of one of torch's."""

from typing import TypeVar

from torch import nn

from nncx.nn.packed import PackedLayer

GEOMETRY = {
    nn.Conv2d: (
        *("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"),
        "padding_mode",
    ),
    nn.Linear: ("in_features", "out_features"),
}

Layer = TypeVar("Layer", bound=PackedLayer)


def counterpart(module: nn.Module, cls: type[Layer], **extras: object) -> Layer:
    """A `cls` with the geometry, the mode and the very Parameters of `module`.

    Args:
        module: a layer whose type is in `GEOMETRY`.
        cls: a drop-in for that type.
        extras: the constructor arguments that torch's layer lacks.
    """
    geometry = {name: getattr(module, name) for name in GEOMETRY[type(module)]}
    layer = cls(**geometry, bias=module.bias is not None, device="meta", **extras)
    layer.weight, layer.bias = module.weight, module.bias
    layer.reset_buffers()
    return layer.train(module.training)
