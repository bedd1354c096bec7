"""Where the tests of the ops run them: under every path of this CPU, on the GPUs that
tests/emulator emulates, and, if there is one, on a GPU.

A test makes its tensors on the CPU and calls `nncx.ops`. At the place "cuda" each call moves them
to the GPU, at the same offset and strides, and moves back what it gives: one test for all places.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from emulator import build
from torch import Tensor
from torch.utils._pytree import tree_map_only

from nncx import _C

NATIVE = torch.ops.nncx
CPU_PATHS: list[str] = _C.supported_isas()
# What the emulated GPU's code was compiled for: csrc/cuda/device.h.
EMULATED = ["emulated cuda_cores", "emulated sm80", "emulated sm90"]
NO_CODE = "emulated, no code"  # an older one
GPU = [pytest.param("cuda", marks=pytest.mark.cuda)] if torch.cuda.is_available() else []
PLACES = [*CPU_PATHS, *EMULATED, *GPU]

covered: set[str] = set()


@contextmanager
def at(place: str) -> Iterator[str]:
    """Runs the ops at a place."""
    covered.add(place)
    before, ops = _C.isa(), torch.ops.nncx
    if place in CPU_PATHS:
        _C.set_isa(place)
        torch.ops.nncx = NATIVE
    elif place in (*EMULATED, NO_CODE):
        emulator().nncx_emulator_set_device([*EMULATED, NO_CODE].index(place))
        torch.ops.nncx = torch.ops.nncx_emulated
    else:
        torch.ops.nncx = OpsElsewhere(NATIVE, place)
    try:
        yield place
    finally:
        _C.set_isa(before)
        torch.ops.nncx = ops


def emulator() -> ctypes.CDLL:
    """The CUDA ops for tensors of the CPU; skips the test where they cannot be compiled."""
    library = _emulator()
    if isinstance(library, RuntimeError):
        raise library
    return library


@cache
def _emulator() -> ctypes.CDLL | RuntimeError:
    """What does not compile fails once, not in every test."""
    try:
        library = str(build.build_or_skip())
    except RuntimeError as error:
        return error
    torch.ops.load_library(library)
    return ctypes.CDLL(library)


def broken_weights(prepacked: Tensor, place: str) -> list[Tensor]:
    """Copies of a prepacked weight that an op can tell to be none, whose memory it may read."""
    lengths = [prepacked[:40].clone(), prepacked[:-1].clone()]
    return [*lengths, torch.zeros_like(prepacked)] if place in CPU_PATHS else lengths


class OpsElsewhere:
    """The ops of a namespace, for tensors of the CPU, computed on another device."""

    def __init__(self, ops: Any, device: str) -> None:
        self._ops = ops
        self._device = device

    def __getattr__(self, name: str) -> Any:
        op = getattr(self._ops, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = tree_map_only(Tensor, self._there, (args, kwargs))
            return tree_map_only(Tensor, lambda t: moved(t, "cpu"), op(*args, **kwargs))

        return call

    def _there(self, tensor: Tensor) -> Tensor:
        return moved(tensor, self._device)


def moved(tensor: Tensor, device: str) -> Tensor:
    """The tensor in a copy of its memory: `.to()` would make it dense, and aligned."""
    memory = tensor.untyped_storage().to(device=torch.device(device))
    if device == str(tensor.device):
        memory = memory.clone()
    there = torch.empty(0, dtype=tensor.dtype, device=device)
    return there.set_(memory, tensor.storage_offset(), tensor.shape, tensor.stride())
