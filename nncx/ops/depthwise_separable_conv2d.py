"""Depthwise separable convolution: each channel filtered alone, then all mixed pixel by pixel.

Paper: Howard et al., MobileNets, 2017 (arXiv:1704.04861).
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from nncx.ops._activation import check_activation, mask_gradient
from nncx.ops._common import call_op, check, check_input_dtype, check_operand, shape_text
from nncx.ops._conv2d import (
    check_filters,
    check_images,
    check_window,
    convolution_backward,
    empty_output,
    output_size,
    pair,
)
from nncx.ops.depthwise_conv2d import (
    check_depthwise_weight,
    depthwise_conv2d,
    depthwise_conv2d_reference,
)
from nncx.ops.grouped_conv2d import grouped_conv2d, grouped_conv2d_reference

_DEVICES = ("cpu", "meta")  # that run both convolutions at once
_POINTWISE = [1, 1], [0, 0], [1, 1]  # stride, padding, dilation


def depthwise_separable_conv2d(
    input: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    depthwise_bias: Tensor | None = None,
    pointwise_bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    depthwise_activation: str = "none",
    activation: str = "none",
) -> Tensor:
    """``grouped_conv2d(depthwise_conv2d(input, ...), ...)``, its bits, in one go.

    On a CPU a thread takes a few lines through both convolutions, so that they stay in its cache.
    Elsewhere, and for float64, the two ops run one after the other.

    Args:
        input: float32, float16 or bfloat16 ``[N, C, H, W]``, contiguous or channels_last.
        depthwise_weight: ``[C * multiplier, 1, kh, kw]`` in the input's dtype.
        pointwise_weight: ``[O, C * multiplier, 1, 1]`` in the input's dtype.
        depthwise_bias: ``[C * multiplier]`` in the input's dtype.
        pointwise_bias: ``[O]`` in the input's dtype.
        stride, padding, dilation: of the depthwise convolution, as nn.Conv2d.
        depthwise_activation, activation: of the one and of the other convolution, each none, relu
            or relu6.

    Returns:
        ``[N, O, H', W']`` in the input's dtype: channels_last if the input is, else contiguous.
        What is between the convolutions is rounded to that dtype too. Gradients are those of the
        two ops; backward computes what is between them again.

    Raises:
        RuntimeError: if shapes, dtypes or devices do not fit.
    """
    tensors = input, depthwise_weight, pointwise_weight, depthwise_bias, pointwise_bias
    geometry = pair(stride), pair(padding), pair(dilation)
    activations = depthwise_activation, activation
    if input.dtype == torch.float64 or input.device.type not in _DEVICES:
        _check(*tensors, *geometry, *activations)
        between = depthwise_conv2d(
            input, depthwise_weight, depthwise_bias, *geometry, depthwise_activation
        )
        return grouped_conv2d(between, pointwise_weight, pointwise_bias, activation=activation)
    op = torch.ops.nncx.depthwise_separable_conv2d
    return call_op(op, *tensors, *geometry, *activations)


def _check(
    input: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    pointwise_bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    depthwise_activation: str,
    activation: str,
) -> list[int]:
    """Height and width of the output."""
    op = "depthwise_separable_conv2d"
    check_window(op, stride, padding, dilation)
    check_images(op, input)
    check_depthwise_weight(op, "depthwise_weight", input, depthwise_weight)
    channels = depthwise_weight.shape[0]
    check(
        pointwise_weight.dim() == 4,
        lambda: (
            f"{op}: pointwise_weight must be [O, C * multiplier, 1, 1], got shape "
            f"{shape_text(pointwise_weight)}"
        ),
    )
    outputs = pointwise_weight.shape[0]
    check_filters(op, channels, outputs, [1, 1], 1)
    check_operand(
        op, "pointwise_weight", input, pointwise_weight, [outputs, channels, 1, 1], input.dtype
    )
    for name, bias, size in (
        ("depthwise_bias", depthwise_bias, channels),
        ("pointwise_bias", pointwise_bias, outputs),
    ):
        if bias is not None:
            check_operand(op, name, input, bias, [size], input.dtype)
    check_activation(op, depthwise_activation)
    check_activation(op, activation)
    return output_size(op, input.shape[2:], depthwise_weight.shape[2:], stride, padding, dilation)


@torch.library.register_fake("nncx::depthwise_separable_conv2d")
def _fake(
    input: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    depthwise_bias: Tensor | None = None,
    pointwise_bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    depthwise_activation: str = "none",
    activation: str = "none",
) -> Tensor:
    check_input_dtype("depthwise_separable_conv2d", input)
    tensors = input, depthwise_weight, pointwise_weight, depthwise_bias, pointwise_bias
    size = _check(*tensors, stride, padding, dilation, depthwise_activation, activation)
    return empty_output(input, pointwise_weight.shape[0], size)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, depthwise_weight, pointwise_weight, depthwise_bias, _, *rest = inputs
    *ctx.geometry, ctx.depthwise_activation, ctx.activation = rest
    saved = () if ctx.activation == "none" else (output,)
    ctx.save_for_backward(input, depthwise_weight, pointwise_weight, depthwise_bias, *saved)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    input, depthwise_weight, pointwise_weight, depthwise_bias, *output = ctx.saved_tensors
    needs = [*ctx.needs_input_grad, False, False]  # which ends before what was left out
    depthwise = input, depthwise_weight, depthwise_bias
    between = depthwise_conv2d(*depthwise, *ctx.geometry, ctx.depthwise_activation)
    if output:
        gradient = mask_gradient(gradient, *output, ctx.activation)
    goes_on = needs[0] or needs[1] or needs[3]
    wanted = [goes_on, needs[2], needs[4]]
    gradient, *pointwise = convolution_backward(
        gradient, between, pointwise_weight, _POINTWISE, 1, wanted
    )
    if not goes_on:
        return None, None, pointwise[0], None, pointwise[1], *[None] * 5
    if ctx.depthwise_activation != "none":
        gradient = mask_gradient(gradient, between, ctx.depthwise_activation)
    wanted = [needs[0], needs[1], needs[3]]
    groups = input.shape[1]
    depthwise = convolution_backward(
        gradient, input, depthwise_weight, ctx.geometry, groups, wanted
    )
    return *depthwise[:2], pointwise[0], depthwise[2], pointwise[1], *[None] * 5


torch.library.register_autograd(
    "nncx::depthwise_separable_conv2d", _backward, setup_context=_setup_context
)


@register_flop_formula(torch.ops.nncx.depthwise_separable_conv2d)
def _flops(
    input_shape: Sequence[int],
    depthwise_shape: Sequence[int],
    pointwise_shape: Sequence[int],
    *args: object,
    out_shape: Sequence[int],
    **kwargs: object,
) -> int:
    """2 per weight and output pixel, as torch counts a multiply and an add."""
    weights = math.prod(depthwise_shape) + math.prod(pointwise_shape)
    return 2 * out_shape[0] * math.prod(out_shape[2:]) * weights


def depthwise_separable_conv2d_reference(
    input: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    depthwise_bias: Tensor | None = None,
    pointwise_bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    depthwise_activation: str = "none",
    activation: str = "none",
) -> Tensor:
    """`depthwise_separable_conv2d` in plain PyTorch."""
    geometry = stride, padding, dilation
    between = depthwise_conv2d_reference(
        input, depthwise_weight, depthwise_bias, *geometry, depthwise_activation
    )
    return grouped_conv2d_reference(
        between, pointwise_weight, pointwise_bias, activation=activation
    )
