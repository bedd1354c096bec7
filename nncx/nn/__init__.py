"""Drop-in layers: torch's layers, in few values or in few weights, that run on native kernels."""

from nncx.nn.binary_connect import BinaryConnectConv2d, BinaryConnectLinear
from nncx.nn.fold import fold_sign
from nncx.nn.half import HalfConv2d, HalfLinear
from nncx.nn.hashed import HashedLinear
from nncx.nn.inq import INQConv2d, INQLinear
from nncx.nn.int8 import Int8Conv2d, Int8Linear
from nncx.nn.losses import SquaredHingeLoss
from nncx.nn.mobile import (
    ChannelShuffle,
    DepthwiseConv2d,
    DepthwiseSeparableConv2d,
    GroupedConv2d,
)
from nncx.nn.native import NativeLayer
from nncx.nn.packed import PackedLayer
from nncx.nn.pruned import PrunedConv2d, PrunedLinear
from nncx.nn.shared import SharedConv2d, SharedLinear
from nncx.nn.ttq import TTQConv2d, TTQLinear
from nncx.nn.xnor import XNORConv2d, XNORLinear

__all__ = [
    "BinaryConnectConv2d",
    "BinaryConnectLinear",
    "ChannelShuffle",
    "DepthwiseConv2d",
    "DepthwiseSeparableConv2d",
    "GroupedConv2d",
    "HalfConv2d",
    "HalfLinear",
    "INQConv2d",
    "INQLinear",
    "HashedLinear",
    "Int8Conv2d",
    "Int8Linear",
    "NativeLayer",
    "PackedLayer",
    "PrunedConv2d",
    "PrunedLinear",
    "SharedConv2d",
    "SharedLinear",
    "SquaredHingeLoss",
    "TTQConv2d",
    "TTQLinear",
    "XNORConv2d",
    "XNORLinear",
    "fold_sign",
]
