"""nncx: compress neural networks with the classic methods, and really run the result."""

from nncx._version import __version__

__all__ = ["__version__"]
