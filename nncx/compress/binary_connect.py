"""BinaryConnect: binary weights, float inputs."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from nncx.compress._counterpart import GEOMETRY, counterpart
from nncx.compress._rates import by_rate
from nncx.nn.binary_connect import BinaryConnectConv2d, BinaryConnectLinear

_LAYERS = {nn.Conv2d: BinaryConnectConv2d, nn.Linear: BinaryConnectLinear}


@dataclass(frozen=True)
class BinaryConnect:
    """The method of BinaryConnect for `nncx.convert`: every `nn.Conv2d` and `nn.Linear`.

    The first and the last layer become binary as well; biases and BatchNorms stay float. Inputs
    stay float too, so that ReLUs and dropouts are kept. The new layers have no scale: put a
    BatchNorm behind each, the last one included, as `nncx.models.MLP` and `VGG9` do.

    The weights are multiplied, in place and layer by layer, by the positive number that gives them
    the mean square of Uniform(-1, 1), which is 1/3. That changes no sign. A new network thereby
    starts like the paper's, and a trained one keeps the signs it learned, and what it learned of
    their importance, instead of losing both to the first steps of an optimizer, which are large
    beside the small weights of float networks. What a trained one computes does change, since +1
    and -1 stand in for those small weights: its BatchNorms need new statistics, then it trains on.

    Args:
        stochastic: draw the weights of each forward in training at random.

    Paper: Courbariaux et al., "BinaryConnect", NeurIPS 2015.
    """

    stochastic: bool = False

    keeps_first_and_last: ClassVar[bool] = False
    binarizes_input: ClassVar[bool] = False
    folds: ClassVar[bool] = False

    def replaces(self, module: nn.Module) -> bool:
        """Whether the method has a layer for `module`; subclasses may mean something else."""
        return type(module) in GEOMETRY

    def replace(self, module: nn.Module) -> nn.Module:
        """The binary layer, with the very Parameters of `module`, the weight scaled."""
        _spread(module.weight)
        return counterpart(module, _LAYERS[type(module)], stochastic=self.stochastic)


@torch.no_grad()
def _spread(weight: torch.Tensor) -> None:
    """Scale to a mean square of 1/3; zeros stay, and so do weights that are scaled already."""
    mean_square = weight.double().square().mean()
    weight.div_((3 * mean_square).sqrt().clamp_min(torch.finfo(weight.dtype).tiny))


def parameter_groups(model: nn.Module, lr: float, squared: bool = False) -> list[dict[str, Any]]:
    """The parameters of `model` for any optimizer, with the learning rates of BinaryConnect.

        optimizer = torch.optim.Adam(parameter_groups(model, lr=3e-3))

    The weights of a BinaryConnect layer learn with `lr * c`, or `lr * c**2` if `squared`,

        c = sqrt((fan_in + fan_out) / 1.5)

    where fan_in is the number of inputs of an output, `C / groups * kh * kw`, and fan_out that of
    outputs of an input, `O / groups * kh * kw` (kernel 1x1, groups 1 for linear layers). It is the
    inverse of Glorot's standard deviation (times a constant): weights in [-1, 1] are c times those
    of a float network, so a step must be. All other parameters learn with `lr`.

    Schedulers that multiply learning rates keep the proportions, as ExponentialLR, StepLR, LambdaLR
    do; an `eta_min` or a `max_lr` is one number for all groups unless given as a list.

    Args:
        model: after `convert`.
        lr: the rate of all that is not binary.
        squared: for optimizers whose step grows with the gradient (SGD, with momentum or without);
            False for those that normalise it (Adam, RMSprop, Adagrad).

    Returns:
        One group for each rate, with "params" and "lr"; every parameter in one of them.

    Raises:
        ValueError: if `model` has no BinaryConnect layer with real weights.

    Paper: Courbariaux et al., "BinaryConnect", NeurIPS 2015, section 2.5; Glorot and Bengio, 2010.
    """
    rates = {
        module.weight: lr * _coefficient(module) ** (2 if squared else 1)
        for module in model.modules()
        if isinstance(module, tuple(_LAYERS.values())) and not module.frozen
    }
    if not rates:
        raise ValueError(
            f"parameter_groups: {type(model).__name__} must have a BinaryConnect layer with real"
            " weights, got none; call nncx.convert(model, nncx.BinaryConnect()) first"
        )
    return by_rate(model, lr, rates)


def _coefficient(layer: nn.Module) -> float:
    groups = getattr(layer, "groups", 1)
    out_channels, in_channels, *kernel = layer.weight.shape
    fans = (in_channels + out_channels // groups) * math.prod(kernel)
    return math.sqrt(fans / 1.5)
