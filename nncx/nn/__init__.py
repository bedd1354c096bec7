"""Drop-in layers: torch's layers that train in few values and run on native kernels."""

from nncx.nn.fold import fold_sign
from nncx.nn.packed import PackedLayer
from nncx.nn.xnor import XNORConv2d, XNORLinear

__all__ = ["PackedLayer", "XNORConv2d", "XNORLinear", "fold_sign"]
