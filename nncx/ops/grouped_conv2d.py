"""Grouped convolution, pointwise included, that may store its output with shuffled channels.

Papers: Howard et al., MobileNets, 2017 (arXiv:1704.04861); Zhang et al., ShuffleNet, 2018
(arXiv:1707.01083).
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from nncx.ops._activation import activate, check_activation
from nncx.ops._common import call_op, check, check_input_dtype, check_operand, shape_text
from nncx.ops._conv2d import (
    before_activation,
    check_filters,
    check_images,
    check_window,
    convolution_gradients,
    empty_output,
    output_size,
    pair,
    save_convolution,
)
from nncx.ops.channel_shuffle import channel_shuffle_reference, check_shuffle, unshuffle

_DEVICES = ("cpu", "cuda", "meta")  # that have a kernel
# Products of a number that is read or written, up to which memory is the limit of a GPU.
_MOST_REUSE = 128


def grouped_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    shuffle: int = 1,
    activation: str = "none",
) -> Tensor:
    """``channel_shuffle(activation(F.conv2d(input, weight, bias, ..., groups)), shuffle)``.

    Args:
        input: float32, float16 or bfloat16 ``[N, C, H, W]``, contiguous or channels_last: neither
            is copied. float64, and a device without a kernel, is left to torch's convolution; so
            are float16 and bfloat16 on a GPU without a shuffle where groups are so dense that not
            memory is the limit: more than 128 products for each number read or written.
        weight: ``[O, C / groups, kh, kw]`` in the input's dtype.
        bias: ``[O]`` in the input's dtype.
        stride, padding, dilation, groups: as nn.Conv2d.
        shuffle: groups in which the output's channels are shuffled, a divisor of O; 1 leaves them.
        activation: none, relu or relu6.

    Returns:
        ``[N, O, H', W']`` in the input's dtype: channels_last if the input is, else contiguous. The
        same bits on every run and thread count of one path, and within ``(K + 1) * 2**-23 * (|bias|
        + sum |w x|)`` of the exact sum of the K terms before it is rounded to the dtype. Gradients
        are those of torch's convolution.

    Raises:
        RuntimeError: if shapes, dtypes or devices do not fit.
    """
    geometry = pair(stride), pair(padding), pair(dilation), groups
    if _is_torchs(input, weight, shuffle):
        _check(input, weight, bias, *geometry, shuffle, activation)
        return grouped_conv2d_reference(input, weight, bias, *geometry, shuffle, activation)
    return call_op(
        torch.ops.nncx.grouped_conv2d, input, weight, bias, *geometry, shuffle, activation
    )


def _is_torchs(input: Tensor, weight: Tensor, shuffle: int) -> bool:
    """Whether torch's own convolution does it."""
    if input.dtype == torch.float64 or input.device.type not in _DEVICES:
        return True
    if input.device.type != "cuda" or input.dtype == torch.float32 or shuffle != 1:
        return False
    return _reuse(input, weight) > _MOST_REUSE


def _reuse(input: Tensor, weight: Tensor) -> float:
    """Products of a number of the input or output, of a convolution of stride 1."""
    if input.dim() != 4 or weight.dim() != 4 or 0 in weight.shape:
        return 0.0
    outputs, channels = weight.shape[:2]
    outputs = outputs * channels / input.shape[1]  # of a group
    return outputs * math.prod(weight.shape[1:]) / (outputs + channels)


def _check_weight(input: Tensor, weight: Tensor, groups: int) -> None:
    op = "grouped_conv2d"

    check(
        weight.dim() == 4,
        lambda: f"{op}: weight must be [O, C / groups, kh, kw], got shape {shape_text(weight)}",
    )
    check_filters(op, input.shape[1], weight.shape[0], weight.shape[2:], groups)
    channels = input.shape[1] // groups
    check(
        weight.shape[1] == channels,
        lambda: (
            f"{op}: weight must be [O, C / groups, kh, kw] with C / groups = {channels}, got shape "
            f"{shape_text(weight)}"
        ),
    )
    check_operand(op, "weight", input, weight, list(weight.shape), input.dtype)


def _check(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    shuffle: int,
    activation: str,
) -> list[int]:
    """Height and width of the output."""
    op = "grouped_conv2d"
    check_window(op, stride, padding, dilation)
    check_images(op, input)
    _check_weight(input, weight, groups)
    check_shuffle(op, "shuffle", shuffle, weight.shape[0])
    if bias is not None:
        check_operand(op, "bias", input, bias, [weight.shape[0]], input.dtype)
    check_activation(op, activation)
    return output_size(op, input.shape[2:], weight.shape[2:], stride, padding, dilation)


@torch.library.register_fake("nncx::grouped_conv2d")
def _fake(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    shuffle: int = 1,
    activation: str = "none",
) -> Tensor:
    check_input_dtype("grouped_conv2d", input)
    size = _check(input, weight, bias, stride, padding, dilation, groups, shuffle, activation)
    return empty_output(input, weight.shape[0], size)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, bias, *ctx.geometry, ctx.groups, ctx.shuffle, activation = inputs
    save_convolution(ctx, input, weight, bias, output, activation)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    gradient = before_activation(ctx, gradient)
    if ctx.shuffle != 1:
        gradient = unshuffle(gradient, ctx.shuffle)
    gradients = convolution_gradients(ctx, gradient, ctx.groups)
    return *gradients, None, None, None, None, None, None


torch.library.register_autograd("nncx::grouped_conv2d", _backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.nncx.grouped_conv2d)
def _flops(
    input_shape: Sequence[int],
    weight_shape: Sequence[int],
    *args: object,
    out_shape: Sequence[int],
    **kwargs: object,
) -> int:
    """2 per weight and output pixel, as torch counts a multiply and an add."""
    return 2 * math.prod(out_shape) * math.prod(weight_shape[1:])


def grouped_conv2d_reference(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    shuffle: int = 1,
    activation: str = "none",
) -> Tensor:
    """`grouped_conv2d` in plain PyTorch."""
    y = F.conv2d(input, weight, bias, pair(stride), pair(padding), pair(dilation), groups)
    return channel_shuffle_reference(activate(y, activation), shuffle)
