"""nncx: compress neural networks with the classic methods, and really run the result.

student = nncx.convert(nncx.models.ResNet(20), nncx.XNOR())  # binary layers, to be trained
nncx.freeze(student)                                         # one bit a weight, native kernels
nncx.save(student, "student.safetensors")                    # a small file, no pickle
student = nncx.load("student.safetensors")                   # without the class
print(nncx.report(student, example))                         # measured, layer by layer
"""

from nncx import compress, data, distill, graph, models, nn, ops, train
from nncx._compare import Comparison, compare
from nncx._native import _C
from nncx._report import Report, report
from nncx._store import load, save
from nncx._version import __version__
from nncx.compress import (
    INQ,
    TTQ,
    XNOR,
    BinaryConnect,
    DeepCompression,
    Half,
    Hashed,
    Int8,
    LowRank,
    Mobile,
    Pruning,
    convert,
    freeze,
    quantize,
    repack,
    sensitivity,
)
from nncx.nn import (
    BinaryConnectConv2d,
    BinaryConnectLinear,
    ChannelShuffle,
    DepthwiseConv2d,
    DepthwiseSeparableConv2d,
    GroupedConv2d,
    HalfConv2d,
    HalfLinear,
    HashedLinear,
    INQConv2d,
    INQLinear,
    Int8Conv2d,
    Int8Linear,
    PrunedConv2d,
    PrunedLinear,
    SharedConv2d,
    SharedLinear,
    TTQConv2d,
    TTQLinear,
    XNORConv2d,
    XNORLinear,
)

__all__ = [
    "INQ",
    "TTQ",
    "XNOR",
    "BinaryConnect",
    "BinaryConnectConv2d",
    "BinaryConnectLinear",
    "ChannelShuffle",
    "DeepCompression",
    "Comparison",
    "DepthwiseConv2d",
    "DepthwiseSeparableConv2d",
    "GroupedConv2d",
    "Half",
    "HalfConv2d",
    "HalfLinear",
    "INQConv2d",
    "INQLinear",
    "Hashed",
    "HashedLinear",
    "Int8",
    "Int8Conv2d",
    "Int8Linear",
    "LowRank",
    "Mobile",
    "PrunedConv2d",
    "PrunedLinear",
    "Pruning",
    "Report",
    "SharedConv2d",
    "SharedLinear",
    "TTQConv2d",
    "TTQLinear",
    "XNORConv2d",
    "XNORLinear",
    "__version__",
    "_C",
    "compare",
    "compress",
    "convert",
    "data",
    "distill",
    "freeze",
    "graph",
    "load",
    "models",
    "nn",
    "ops",
    "quantize",
    "repack",
    "report",
    "save",
    "sensitivity",
    "train",
]
