"""Models that the tests of save and load write, and files that they change."""

import torch
import torch.nn.functional as F
from torch import nn

from nncx import _files
from nncx.compress import (
    INQ,
    TTQ,
    XNOR,
    BinaryConnect,
    DeepCompression,
    Half,
    Int8,
    Pruning,
    convert,
    freeze,
)


def plain():
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 16, 3, padding="same", groups=2), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.MaxPool2d(2), nn.Conv2d(16, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)),
    )


class MyBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        return x + self.conv(self.relu(self.norm(x)))


class MyNet(nn.Module):
    """A user's class, with a shared activation, a None child and a bare parameter."""

    def __init__(self, width=8):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3)
        self.blocks = nn.ModuleList([MyBlock(width), MyBlock(width)])
        self.extra = None
        self.register_module("nothing", None)
        self.gain = nn.Parameter(torch.tensor(2.0))
        self.head = nn.Conv2d(width, 4, 1)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(F.relu(x)) * self.gain


METHODS = {
    "float": lambda model: model,
    "xnor": lambda model: convert(model, XNOR(scale="alpha_k")),
    "frozen xnor": lambda model: freeze(convert(model, XNOR())),
    "binary connect": lambda model: convert(model, BinaryConnect(stochastic=True)),
    "frozen binary connect": lambda model: freeze(convert(model, BinaryConnect())),
    "ttq": lambda model: convert(model, TTQ()),
    "inq in the middle": lambda model: _quantized(convert(model, INQ()), 0.5),
    "frozen inq": lambda model: freeze(_quantized(convert(model, INQ(bits=4)), 1)),
    "deep compression": lambda model: convert(model, DeepCompression(4, 3)),
    "frozen deep compression": lambda model: freeze(convert(model, DeepCompression(4, 3))),
    "frozen half": lambda model: freeze(convert(model, Half())),
    "pruned": lambda model: _pruned(model),
    "frozen pruned": lambda model: freeze(_pruned(model)),
    "int8": lambda model: _calibrated(convert(model, Int8(symmetric=True))),
    "frozen int8": lambda model: freeze(_calibrated(convert(model, Int8(per_channel=False)))),
}


def _quantized(model, fraction):
    for layer in model.modules():
        if hasattr(layer, "quantize_largest"):
            layer.quantize_largest(fraction)
    return model


def _calibrated(model):
    for layer in model.modules():
        if hasattr(layer, "set_input_range"):
            layer.set_input_range(-1, 2)
    return model


def _pruned(model):
    method = Pruning(sparsity=0.8)
    list(method.steps(convert(model, method)))
    return model


def compressed(model, method):
    """With BatchNorm statistics and affine parameters that are not the initial ones."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean):
                nn.init.normal_(tensor)
    return METHODS[method](model)


def output(model, x):
    with torch.no_grad():
        return model.eval()(x)


def rewrite(file, change):
    """A file with other metadata or tensors and a valid hash."""
    tensors, metadata = _files.read(file)
    change(tensors, metadata)
    _files.write(file, tensors, metadata)
