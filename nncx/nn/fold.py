"""What follows a binary layer, up to the next sign, as one threshold per output channel."""

import torch
from torch import Tensor, nn

from nncx.nn.xnor import XNORConv2d, XNORLinear

ALWAYS = torch.iinfo(torch.int32).min  # every dot product reaches it


@torch.no_grad()
def fold_sign(layer: XNORConv2d | XNORLinear, *after: nn.Module) -> tuple[Tensor, Tensor]:
    """Find where the sign of `after(layer(x))` changes, as `binary_conv2d_sign` compares.

    A binary layer gives `alpha * dot + bias` for an integer dot product. What follows up to the
    next sign (a BatchNorm in eval mode, say) rises or falls with it, channel by channel; hence its
    sign changes at most once, and the bit is `(dot >= threshold) xor flip`. The threshold is found
    by bisection with the layers themselves, so that their rounding is folded too. A channel whose
    sign never changes (gamma = 0) gets a threshold that every dot product reaches.

    Args:
        layer: in eval mode, frozen or not; scale "none" or "alpha".
        after: modules that map each channel on its own, monotonically; in eval mode.

    Returns:
        threshold, int32 ``[O]``, and flip, bool ``[O]``, on the layer's device.

    Raises:
        ValueError: if the layer scales by its input (`scale="alpha_k"`), which no constant
            threshold can follow, or if anything is in training mode.
    """
    if layer.scale == "alpha_k":
        raise ValueError(
            "fold_sign: the layer must not scale by its input, got scale='alpha_k'; use 'alpha'"
        )
    for module in (layer, *after):
        if module.training:
            raise ValueError(
                f"fold_sign: {type(module).__name__} must be in eval mode, got training mode; call"
                " eval()"
            )
    is_conv = isinstance(layer, nn.Conv2d)
    channels = layer.out_channels if is_conv else layer.out_features
    most = layer.in_features if not is_conv else _taps(layer)
    shape = (1, channels, 1, 1) if is_conv else (1, channels)
    alpha = None if layer.alpha is None else layer.alpha.view(shape)
    bias = None if layer.bias is None else layer.bias.float().view(shape)

    def positive(dots: Tensor) -> Tensor:
        y = dots.view(shape).float()
        y = y if alpha is None else y * alpha
        y = y if bias is None else y + bias
        for module in after:
            y = module(y)
        return (y >= 0).flatten()

    device = next(layer.buffers(), next(layer.parameters(), torch.empty(0))).device
    low = torch.full((channels,), -most, dtype=torch.int32, device=device)
    high = -low
    at_low, at_high = positive(low), positive(high)
    while bool((high - low > 1).any()):  # the sign changes behind `low`, not behind `high`
        middle = (low + high) // 2
        reached = positive(middle) == at_high
        high = torch.where(reached, middle, high)
        low = torch.where(reached, low, middle)
    return torch.where(at_low == at_high, ALWAYS, high), ~at_high


def _taps(layer: nn.Conv2d) -> int:
    """Weights of one filter."""
    return layer.in_channels // layer.groups * layer.kernel_size[0] * layer.kernel_size[1]
