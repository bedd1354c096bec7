"""Convolution whose weights are codes into a table of values; see `codebook_linear` for papers."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from nncx.ops._codebook import (
    check_bits,
    check_operands,
    decode,
    finish,
    prepack_fake,
)
from nncx.ops._common import call_op, check, check_input_dtype, refuse_gradient, shape_text
from nncx.ops._conv2d import check_filters, check_window, memory_format, output_size, pair


def codebook_conv2d_prepack(
    codes: Tensor,
    bits: int,
    in_channels: int,
    out_channels: int,
    kernel_size: int | Sequence[int],
    groups: int = 1,
) -> Tensor:
    """Reorders dense codes for the CPU path of this process, or for a GPU.

    Args:
        codes: uint8 ``[ceil(n * bits / 8)]``: `nncx.nn.codes.pack_codes` of the ``n`` codes
            ``[out_channels, in_channels / groups, kh, kw]``.
        bits: width of a code, 1 to 8.
        in_channels, out_channels, kernel_size, groups: as nn.Conv2d.

    Returns:
        uint8, one dimension, opaque; it names its path, width and shape, and `codebook_conv2d`
        refuses it under another path (``NNCX_ISA``) or for another geometry. Never stored in files.

    Raises:
        RuntimeError: for another shape, dtype or width.
    """
    return torch.ops.nncx.codebook_conv2d_prepack(
        codes, bits, in_channels, out_channels, pair(kernel_size), groups
    )


def codebook_conv2d(
    input: Tensor,
    weight: Tensor,
    codebook: Tensor,
    bits: int,
    in_channels: int,
    out_channels: int,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    bias: Tensor | None = None,
    activation: str = "none",
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """``activation(F.conv2d(x, codebook[code], bias, ...))``, summed in float32.

    Args:
        input: float32, float16 or bfloat16 ``[N, in_channels, H, W]``; channels_last saves a copy.
        weight: from `codebook_conv2d_prepack`.
        codebook: float32 ``[2**bits]``, or one row per output channel: ``[out_channels, 2**bits]``.
        bits, in_channels, out_channels, kernel_size, groups: as given to `codebook_conv2d_prepack`.
        stride, padding, dilation: as nn.Conv2d.
        bias: float32 ``[out_channels]``.
        activation: none, relu or relu6.
        out_dtype: float32, float16 or bfloat16; the input's by default.

    Returns:
        ``[N, out_channels, H', W']``: channels_last if the input is, else contiguous. The same bits
        on every run and thread count of one path, within ``K * 2**-23 * sum |w x|`` of the exact
        sum of the K terms before it is rounded to `out_dtype`.

    Raises:
        RuntimeError: if shapes, dtypes or the path of `weight` do not fit; in backward: no gradient
            flows through packed codes.
    """
    return call_op(
        torch.ops.nncx.codebook_conv2d,
        input,
        weight,
        codebook,
        bits,
        in_channels,
        out_channels,
        pair(kernel_size),
        pair(stride),
        pair(padding),
        pair(dilation),
        groups,
        bias,
        activation,
        out_dtype,
    )


@torch.library.register_fake("nncx::codebook_conv2d_prepack")
def _prepack_fake(
    codes: Tensor,
    bits: int,
    in_channels: int,
    out_channels: int,
    kernel_size: Sequence[int],
    groups: int = 1,
) -> Tensor:
    op = "codebook_conv2d_prepack"
    check_bits(op, bits)
    check_filters(op, in_channels, out_channels, kernel_size, groups)
    taps = math.prod(kernel_size)
    return prepack_fake(
        op, codes, bits, groups, out_channels // groups, taps, in_channels // groups
    )


@torch.library.register_fake("nncx::codebook_conv2d")
def _fake(
    input: Tensor,
    weight: Tensor,
    codebook: Tensor,
    bits: int,
    in_channels: int,
    out_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    bias: Tensor | None = None,
    activation: str = "none",
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    op = "codebook_conv2d"
    check_bits(op, bits)
    check_filters(op, in_channels, out_channels, kernel_size, groups)
    check_window(op, stride, padding, dilation)
    check_input_dtype(op, input)
    check(
        input.dim() == 4 and input.shape[1] == in_channels,
        lambda: f"{op}: input must be [N, {in_channels}, H, W], got shape {shape_text(input)}",
    )
    size = output_size(op, input.shape[2:], kernel_size, stride, padding, dilation)
    dtype = check_operands(
        op, input, weight, codebook, bits, out_channels, bias, activation, out_dtype
    )
    return torch.empty(
        [input.shape[0], out_channels, *size],
        dtype=dtype,
        device=input.device,
        memory_format=memory_format(input),
    )


refuse_gradient("codebook_conv2d", "packed codes", "train with float weights")


@register_flop_formula(torch.ops.nncx.codebook_conv2d)
def _flops(
    input_shape: Sequence[int],
    weight_shape: Sequence[int],
    codebook_shape: Sequence[int],
    bits: int,
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
    """2 per weight and output pixel, as torch counts a multiply and an add."""
    return 2 * math.prod(out_shape) * math.prod(kernel_size) * in_channels // groups


def codebook_conv2d_reference(
    input: Tensor,
    codes: Tensor,
    codebook: Tensor,
    bits: int,
    in_channels: int,
    out_channels: int,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    bias: Tensor | None = None,
    activation: str = "none",
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`codebook_conv2d` in plain PyTorch, on codes that are dense, summed in float64."""
    size = pair(kernel_size)
    channels = in_channels // groups
    w = decode(codes, codebook, bits, out_channels, channels * math.prod(size))
    w = w.view(out_channels, channels, *size).double()
    sums = F.conv2d(input.double(), w, None, pair(stride), pair(padding), pair(dilation), groups)
    return finish(sums, bias, activation, out_dtype or input.dtype)
