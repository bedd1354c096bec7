"""Convolution of 8-bit integers, exact in int32.

Jacob et al., "Quantization and training of neural networks for efficient integer-arithmetic-only
inference", CVPR 2018.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from nncx._native import _C
from nncx.ops._common import call_op, check, refuse_gradient, shape_text
from nncx.ops._conv2d import check_filters, check_window, output_size, pair
from nncx.ops._int8 import Epilogue, check_epilogue, check_int8, check_terms, finish


def int8_conv2d_prepack(weight: Tensor, groups: int = 1) -> Tensor:
    """Reorders the weights of `int8_conv2d` for the CPU path of this process, or for a GPU.

    Args:
        weight: int8 ``[out_channels, in_channels / groups, kernel_h, kernel_w]``; a filter has at
            most 65,793 weights.
        groups: as in ``nn.Conv2d``.

    Returns:
        uint8, one dimension, opaque: its order is the path's, and its header names path and shape.
        Other paths refuse it; it is never stored in files.

    Raises:
        RuntimeError: for another shape, dtype or number of groups.
    """
    return torch.ops.nncx.int8_conv2d_prepack(weight, groups)


def int8_conv2d(
    input: Tensor,
    weight: Tensor,
    in_channels: int,
    out_channels: int,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    input_zero_point: Tensor | None = None,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
    residual_zero_point: Tensor | None = None,
    activation: str = "none",
    out_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    channels_last: bool = True,
) -> Tensor:
    """``activation((F.conv2d(q - zero_point, w) * scale + bias) + residual)``.

    The sum is exact in integers, and padded positions add nothing to it; each operation behind it
    is rounded to float32 on its own.

    Args:
        input: int8 ``[N, in_channels, H, W]`` from `quantize_int8` (channels_last saves a copy).
        weight: from `int8_conv2d_prepack`.
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups: as nn.Conv2d.
        input_zero_point: int8 ``[]``; 0 by default.
        scale: float32 ``[out_channels]``: the weights' scales times the input's.
        bias: float32 ``[out_channels]``.
        residual: added before the activation: of the output's shape, in float32, float16 or
            bfloat16, or in int8, which stands for
            ``(residual - residual_zero_point) * residual_scale``.
        residual_scale, residual_zero_point: float32 ``[]`` and int8 ``[]``, of an int8 residual.
        activation: none, relu or relu6.
        out_scale, out_zero_point: float32 ``[]`` and int8 ``[]``: the output is int8, with the
            bytes that `quantize_int8` makes of the float32 output.
        out_dtype: float32 (default), float16 or bfloat16; int8 only with `out_scale`.
        channels_last: the strides of a float output; int8 is always channels_last.

    Returns:
        ``[N, out_channels, H', W']``. Every path returns the same bits.

    Raises:
        RuntimeError: if shapes, dtypes or the path of `weight` do not fit; in backward: no gradient
            flows through 8-bit codes.
    """
    return call_op(
        torch.ops.nncx.int8_conv2d,
        input,
        weight,
        in_channels,
        out_channels,
        pair(kernel_size),
        pair(stride),
        pair(padding),
        pair(dilation),
        groups,
        input_zero_point,
        scale,
        bias,
        residual,
        residual_scale,
        residual_zero_point,
        activation,
        out_scale,
        out_zero_point,
        out_dtype,
        channels_last,
    )


@torch.library.register_fake("nncx::int8_conv2d_prepack")
def _prepack_fake(weight: Tensor, groups: int = 1) -> Tensor:
    op = "int8_conv2d_prepack"
    check_int8(op, "weight", weight)
    check(
        weight.dim() == 4,
        lambda: (
            f"{op}: weight must be [out_channels, in_channels/groups, kernel_h, kernel_w], got "
            f"shape {shape_text(weight)}"
        ),
    )
    check(groups >= 1, lambda: f"{op}: groups must be at least 1, got {groups}")
    out_channels, channels, *kernel_size = weight.shape
    check_filters(op, channels * groups, out_channels, kernel_size, groups)
    taps = math.prod(kernel_size)
    check_terms(op, taps, channels)
    numel = _C.int8_prepacked_numel(
        groups, out_channels // groups, taps, channels, weight.device.type
    )
    return weight.new_empty(numel, dtype=torch.uint8)


@torch.library.register_fake("nncx::int8_conv2d")
def _fake(
    input: Tensor,
    weight: Tensor,
    in_channels: int,
    out_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    input_zero_point: Tensor | None = None,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
    residual_zero_point: Tensor | None = None,
    activation: str = "none",
    out_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    channels_last: bool = True,
) -> Tensor:
    op = "int8_conv2d"
    check_filters(op, in_channels, out_channels, kernel_size, groups)
    check_terms(op, math.prod(kernel_size), in_channels // groups)
    check_window(op, stride, padding, dilation)
    check_int8(op, "input", input)
    check(
        input.dim() == 4 and input.shape[1] == in_channels,
        lambda: f"{op}: input must be [N, {in_channels}, H, W], got shape {shape_text(input)}",
    )
    size = output_size(op, input.shape[2:], kernel_size, stride, padding, dilation)
    shape = [input.shape[0], out_channels, *size]
    epilogue = Epilogue(
        input_zero_point,
        scale,
        bias,
        None,
        residual,
        residual_scale,
        residual_zero_point,
        activation,
        out_scale,
        out_zero_point,
        out_dtype,
    )
    dtype = check_epilogue(op, input, weight, epilogue, shape)
    strides = (
        torch.channels_last if channels_last or dtype == torch.int8 else torch.contiguous_format
    )
    return torch.empty(shape, dtype=dtype, device=input.device, memory_format=strides)


refuse_gradient("int8_conv2d", "8-bit codes", "train with nncx.Int8Conv2d")


@register_flop_formula(torch.ops.nncx.int8_conv2d)
def _flops(
    input_shape: Sequence[int],
    weight_shape: Sequence[int],
    in_channels: int,
    out_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    *args: object,
    out_shape: Sequence[int],
    **kwargs: object,
) -> int:
    """2 per product, as torch counts a multiply and an add."""
    return 2 * math.prod(out_shape) * math.prod(kernel_size) * in_channels // groups


def int8_conv2d_reference(
    input: Tensor,
    weight: Tensor,
    in_channels: int,
    out_channels: int,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    channels_last: bool = True,
    **epilogue: object,
) -> Tensor:
    """`int8_conv2d` in plain PyTorch, on weights ``[out_channels, in_channels / groups, ...]``."""
    e = Epilogue(**{name: None for name in Epilogue._fields} | {"activation": "none"} | epilogue)
    zero_point = 0 if e.input_zero_point is None else e.input_zero_point.double()
    x = input.double() - zero_point  # float64 holds the sums: they are below 2^53
    y = F.conv2d(x, weight.double(), None, pair(stride), pair(padding), pair(dilation), groups)
    y = finish(y.long(), e)
    channels_last = channels_last or y.dtype == torch.int8
    return y.contiguous(
        memory_format=torch.channels_last if channels_last else torch.contiguous_format
    )
