"""XNOR-Net: binary weights and binary inputs."""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from nncx.compress._counterpart import GEOMETRY, counterpart
from nncx.nn.xnor import PAD_VALUES, SCALES, XNORConv2d, XNORLinear


@dataclass(frozen=True)
class XNOR:
    """The method of XNOR-Net for `nncx.convert`: every `nn.Conv2d` and `nn.Linear` becomes binary.

    The first and the last layer stay float. A ReLU in front of a binary layer goes, because the
    sign of its output is +1 everywhere; so does a dropout, because the sign of the zeros it sets is
    +1 and nothing would be dropped (in XNOR-Net no dropout precedes a sign). Where one cannot go,
    `convert` refuses. The order BatchNorm -> sign -> layer is the user's to build: no BatchNorm is
    added to a model that has none, as `nncx.models.NiN`.

    Of the released code, these are left out: at each step it subtracts from the weights their mean
    over the input channels, clamps them to [-1, 1], and multiplies their gradient by
    `(1 - 1/c_in) * n`, for c_in input channels and n weights per filter. K, the scale of the input,
    is in the paper but not in that code, and here it is off by default (`scale="alpha_k"`).

    Args:
        scale: "none", "alpha" (mean magnitude per filter), or "alpha_k" (and that of the input).
        pad_value: what zero padding counts as after the sign: 0, +1 or -1.

    Raises:
        ValueError: for other values.

    Paper: Rastegari et al., "XNOR-Net", ECCV 2016.
    """

    scale: str = "alpha"
    pad_value: int = 0

    keeps_first_and_last: ClassVar[bool] = True
    binarizes_input: ClassVar[bool] = True
    folds: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.scale not in SCALES:
            raise ValueError(f"scale must be one of {', '.join(SCALES)}, got {self.scale!r}")
        if self.pad_value not in PAD_VALUES:
            raise ValueError(f"pad_value must be -1, 0 or 1, got {self.pad_value!r}")

    def replaces(self, module: nn.Module) -> bool:
        """Whether the method has a layer for `module`; subclasses may mean something else."""
        return type(module) in GEOMETRY

    def replace(self, module: nn.Module) -> nn.Module:
        """The binary layer, with the very Parameters of `module`, which optimizers may hold."""
        if type(module) is nn.Linear:
            return counterpart(module, XNORLinear, scale=self.scale)
        # A border of the input's own values has signs already.
        pad_value = self.pad_value if module.padding_mode == "zeros" else 0
        return counterpart(module, XNORConv2d, scale=self.scale, pad_value=pad_value)
