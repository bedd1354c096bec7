"""Trained Ternary Quantization: three values a weight, two of them learned."""

from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar

import torch
from torch import nn

from nncx.compress._counterpart import counterpart, torch_type
from nncx.compress._rates import by_rate
from nncx.nn.ttq import TTQConv2d, TTQLinear, check_threshold

_LAYERS = {nn.Conv2d: TTQConv2d, nn.Linear: TTQLinear}
_LARGEST = torch.finfo(torch.float32).max


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
        if not isinstance(self.initial, Real) or not 0 < self.initial <= _LARGEST:
            raise ValueError(
                f"TTQ: initial must be a positive float32, got {self.initial!r}; leave it None for"
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


def parameter_groups(model: nn.Module, lr: float, squared: bool = False) -> list[dict[str, Any]]:
    """The parameters of `model` for any optimizer, with smaller steps for the learned values.

        optimizer = torch.optim.Adam(parameter_groups(model, lr=1e-3))

    Wp and Wn learn with `lr` times their magnitude of now, or its square if `squared`. A step of
    Adam is as large as its rate, whatever the gradient: at 3e-3 a value of 0.03, which is that of
    an ordinary layer, changes by a tenth, and can pass 0 within an epoch, from where few networks
    come back. The paper's code begins with 1.0; relative to that its rate is what this one is.

    Args:
        model: after `convert`.
        lr: the rate of all other parameters.
        squared: for optimizers whose step grows with the gradient (SGD, with momentum or without);
            False for those that normalise it (Adam, RMSprop, Adagrad).

    Returns:
        One group for each rate, with "params" and "lr"; every parameter in one of them.

    Raises:
        ValueError: if `model` has no TTQ layer with float weights.
    """
    layers = [m for m in model.modules() if isinstance(m, TTQConv2d | TTQLinear) and not m.frozen]
    if not layers:
        raise ValueError(
            f"parameter_groups: {type(model).__name__} must have a TTQ layer with float weights,"
            " got none; call nncx.convert(model, nncx.TTQ()) first"
        )
    values = [value for layer in layers for value in (layer.positive, layer.negative)]
    power = 2 if squared else 1
    return by_rate(model, lr, {value: lr * abs(value.item()) ** power for value in values})
