"""The networks of the papers. Compressed variants are made by `nncx.convert`, never written out.

Every network maps images [N, C, H, W] to logits [N, num_classes], keeps each constructor argument
as an attribute of the same name, and has one module per non-linearity, so that it can be rebuilt
and rewired from outside.
"""

import inspect
import re
from functools import partial

from torch import nn

from nncx.models.fitnet import FitNet19, Maxout
from nncx.models.lenet import LeNet4, LeNet5, LeNet300100
from nncx.models.mlp import MLP
from nncx.models.mobilenet import MobileNet
from nncx.models.nin import NiN
from nncx.models.resnet import ResNet
from nncx.models.shufflenet import ShuffleNet
from nncx.models.shufflenet_v2 import ShuffleNetV2
from nncx.models.vgg import VGG9

__all__ = [
    "NAMES",
    "FitNet19",
    "LeNet300100",
    "LeNet4",
    "LeNet5",
    "MLP",
    "Maxout",
    "MobileNet",
    "NiN",
    "ResNet",
    "ShuffleNet",
    "ShuffleNetV2",
    "VGG9",
    "by_name",
    "is_name",
]

_BY_NAME = {
    "fitnet19": FitNet19,
    "lenet300100": LeNet300100,
    "lenet4": LeNet4,
    "lenet5": LeNet5,
    "mlp": MLP,
    "mobilenet": MobileNet,
    "nin": NiN,
    "ninmnist": partial(NiN, widths=(96, 64, 48, 128, 96, 48, 128, 96), kernels=(5, 5, 5)),
    "shufflenet": ShuffleNet,
    "shufflenetv2": ShuffleNetV2,
    "vgg9": VGG9,
}

NAMES = (*_BY_NAME, "resnet<depth>")  # that `by_name` knows

_SMALL = 64  # pixels, of which the forms for ImageNet would leave one


def by_name(name: str, *, image_size: int = 28, **arguments: object) -> nn.Module:
    """The network that a command line names: `by_name("resnet20", in_channels=1)`.

    Args:
        name: one of `NAMES`, as "resnet20".
        image_size: for the networks that depend on it, and to choose the form for small images
            (below 64 pixels) of those that have one; the others take any size.
        arguments: the constructor's.

    Raises:
        ValueError: if there is no such network, or by its constructor.
        TypeError: for an argument that the network does not have.
    """
    if not is_name(name):
        raise ValueError(f"a network is one of {', '.join(NAMES)}, got {name!r}")
    if name not in _BY_NAME:
        return ResNet(int(name.removeprefix("resnet")), **arguments)
    network = _BY_NAME[name]
    parameters = inspect.signature(network).parameters
    if "image_size" in parameters:
        arguments["image_size"] = image_size
    if "small_images" in parameters:
        arguments.setdefault("small_images", image_size < _SMALL)
    return network(**arguments)


def is_name(name: str) -> bool:
    """Whether `by_name` knows it."""
    return name in _BY_NAME or re.fullmatch(r"resnet\d+", name) is not None
