"""Loads the native libraries: one that is missing or does not fit is an error, not a slow path."""

import importlib
from pathlib import Path

import torch

MEND = "reinstall with `pip install --force-reinstall --no-deps .` in a checkout of nncx"

try:
    _C = importlib.import_module("nncx._C")
except ImportError as error:
    raise ImportError(f"nncx's native library cannot be loaded ({error}); {MEND}") from error

_C.choose_isa()

CUDA_LIBRARY = Path(__file__).parent / "_cuda.so"


def _load_cuda() -> None:
    try:
        torch.ops.load_library(CUDA_LIBRARY)
    except OSError as error:
        raise ImportError(f"nncx's CUDA library cannot be loaded ({error}); {MEND}") from error


if torch.version.cuda and _C.cuda_architectures:
    _load_cuda()

__all__ = ["CUDA_LIBRARY", "MEND", "_C"]
