"""binary_conv2d whose outputs are signs again, packed: a chain of binary layers stays in bits."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from nncx.ops._common import call_op, check, check_sign_epilogue, packed_bytes
from nncx.ops._conv2d import pair
from nncx.ops.binary_conv2d import Geometry, binary_conv2d_reference, output_shape
from nncx.ops.pack_signs import pack_signs_reference


def binary_conv2d_sign(
    input: Tensor,
    weight: Tensor,
    threshold: Tensor,
    flip: Tensor,
    in_channels: int,
    out_channels: int,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    pad_value: int = 0,
    out_groups: int = 1,
) -> Tensor:
    """The signs of a function of `F.conv2d(sign(x), sign(w))`: ``(dot >= threshold) xor flip``.

    Alpha, bias and BatchNorm of a layer and the sign of the next one are such a function;
    `nncx.nn.fold_sign` finds its threshold.

    Args:
        input, weight, in_channels, ..., pad_value: as `binary_conv2d`.
        threshold: int32 ``[out_channels]``, in units of the integer dot product.
        flip: bool ``[out_channels]``: the function falls with the dot product.
        out_groups: channel groups of the convolution that will read the bits.

    Returns:
        uint8 ``[N, H', W', out_groups, B]``, as `pack_signs` would make them.

    Raises:
        RuntimeError: if shapes, dtypes or the path of `weight` do not fit.
    """
    return call_op(
        torch.ops.nncx.binary_conv2d_sign,
        input,
        weight,
        threshold,
        flip,
        in_channels,
        out_channels,
        pair(kernel_size),
        pair(stride),
        pair(padding),
        pair(dilation),
        groups,
        pad_value,
        out_groups,
    )


@torch.library.register_fake("nncx::binary_conv2d_sign")
def _fake(
    input: Tensor,
    weight: Tensor,
    threshold: Tensor,
    flip: Tensor,
    in_channels: int,
    out_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    pad_value: int = 0,
    out_groups: int = 1,
) -> Tensor:
    op = "binary_conv2d_sign"
    geometry = Geometry(
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, pad_value
    )
    batch, _, height, width = output_shape(op, input, geometry)
    check(
        out_groups >= 1 and out_channels % out_groups == 0,
        lambda: (
            f"{op}: out_groups must divide out_channels, got out_groups={out_groups}, "
            f"out_channels={out_channels}"
        ),
    )
    check_sign_epilogue(op, input, weight, out_channels, threshold, flip)
    return input.new_empty(
        [batch, height, width, out_groups, packed_bytes(out_channels // out_groups)]
    )


@register_flop_formula(torch.ops.nncx.binary_conv2d_sign)
def _flops(
    input_shape: Sequence[int],
    weight_shape: Sequence[int],
    threshold_shape: Sequence[int],
    flip_shape: Sequence[int],
    in_channels: int,
    out_channels: int,
    kernel_size: Sequence[int],
    *args: object,
    out_shape: Sequence[int],
    **kwargs: object,
) -> int:
    """2 per product of signs."""
    taps = kernel_size[0] * kernel_size[1]
    batch, height, width = out_shape[:3]
    return 2 * batch * height * width * out_channels * taps * in_channels // input_shape[3]


def binary_conv2d_sign_reference(
    input: Tensor,
    weight: Tensor,
    threshold: Tensor,
    flip: Tensor,
    *geometry: int | Sequence[int],
    out_groups: int = 1,
) -> Tensor:
    """`binary_conv2d_sign` in plain PyTorch, on weights that are packed but not prepacked."""
    dots = binary_conv2d_reference(input, weight, *geometry)
    positive = (dots >= threshold[:, None, None]) ^ flip[:, None, None]
    return pack_signs_reference(positive.float() - 0.5, out_groups)
