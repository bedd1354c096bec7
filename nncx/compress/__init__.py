"""Compression methods, and what applies them to a model."""

from nncx.compress._convert import Method, convert
from nncx.compress._fold import fold_batch_norm
from nncx.compress._freeze import freeze, repack
from nncx.compress.binary_connect import BinaryConnect
from nncx.compress.half import Half
from nncx.compress.hashed import Hashed
from nncx.compress.int8 import Int8
from nncx.compress.int8_ptq import Sensitivity, quantize, sensitivity, vanhoucke
from nncx.compress.mobile import Mobile
from nncx.compress.xnor import XNOR

__all__ = [
    "BinaryConnect",
    "XNOR",
    "Half",
    "Hashed",
    "Int8",
    "Method",
    "Mobile",
    "Sensitivity",
    "convert",
    "fold_batch_norm",
    "freeze",
    "quantize",
    "repack",
    "sensitivity",
    "vanhoucke",
]
