"""Depthwise convolution: every channel is filtered alone.

Papers: Howard et al., MobileNets, 2017 (arXiv:1704.04861); Chollet, Xception, 2017
(arXiv:1610.02357).
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

_DEVICES = ("cpu", "cuda", "meta")  # that have a kernel


def depthwise_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    activation: str = "none",
) -> Tensor:
    """``activation(F.conv2d(input, weight, bias, ..., groups=C))``, summed in float32.

    Args:
        input: float32, float16 or bfloat16 ``[N, C, H, W]``, contiguous or channels_last: neither
            is copied. float64, and a device without a kernel, is left to torch's convolution.
        weight: ``[C * multiplier, 1, kh, kw]`` in the input's dtype; outputs ``c * multiplier`` to
            ``(c + 1) * multiplier - 1`` are made of channel ``c``.
        bias: ``[C * multiplier]`` in the input's dtype.
        stride, padding, dilation: as nn.Conv2d.
        activation: none, relu or relu6.

    Returns:
        ``[N, C * multiplier, H', W']`` in the input's dtype: channels_last if the input is, else
        contiguous. The same bits on every run and thread count of one path, and within ``(kh * kw +
        1) * 2**-23 * (|bias| + sum |w x|)`` of the exact sum before it is rounded to the dtype.
        Gradients are those of torch's convolution.

    Raises:
        RuntimeError: if shapes, dtypes or devices do not fit.
    """
    geometry = pair(stride), pair(padding), pair(dilation)
    if input.dtype == torch.float64 or input.device.type not in _DEVICES:
        _check(input, weight, bias, *geometry, activation)
        return depthwise_conv2d_reference(input, weight, bias, *geometry, activation)
    return call_op(torch.ops.nncx.depthwise_conv2d, input, weight, bias, *geometry, activation)


def check_depthwise_weight(op: str, name: str, input: Tensor, weight: Tensor) -> None:
    def sentence() -> str:
        return (
            f"{op}: {name} must be [C * multiplier, 1, kh, kw] for an input of C = "
            f"{input.shape[1]} channels, got shape {shape_text(weight)}"
        )

    check(weight.dim() == 4, sentence)
    outputs, one, *kernel_size = weight.shape
    channels = input.shape[1]
    check(one == 1 and min(kernel_size) >= 1, sentence)
    check(outputs % channels == 0 if channels else outputs == 0, sentence)
    check_filters(op, channels, outputs, kernel_size, max(channels, 1))
    check_operand(op, name, input, weight, list(weight.shape), input.dtype)


def _check(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
) -> list[int]:
    """Height and width of the output."""
    op = "depthwise_conv2d"
    check_window(op, stride, padding, dilation)
    check_images(op, input)
    check_depthwise_weight(op, "weight", input, weight)
    if bias is not None:
        check_operand(op, "bias", input, bias, [weight.shape[0]], input.dtype)
    check_activation(op, activation)
    return output_size(op, input.shape[2:], weight.shape[2:], stride, padding, dilation)


@torch.library.register_fake("nncx::depthwise_conv2d")
def _fake(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    activation: str = "none",
) -> Tensor:
    check_input_dtype("depthwise_conv2d", input)
    size = _check(input, weight, bias, stride, padding, dilation, activation)
    return empty_output(input, weight.shape[0], size)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, bias, *ctx.geometry, activation = inputs
    save_convolution(ctx, input, weight, bias, output, activation)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    channels = ctx.saved_tensors[0].shape[1]
    gradients = convolution_gradients(ctx, before_activation(ctx, gradient), channels)
    return *gradients, None, None, None, None


torch.library.register_autograd("nncx::depthwise_conv2d", _backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.nncx.depthwise_conv2d)
def _flops(
    input_shape: Sequence[int],
    weight_shape: Sequence[int],
    *args: object,
    out_shape: Sequence[int],
    **kwargs: object,
) -> int:
    """2 per weight and output pixel, as torch counts a multiply and an add."""
    return 2 * math.prod(out_shape) * math.prod(weight_shape[2:])


def depthwise_conv2d_reference(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    activation: str = "none",
) -> Tensor:
    """`depthwise_conv2d` in plain PyTorch."""
    geometry = pair(stride), pair(padding), pair(dilation)
    return activate(F.conv2d(input, weight, bias, *geometry, input.shape[1]), activation)
