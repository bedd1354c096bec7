"""What the Python side of every 2-D convolution shares: geometry, its checks, and gradients."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nncx.ops._activation import mask_gradient
from nncx.ops._common import check, check_weight_shape, shape_text


def pair(value: int | Sequence[int]) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


def check_groups(op: str, in_channels: int, out_channels: int, groups: int) -> None:
    check(
        groups >= 1
        and in_channels >= 0
        and out_channels >= 0
        and in_channels % groups == 0
        and out_channels % groups == 0,
        lambda: (
            f"{op}: groups must divide in_channels and out_channels, got groups={groups}, "
            f"in_channels={in_channels}, out_channels={out_channels}"
        ),
    )


def check_filters(
    op: str, in_channels: int, out_channels: int, kernel_size: Sequence[int], groups: int
) -> None:
    """Checks what gives the weight its shape."""
    check_groups(op, in_channels, out_channels, groups)
    check_pair(op, "kernel_size", kernel_size, 1)
    check_weight_shape(
        op, groups, out_channels // groups, math.prod(kernel_size), in_channels // groups
    )


def check_window(
    op: str, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> None:
    check_pair(op, "stride", stride, 1)
    check_pair(op, "padding", padding, 0)
    check_pair(op, "dilation", dilation, 1)


def check_pair(op: str, name: str, given: Sequence[int], least: int) -> None:
    """Refuses an `int[2]` that is not two numbers of at least `least`."""
    most = 2**31 - 1
    check(
        len(given) == 2 and least <= min(given) and max(given) <= most,
        lambda: f"{op}: {name} must be two numbers from {least} to {most}, got {list(given)}",
    )


def output_size(
    op: str,
    size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """Height and width of the output for an input of `size`, which is checked."""
    padded = [size[i] + 2 * padding[i] for i in range(2)]
    spans = [padded[i] - dilation[i] * (kernel_size[i] - 1) - 1 for i in range(2)]
    for span in spans:
        check(
            span >= 0,
            lambda: (
                f"{op}: the padded input must be at least as large as the dilated kernel, got "
                f"input {size[0]} x {size[1]}, kernel_size {kernel_size[0]} x {kernel_size[1]}, "
                f"padding {padding[0]} x {padding[1]}"
            ),
        )
    check(
        padded[0] * padded[1] <= 2**31,
        lambda: (
            f"{op}: the padded input must have at most 2^31 pixels an image, got {padded[0]} x "
            f"{padded[1]}"
        ),
    )
    return [span // s + 1 for span, s in zip(spans, stride, strict=True)]


def memory_format(input: Tensor) -> torch.memory_format:
    """Of the output: torch's convolutions keep that of their input."""
    channels_last = input.is_contiguous(memory_format=torch.channels_last)
    if channels_last and not input.is_contiguous():
        return torch.channels_last
    return torch.contiguous_format


def check_images(op: str, input: Tensor) -> None:
    check(
        input.dim() == 4,
        lambda: f"{op}: input must be [N, C, H, W], got shape {shape_text(input)}",
    )


def empty_output(input: Tensor, channels: int, size: Sequence[int]) -> Tensor:
    """Of a convolution of floats."""
    return torch.empty(
        [input.shape[0], channels, *size],
        dtype=input.dtype,
        device=input.device,
        memory_format=memory_format(input),
    )


def save_convolution(
    ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, output: Tensor, activation: str
) -> None:
    """Keeps what the two functions below need in `ctx`, besides `ctx.geometry`."""
    ctx.activation = activation
    ctx.has_bias = bias is not None
    saved = () if activation == "none" else (output,)
    ctx.save_for_backward(input, weight, *saved)


def before_activation(ctx: Any, gradient: Tensor) -> Tensor:
    """The gradient of what went into the activation."""
    _, _, *output = ctx.saved_tensors
    return mask_gradient(gradient, *output, ctx.activation) if output else gradient


def convolution_gradients(ctx: Any, gradient: Tensor, groups: int) -> list[Tensor | None]:
    """Of input, weight and bias; `gradient` is that of the convolution's output."""
    input, weight, *_ = ctx.saved_tensors
    needs = ctx.needs_input_grad  # ends before a bias that was left out
    wanted = [needs[0], needs[1], ctx.has_bias and needs[2]]
    return convolution_backward(gradient, input, weight, ctx.geometry, groups, wanted)


def convolution_backward(
    gradient: Tensor,
    input: Tensor,
    weight: Tensor,
    geometry: Sequence[Sequence[int]],
    groups: int,
    wanted: list[bool],
) -> list[Tensor | None]:
    """Gradients of input, weight and bias, those that are wanted; `geometry` as F.conv2d has it."""
    bias_sizes = [weight.shape[0]]
    return torch.ops.aten.convolution_backward(
        gradient, input, weight, bias_sizes, *geometry, False, [0, 0], groups, wanted
    )
