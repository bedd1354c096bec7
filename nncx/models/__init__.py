"""The networks of the papers. Compressed variants are made by `nncx.convert`, never written out.

Every network maps images [N, C, H, W] to logits [N, num_classes], keeps each constructor argument
as an attribute of the same name, and has one module per non-linearity, so that it can be rebuilt
and rewired from outside.
"""

import inspect
import re

from torch import nn

from nncx.models.lenet import LeNet4, LeNet5, LeNet300100
from nncx.models.mlp import MLP
from nncx.models.nin import NiN
from nncx.models.resnet import ResNet
from nncx.models.vgg import VGG9

__all__ = ["LeNet300100", "LeNet4", "LeNet5", "MLP", "NiN", "ResNet", "VGG9", "by_name"]

_BY_NAME = {
    "lenet300100": LeNet300100,
    "lenet4": LeNet4,
    "lenet5": LeNet5,
    "mlp": MLP,
    "nin": NiN,
    "vgg9": VGG9,
}


def by_name(name: str, *, image_size: int = 28, **arguments: object) -> nn.Module:
    """The network that a command line names: `by_name("resnet20", in_channels=1)`.

    Args:
        name: lenet300100, lenet4, lenet5, mlp, nin, vgg9, or resnet with its depth.
        image_size: for the networks that depend on it; the others take any size.
        arguments: the constructor's.

    Raises:
        ValueError: if there is no such network, or by its constructor.
        TypeError: for an argument that the network does not have.
    """
    resnet = re.fullmatch(r"resnet(\d+)", name)
    if resnet:
        return ResNet(int(resnet[1]), **arguments)
    if name not in _BY_NAME:
        raise ValueError(f"a network is one of {', '.join(_BY_NAME)}, resnet<depth>, got {name!r}")
    network = _BY_NAME[name]
    if "image_size" in inspect.signature(network).parameters:
        arguments["image_size"] = image_size
    return network(**arguments)
