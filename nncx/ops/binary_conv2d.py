"""Convolution of packed signs on XNOR-popcount kernels (Rastegari et al., XNOR-Net, 2016)."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from nncx.ops._common import (
    call_op,
    check,
    check_epilogue,
    check_weight_shape,
    packed_bytes,
    prepacked_numel,
    refuse_gradient,
    shape_text,
    unpack_signs,
)
from nncx.ops._conv2d import check_filters, check_groups, check_window, output_size, pair


def binary_conv2d_prepack(weight: Tensor, in_channels: int, groups: int = 1) -> Tensor:
    """Reorders packed weights for the CPU path of this process, or for a GPU.

    Args:
        weight: uint8 ``[out_channels, kh, kw, 1, B]`` from ``pack_signs``.
        in_channels: all input channels of the convolution.
        groups: as in ``F.conv2d``.

    Returns:
        uint8, one dimension, opaque; it names its path and shape, and `binary_conv2d` refuses it
        under another path (``NNCX_ISA``), on another device or for another geometry. Never stored
        in files.
    """
    return torch.ops.nncx.binary_conv2d_prepack(weight, in_channels, groups)


def binary_conv2d(
    input: Tensor,
    weight: Tensor,
    in_channels: int,
    out_channels: int,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    pad_value: int = 0,
    *,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    input_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    channels_last: bool = True,
) -> Tensor:
    """``(F.conv2d(sign(x), sign(w)) * scale) * input_scale + bias``, the sum exact in integers.

    Args:
        input: uint8 ``[N, H, W, groups, B]`` from ``pack_signs(x, groups)``; padding bits are 0.
        weight: from `binary_conv2d_prepack`.
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups: as nn.Conv2d.
        pad_value: what a padded position contributes: 0 (like torch's zero padding), 1 or -1.
        scale: float32 ``[out_channels]``: alpha of XNOR-Net.
        bias: float32 ``[out_channels]``.
        input_scale: float32 ``[N, groups, H', W']``: the map K of XNOR-Net.
        out_dtype: float32 (default), float16 or bfloat16.
        channels_last: the strides of the output; False for contiguous ones.

    Returns:
        ``[N, out_channels, H', W']``. Multiply, multiply and add are rounded to float32 one by one,
        so every path returns the same bits.

    Raises:
        RuntimeError: if shapes, dtypes or the path of `weight` do not fit; in backward: no gradient
            flows through packed signs.
    """
    return call_op(
        torch.ops.nncx.binary_conv2d,
        input,
        weight,
        in_channels,
        out_channels,
        pair(kernel_size),
        pair(stride),
        pair(padding),
        pair(dilation),
        groups,
        pad_value,
        scale,
        bias,
        input_scale,
        out_dtype,
        channels_last,
    )


class Geometry(NamedTuple):
    """What the convolutions of packed signs are told after their tensors, in that order."""

    in_channels: int
    out_channels: int
    kernel_size: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int
    pad_value: int


def output_shape(op: str, input: Tensor, geometry: Geometry) -> list[int]:
    """`[N, out_channels, H', W']`, for a geometry that fits."""
    g = geometry
    check_filters(op, g.in_channels, g.out_channels, g.kernel_size, g.groups)
    check_window(op, g.stride, g.padding, g.dilation)
    check(
        g.pad_value in (-1, 0, 1),
        lambda: f"{op}: pad_value must be -1, 0 or 1, got {g.pad_value}",
    )
    channels = g.in_channels // g.groups
    check(
        input.dtype == torch.uint8
        and input.dim() == 5
        and input.shape[3] == g.groups
        and input.shape[4] == packed_bytes(channels),
        lambda: (
            f"{op}: input must be uint8 [N, H, W, {g.groups}, {packed_bytes(channels)}] from "
            f"pack_signs, got {input.dtype} of shape {shape_text(input)}"
        ),
    )
    out = output_size(op, input.shape[1:3], g.kernel_size, g.stride, g.padding, g.dilation)
    return [input.shape[0], g.out_channels, *out]


@torch.library.register_fake("nncx::binary_conv2d_prepack")
def _prepack_fake(weight: Tensor, in_channels: int, groups: int = 1) -> Tensor:
    op = "binary_conv2d_prepack"
    check(
        weight.dtype == torch.uint8 and weight.dim() == 5 and weight.shape[3] == 1,
        lambda: (
            f"{op}: weight must be uint8 [out_channels, kernel_h, kernel_w, 1, bytes] from "
            f"pack_signs, got {weight.dtype} of shape {shape_text(weight)}"
        ),
    )
    check_groups(op, in_channels, weight.shape[0], groups)
    channels, taps = in_channels // groups, weight.shape[1] * weight.shape[2]
    check_weight_shape(op, groups, weight.shape[0] // groups, taps, channels)
    group_bytes = packed_bytes(channels)
    check(
        weight.shape[4] == group_bytes,
        lambda: (
            f"{op}: weight must have {group_bytes} bytes for {in_channels // groups} channels "
            f"a group, got shape {shape_text(weight)}"
        ),
    )
    numel = prepacked_numel(groups, weight.shape[0] // groups, taps, channels, weight.device)
    return weight.new_empty(numel)


@torch.library.register_fake("nncx::binary_conv2d")
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
    pad_value: int = 0,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    input_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    channels_last: bool = True,
) -> Tensor:
    op = "binary_conv2d"
    geometry = Geometry(
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, pad_value
    )
    shape = output_shape(op, input, geometry)
    per_pixel = [shape[0], groups, *shape[2:]]
    dtype = check_epilogue(
        op, input, weight, out_channels, per_pixel, scale, bias, input_scale, out_dtype
    )
    strides = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device=input.device, memory_format=strides)


refuse_gradient("binary_conv2d", "packed signs", "train with nncx.XNORConv2d")


@register_flop_formula(torch.ops.nncx.binary_conv2d)
def _flops(
    input_shape: Sequence[int],
    weight_shape: Sequence[int],
    in_channels: int,
    out_channels: int,
    kernel_size: Sequence[int],
    *args: object,
    out_shape: Sequence[int],
    **kwargs: object,
) -> int:
    """2 per product of signs, as torch counts a multiply and an add."""
    taps = kernel_size[0] * kernel_size[1]
    return 2 * math.prod(out_shape) * taps * in_channels // input_shape[3]


def binary_conv2d_reference(
    input: Tensor,
    weight: Tensor,
    in_channels: int,
    out_channels: int,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    pad_value: int = 0,
    *,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    input_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    channels_last: bool = True,
) -> Tensor:
    """`binary_conv2d` in plain PyTorch, on weights that are packed but not prepacked."""
    channels = in_channels // groups
    x = unpack_signs(input, channels).flatten(3).permute(0, 3, 1, 2)
    w = unpack_signs(weight, channels).squeeze(3).permute(0, 3, 1, 2)
    pad_h, pad_w = pair(padding)
    x = F.pad(x, (pad_w, pad_w, pad_h, pad_h), value=float(pad_value))
    y = F.conv2d(x, w, None, pair(stride), 0, pair(dilation), groups).float()
    if scale is not None:
        y = y * scale[:, None, None]
    if input_scale is not None:
        y = y * input_scale.repeat_interleave(out_channels // groups, 1)
    if bias is not None:
        y = y + bias[:, None, None]
    strides = torch.channels_last if channels_last else torch.contiguous_format
    return y.to(out_dtype or torch.float32, memory_format=strides)
