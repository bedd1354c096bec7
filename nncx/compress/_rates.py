"""Parameter groups for optimizers, where a method has rates of its own for some parameters."""

from collections.abc import Mapping
from typing import Any

from torch import nn


def by_rate(
    model: nn.Module, lr: float, rates: Mapping[nn.Parameter, float]
) -> list[dict[str, Any]]:
    """A group for each learning rate, every parameter in one; `lr` for those without a rate."""
    groups: dict[float, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        groups.setdefault(rates.get(parameter, lr), []).append(parameter)
    return [{"params": parameters, "lr": rate} for rate, parameters in groups.items()]
