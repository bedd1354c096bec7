"""Compression methods, and what applies them to a model."""

from nncx.compress._convert import Method, convert
from nncx.compress._fold import fold_batch_norm
from nncx.compress._freeze import freeze, repack
from nncx.compress._scan import Scan, ScanRow
from nncx.compress.binary_connect import BinaryConnect
from nncx.compress.dead_filters import remove_dead_filters
from nncx.compress.deep_compression import DeepCompression
from nncx.compress.filter_pruning import filter_sensitivity, prune_filters
from nncx.compress.half import Half
from nncx.compress.hashed import Hashed
from nncx.compress.inq import INQ
from nncx.compress.int8 import Int8
from nncx.compress.int8_ptq import Sensitivity, quantize, sensitivity, vanhoucke
from nncx.compress.low_rank import LowRank
from nncx.compress.mobile import Mobile
from nncx.compress.pruning import Pruning
from nncx.compress.reconstruction import Reconstruction, reconstruct
from nncx.compress.ttq import TTQ
from nncx.compress.xnor import XNOR

__all__ = [
    "BinaryConnect",
    "DeepCompression",
    "INQ",
    "TTQ",
    "XNOR",
    "Half",
    "Hashed",
    "Int8",
    "LowRank",
    "Method",
    "Mobile",
    "Pruning",
    "Reconstruction",
    "Scan",
    "ScanRow",
    "Sensitivity",
    "convert",
    "filter_sensitivity",
    "fold_batch_norm",
    "freeze",
    "prune_filters",
    "quantize",
    "reconstruct",
    "remove_dead_filters",
    "repack",
    "sensitivity",
    "vanhoucke",
]
