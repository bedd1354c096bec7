"""Trained Ternary Quantization: three values a weight, two of them learned."""

import math
from dataclasses import dataclass
from numbers import Real
from typing import ClassVar

from torch import nn

from nncx.compress._counterpart import counterpart, torch_type
from nncx.nn.ttq import TTQConv2d, TTQLinear, check_threshold

_LAYERS = {nn.Conv2d: TTQConv2d, nn.Linear: TTQLinear}


@dataclass(frozen=True)
class TTQ:
    """The method of Trained Ternary Quantization for `nncx.convert`: `nn.Conv2d` and `nn.Linear`.

    The first and the last layer stay float by default, as in the paper; so do biases and
    BatchNorms. A pruned layer is taken with its mask: what is 0 stays 0.

    It is meant for a trained float network. Each new layer has two Parameters more, its learned
    values Wp and Wn: make the optimizer after `convert`. They begin as the mean magnitudes of the
    weights that they stand for, which for given regions is what differs least from the float weight
    (in squares): the network computes nearly what it did, and BatchNorms keep their statistics.
    With the 1.0 of the paper's code each layer's output would be larger than before by one over the
    size of its weights, which in a trained network is 10 to 100 times.

    Args:
        threshold: of a layer's largest magnitude, what a weight must exceed not to become 0.
        initial: the first value of Wp and Wn; None for the mean magnitudes.

    Raises:
        ValueError: for a threshold that is not in [0, 1), or an `initial` that is not positive.

    Paper: Zhu et al., "Trained Ternary Quantization", ICLR 2017.
    """

    threshold: float = 0.05
    initial: float | None = None

    keeps_first_and_last: ClassVar[bool] = True
    binarizes_input: ClassVar[bool] = False
    folds: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_threshold("TTQ", self.threshold)
        if self.initial is None:
            return
        if not isinstance(self.initial, Real) or not 0 < self.initial < math.inf:
            raise ValueError(
                f"TTQ: initial must be a positive number, got {self.initial!r}; leave it None for"
                " the mean magnitudes"
            )

    def replaces(self, module: nn.Module) -> bool:
        """Whether the method has a layer for `module`: of torch exactly, or a pruned one."""
        return torch_type(module) is not None

    def replace(self, module: nn.Module) -> nn.Module:
        """The ternary layer, with the very Parameters of `module` and its mask."""
        layer = counterpart(module, _LAYERS[torch_type(module)], threshold=self.threshold)
        if self.initial is not None:
            nn.init.constant_(layer.positive, self.initial)
            nn.init.constant_(layer.negative, self.initial)
            layer.repack()
        return layer
