"""16-bit storage: half the file."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from nncx.compress._counterpart import GEOMETRY, counterpart
from nncx.nn.half import STORAGES, HalfConv2d, HalfLinear

_LAYERS = {nn.Conv2d: HalfConv2d, nn.Linear: HalfLinear}
_NAMES = {dtype: name for name, dtype in STORAGES.items()}


@dataclass(frozen=True)
class Half:
    """The method of 16-bit weights for `nncx.convert`: every `nn.Conv2d` and `nn.Linear`.

    The mildest of all: nothing is trained or calibrated, and what the network computes are floats,
    with weights rounded to 16 bits, in which the file holds them. It is not faster. The first and
    the last layer become so too; biases and BatchNorms stay as they are.

    Args:
        dtype: torch.float16 (precise to 11 bits) or torch.bfloat16 (to 8, but of any size).

    Raises:
        ValueError: for another dtype.
    """

    dtype: torch.dtype = torch.float16

    keeps_first_and_last: ClassVar[bool] = False
    binarizes_input: ClassVar[bool] = False
    folds: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.dtype not in _NAMES:
            raise ValueError(
                f"Half: dtype must be torch.float16 or torch.bfloat16, got {self.dtype}"
            )

    def replaces(self, module: nn.Module) -> bool:
        """Whether the method has a layer for `module`; subclasses may mean something else."""
        return type(module) in GEOMETRY

    def replace(self, module: nn.Module) -> nn.Module:
        """The 16-bit layer, with the very Parameters of `module`, which optimizers may hold."""
        return counterpart(module, _LAYERS[type(module)], storage=_NAMES[self.dtype])
