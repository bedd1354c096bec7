"""Channel shuffle: interleaves groups of channels between grouped convolutions.

Paper: Zhang et al., ShuffleNet, 2018 (arXiv:1707.01083).
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from nncx.ops._common import call_op, check, shape_text
from nncx.ops._conv2d import memory_format


def channel_shuffle(input: Tensor, groups: int) -> Tensor:
    """``F.channel_shuffle(input, groups)``: channel ``g * C / groups + c`` to ``c * groups + g``.

    Args:
        input: ``[N, C, ...]`` of any dtype with elements of 1, 2, 4 or 8 bytes, contiguous or
            channels_last: neither is copied first. A device without a kernel is left to torch.
        groups: divides C.

    Returns:
        The shape and dtype of the input: channels_last if the input is, else contiguous. Its
        gradient is shuffled back, by ``channel_shuffle(gradient, C // groups)``.

    Raises:
        RuntimeError: for fewer than 3 dimensions, groups that do not divide C, or larger elements.
    """
    if not (input.is_cpu or input.is_cuda or input.is_meta):  # quicker than device.type
        return channel_shuffle_reference(input, groups)
    return call_op(torch.ops.nncx.channel_shuffle, input, groups)


@torch.library.register_fake("nncx::channel_shuffle")
def _fake(input: Tensor, groups: int) -> Tensor:
    op = "channel_shuffle"
    check(
        input.dim() >= 3,
        lambda: (
            f"{op}: input must be [N, C, ...] of at least 3 dimensions, got shape "
            f"{shape_text(input)}"
        ),
    )
    check_shuffle(op, "groups", groups, input.shape[1])
    check(
        input.element_size() <= 8,
        lambda: f"{op}: input must have elements of at most 8 bytes, got {input.dtype}",
    )
    kept = memory_format(input) if input.dim() == 4 else torch.contiguous_format
    return torch.empty_like(input, memory_format=kept)


def check_shuffle(op: str, name: str, groups: int, channels: int) -> None:
    check(
        groups >= 1 and channels % groups == 0,
        lambda: f"{op}: {name} must divide the channels, got {name}={groups}, channels={channels}",
    )


def unshuffle(gradient: Tensor, groups: int) -> Tensor:
    """The inverse of `channel_shuffle`."""
    return channel_shuffle(gradient, max(gradient.shape[1] // groups, 1))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.groups = inputs


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    return unshuffle(gradient, ctx.groups), None


torch.library.register_autograd("nncx::channel_shuffle", _backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.nncx.channel_shuffle)
def _flops(*args: object, **kwargs: object) -> int:
    return 0  # nothing is computed


def channel_shuffle_reference(input: Tensor, groups: int) -> Tensor:
    """`channel_shuffle` in plain PyTorch."""
    return input.unflatten(1, (groups, input.shape[1] // groups)).transpose(1, 2).flatten(1, 2)
