"""The signs of a tensor as bytes: what `int8_conv2d` can read of a binary layer."""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from nncx.ops._common import FLOATS, check


def sign_int8(input: Tensor) -> Tensor:
    """+1 for x >= 0 (0 and -0 too), -1 for x < 0 and for NaN.

    Args:
        input: float32, float16, bfloat16 or float64 of any shape and strides. A device without a
            kernel, as CUDA, is left to torch.

    Returns:
        int8 of the input's shape; images ``[N, C, H, W]`` in channels_last strides, else
        contiguous.

    Raises:
        RuntimeError: for another dtype, or a tensor without a dimension.
    """
    if input.device.type not in ("cpu", "meta"):
        return sign_int8_reference(input)
    return torch.ops.nncx.sign_int8(input)


@torch.library.register_fake("nncx::sign_int8")
def _fake(input: Tensor) -> Tensor:
    op = "sign_int8"
    check(input.dim() >= 1, lambda: f"{op}: input must have a dimension, got a number")
    check(
        input.dtype in FLOATS,
        lambda: f"{op}: input must be a floating-point type, got {input.dtype}",
    )
    strides = torch.channels_last if input.dim() == 4 else torch.contiguous_format
    return torch.empty(input.shape, dtype=torch.int8, device=input.device, memory_format=strides)


@register_flop_formula(torch.ops.nncx.sign_int8)
def _flops(*args: object, **kwargs: object) -> int:
    return 0  # comparisons, no multiplications


def sign_int8_reference(input: Tensor) -> Tensor:
    """`sign_int8` in plain PyTorch."""
    strides = torch.channels_last if input.dim() == 4 else torch.contiguous_format
    return ((input >= 0).to(torch.int8) * 2 - 1).contiguous(memory_format=strides)
