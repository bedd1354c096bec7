"""Compression methods, and what applies them to a model."""

from nncx.compress._convert import Method, convert
from nncx.compress._freeze import freeze, repack
from nncx.compress.binary_connect import BinaryConnect
from nncx.compress.xnor import XNOR

__all__ = ["BinaryConnect", "XNOR", "Method", "convert", "freeze", "repack"]
