"""Loads the native libraries: one that is missing or does not fit is an error, not a slow path."""

from pathlib import Path

import torch

_MEND = "reinstall with `pip install --force-reinstall --no-deps .` in a checkout of nncx"

try:
    from nncx import _C
except ImportError as error:
    raise ImportError(f"nncx's native library cannot be loaded ({error}); {_MEND}") from error

CUDA_LIBRARY = Path(__file__).parent / "_cuda.so"


def _load_cuda() -> None:
    try:
        torch.ops.load_library(CUDA_LIBRARY)
    except OSError as error:
        raise ImportError(f"nncx's CUDA library cannot be loaded ({error}); {_MEND}") from error


if torch.version.cuda and CUDA_LIBRARY.exists():
    _load_cuda()

__all__ = ["CUDA_LIBRARY", "_C"]
