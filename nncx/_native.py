"""Loads the native libraries. One that is missing or does not fit is an error, never a slow path."""

from pathlib import Path

import torch

_MEND = (
    "reinstall with `pip install --force-reinstall --no-deps --no-cache-dir .` in nncx's checkout"
)

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
