"""Compression methods, and what applies them to a model."""

from nncx.compress._convert import Method, convert
from nncx.compress._fold import fold_batch_norm
from nncx.compress._freeze import freeze, repack, thaw
from nncx.compress._scan import Scan, ScanRow
from nncx.compress.binary_connect import BinaryConnect
from nncx.compress.dead_filters import remove_dead_filters
from nncx.compress.deep_compression import DeepCompression
from nncx.compress.dropout import adjust_dropout
from nncx.compress.filter_pruning import filter_sensitivity, prune_filters
from nncx.compress.half import Half
from nncx.compress.hashed import Hashed
from nncx.compress.inq import INQ
from nncx.compress.int8 import Int8
from nncx.compress.int8_ptq import Sensitivity, quantize, sensitivity, vanhoucke
from nncx.compress.low_rank import LowRank
from nncx.compress.masks import remove_masks
from nncx.compress.mobile import Mobile
from nncx.compress.pruning import Pruning, pruning_sensitivity
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
    "adjust_dropout",
    "convert",
    "filter_sensitivity",
    "fold_batch_norm",
    "freeze",
    "prune_filters",
    "pruning_sensitivity",
    "quantize",
    "reconstruct",
    "remove_dead_filters",
    "remove_masks",
    "repack",
    "sensitivity",
    "thaw",
    "vanhoucke",
]
