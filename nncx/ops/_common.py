"""What the Python side of every op shares: checks that raise, and ops that refuse gradients."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nncx._native import _C

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check(holds: bool | torch.SymBool, sentence: Callable[[], str]) -> None:
    """Raises RuntimeError with `sentence()`, as the native op does, unless `holds`."""
    torch._check(holds, sentence)


def shape_text(tensor: Tensor) -> str:
    return str(list(tensor.shape))


def refuse_gradient(op: str, advice: str) -> None:
    """Makes the op's backward raise: a gradient that is asked for is never silently None."""

    def backward(context: Any, *gradients: Tensor) -> None:
        raise RuntimeError(f"{op}: no gradient flows through packed signs; {advice}")

    torch.library.register_autograd(f"nncx::{op}", backward)


def packed_bytes(channels: int) -> int:
    """Bytes of one group of `channels` signs: padded to whole 64-bit words."""
    return (channels + 63) // 64 * 8


def unpack_signs(packed: Tensor, channels: int) -> Tensor:
    """The signs behind `pack_signs` as float64 -1 and +1: ``[..., B] -> [..., channels]``."""
    bits = packed.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=packed.device) & 1
    return bits.flatten(-2)[..., :channels].double() * 2 - 1


def prepacked_numel(groups: int, out_channels: int, taps: int, channels: int) -> int:
    """Bytes of a prepacked binary weight under the path of this process."""
    return _C.binary_prepacked_numel(groups, out_channels, taps, channels)


def check_epilogue(
    op: str,
    weight: Tensor,
    out_channels: int,
    pixels: int | torch.SymInt,
    scale: Tensor | None,
    bias: Tensor | None,
    input_scale: Tensor | None,
    out_dtype: torch.dtype | None,
) -> torch.dtype:
    """Checks what follows the dot product of a binary op; returns the dtype of its output."""
    check(
        weight.dtype == torch.uint8 and weight.dim() == 1,
        lambda: (
            f"{op}: weight must come from {op}_prepack, got a tensor of shape {shape_text(weight)}"
        ),
    )
    for name, tensor, numel in (
        ("scale", scale, out_channels),
        ("bias", bias, out_channels),
        ("input_scale", input_scale, pixels),
    ):
        if tensor is not None:
            check(
                tensor.dtype == torch.float32 and tensor.numel() == numel,
                lambda name=name, tensor=tensor, numel=numel: (
                    f"{op}: {name} must be float32 with "
                    f"{numel} elements on the input's device, got {tensor.dtype} of shape "
                    f"{shape_text(tensor)}"
                ),
            )
    dtype = torch.float32 if out_dtype is None else out_dtype
    check(
        dtype in (torch.float32, torch.float16, torch.bfloat16),
        lambda: f"{op}: out_dtype must be float32, float16 or bfloat16, got {dtype}",
    )
    return dtype
