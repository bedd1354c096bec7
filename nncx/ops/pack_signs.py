"""The signs of a tensor as bits: what the binary ops take."""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from nncx.ops._common import FLOATS, call_op, check, packed_bytes, shape_text


def pack_signs(input: Tensor, groups: int = 1) -> Tensor:
    """One bit a number: 1 for x >= 0 (0 and -0 too), 0 for x < 0 and for NaN.

    Args:
        input: ``[M, K]`` or ``[N, C, H, W]``, any strides; float32, float16, bfloat16 or float64.
        groups: channel groups of the convolution that will read the bits; 1 for a matrix.

    Returns:
        uint8 ``[M, B]`` with ``B = ceil(K/64)*8``, or ``[N, H, W, groups, B]`` with
        ``B = ceil(C/groups/64)*8``: least significant bit first, channels innermost, padded with 0
        bits. The weights ``[O, C/groups, kh, kw]`` of a convolution pack with ``groups=1``.

    Raises:
        RuntimeError: for another shape or dtype, or if groups does not divide C.
    """
    return call_op(torch.ops.nncx.pack_signs, input, groups)


def _packed_shape(input: Tensor, groups: int) -> list[int]:
    check(
        input.dim() in (2, 4),
        lambda: f"pack_signs: input must be [M, K] or [N, C, H, W], got shape {shape_text(input)}",
    )
    check(
        groups >= 1 and (input.dim() == 4 or groups == 1),
        lambda: f"pack_signs: groups must be at least 1, and 1 for a matrix, got {groups}",
    )
    channels = input.shape[1]
    check(
        channels % groups == 0,
        lambda: (
            "pack_signs: channels must be a multiple of groups, got "
            f"{channels} channels and groups={groups}"
        ),
    )
    check(
        input.dtype in FLOATS,
        lambda: f"pack_signs: input must be a floating-point type, got {input.dtype}",
    )
    group_bytes = packed_bytes(channels // groups)
    if input.dim() == 2:
        return [input.shape[0], group_bytes]
    return [input.shape[0], input.shape[2], input.shape[3], groups, group_bytes]


@torch.library.register_fake("nncx::pack_signs")
def _fake(input: Tensor, groups: int = 1) -> Tensor:
    return input.new_empty(_packed_shape(input, groups), dtype=torch.uint8)


@register_flop_formula(torch.ops.nncx.pack_signs)
def _flops(*args: object, **kwargs: object) -> int:
    return 0  # comparisons, no multiplications


def pack_signs_reference(input: Tensor, groups: int = 1) -> Tensor:
    """`pack_signs` in plain PyTorch: slow, and obvious."""
    shape = _packed_shape(input, groups)
    pixels = input if input.dim() == 2 else input.permute(0, 2, 3, 1)
    bits = (pixels >= 0).to(torch.uint8).reshape(*shape[:-1], input.shape[1] // groups)
    bits = torch.nn.functional.pad(bits, (0, shape[-1] * 8 - bits.shape[-1]))
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=input.device)
    return (bits.reshape(*shape, 8) * weights).sum(-1, dtype=torch.uint8)
