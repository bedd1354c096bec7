"""The activations that an epilogue may end in."""

import torch
from torch import Tensor

from nncx.ops._common import check

ACTIVATIONS = {
    "none": lambda y: y,
    "relu": torch.relu,
    "relu6": torch.nn.functional.relu6,
}


def check_activation(op: str, activation: str) -> None:
    check(
        activation in ACTIVATIONS,
        lambda: f"{op}: activation must be none, relu or relu6, got '{activation}'",
    )


def activate(y: Tensor, activation: str) -> Tensor:
    return ACTIVATIONS[activation](y)


def mask_gradient(gradient: Tensor, output: Tensor, activation: str) -> Tensor:
    """The gradient before relu or relu6 that gave `output`; it passes where that is NaN."""
    stopped = output <= 0
    if activation == "relu6":
        stopped = stopped | (output >= 6)
    return gradient.masked_fill(stopped, 0)
