"""Drop-in layers: torch's layers, in few values or in few weights, that run on native kernels."""

from nncx.nn.binary_connect import BinaryConnectConv2d, BinaryConnectLinear
from nncx.nn.fold import fold_sign
from nncx.nn.half import HalfConv2d, HalfLinear
from nncx.nn.hashed import HashedLinear
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
    "HashedLinear",
    "Int8Conv2d",
    "Int8Linear",
    "NativeLayer",
    "PackedLayer",
    "SquaredHingeLoss",
    "XNORConv2d",
    "XNORLinear",
    "fold_sign",
]
