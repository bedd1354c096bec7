"""nncx: compress neural networks with the classic methods, and really run the result."""

from nncx._version import __version__

from nncx._native import _C

__all__ = ["_C", "__version__"]
