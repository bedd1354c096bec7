"""First weights that several networks share."""

from torch import nn


def he_by_filter(model: nn.Module) -> None:
    """Give every convolution He's weights by the inputs of a filter, grouped or not.

    By its outputs, as ResNets have it, depthwise filters would start far too small: torch counts
    the channels of all groups.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
