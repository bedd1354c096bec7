"""Max-pooling of packed signs: the maximum of signs is the OR of their bits."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from nncx.ops._common import call_op, check, shape_text, unpack_signs
from nncx.ops._conv2d import check_pair, check_window, pair
from nncx.ops.pack_signs import pack_signs_reference


def max_pool2d_signs(
    input: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
) -> Tensor:
    """``sign(F.max_pool2d(x, ...))`` of what ``sign(x)`` was packed from: pooling commutes with it.

    But for NaN, which is a -1 among others here, while `F.max_pool2d` passes it on.

    Args:
        input: uint8 ``[N, H, W, G, B]`` from `pack_signs`, or of `binary_conv2d_sign`.
        kernel_size, stride, padding, dilation, ceil_mode: as in ``F.max_pool2d``; the stride is by
            default the kernel's size, the padding at most half of it.

    Returns:
        uint8 ``[N, H', W', G, B]``.

    Raises:
        RuntimeError: for another shape or dtype, or a window that cannot be.
    """
    return call_op(
        torch.ops.nncx.max_pool2d_signs,
        input,
        pair(kernel_size),
        pair(kernel_size if stride is None else stride),
        pair(padding),
        pair(dilation),
        ceil_mode,
    )


def _out_size(
    size: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool
) -> int:
    span = size + 2 * padding - dilation * (kernel - 1) - 1
    out = (span + (stride - 1 if ceil_mode else 0)) // stride + 1
    if ceil_mode and (out - 1) * stride >= size + padding:  # a window must begin in the image
        out -= 1
    return out


@torch.library.register_fake("nncx::max_pool2d_signs")
def _fake(
    input: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    ceil_mode: bool = False,
) -> Tensor:
    op = "max_pool2d_signs"
    check(
        input.dtype == torch.uint8 and input.dim() == 5,
        lambda: (
            f"{op}: input must be uint8 [N, H, W, G, bytes] from pack_signs, got {input.dtype} of "
            f"shape {shape_text(input)}"
        ),
    )
    check(
        input.shape[4] % 8 == 0,
        lambda: (
            f"{op}: input must have whole 64-bit words a group, as pack_signs makes them, got "
            f"shape {shape_text(input)}"
        ),
    )
    check_pair(op, "kernel_size", kernel_size, 1)
    check_window(op, stride, padding, dilation)
    check(
        all(2 * padding[i] <= kernel_size[i] for i in range(2)),
        lambda: (
            f"{op}: padding must be at most half of kernel_size, got padding {padding[0]} x "
            f"{padding[1]}, kernel_size {kernel_size[0]} x {kernel_size[1]}"
        ),
    )
    for i in range(2):
        check(
            input.shape[1 + i] + 2 * padding[i] > dilation[i] * (kernel_size[i] - 1),
            lambda: (
                f"{op}: the padded input must be at least as large as the dilated kernel, got "
                f"input {input.shape[1]} x {input.shape[2]}, kernel_size {kernel_size[0]} x "
                f"{kernel_size[1]}, padding {padding[0]} x {padding[1]}"
            ),
        )
    out = [
        _out_size(input.shape[1 + i], kernel_size[i], stride[i], padding[i], dilation[i], ceil_mode)
        for i in range(2)
    ]
    return input.new_empty([input.shape[0], *out, *input.shape[3:]])


@register_flop_formula(torch.ops.nncx.max_pool2d_signs)
def _flops(*args: object, **kwargs: object) -> int:
    return 0  # as torch counts a max-pool


def max_pool2d_signs_reference(
    input: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
) -> Tensor:
    """`max_pool2d_signs` in plain PyTorch."""
    groups, bits = input.shape[3], 8 * input.shape[4]
    signs = unpack_signs(input, bits).flatten(3).permute(0, 3, 1, 2)
    pooled = F.max_pool2d(signs, kernel_size, stride, padding, dilation, ceil_mode)
    return pack_signs_reference(pooled, groups)
