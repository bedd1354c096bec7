"""Floats to 8-bit integers with a scale and a zero point."""

import torch
from torch import Tensor

from nncx.ops._common import call_op, check, refuse_gradient, tensor_text
from nncx.ops._int8 import quantize


def quantize_int8(input: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """``clamp(rint(input * (1 / scale)) + zero_point, -128, 127)``: what int8 ops read.

    The reciprocal and the product are rounded to float32, ties go to even, NaN to `zero_point`. A
    result q stands for the number ``(q - zero_point) * scale``.

    Args:
        input: float32, float16 or bfloat16 of any shape and strides.
        scale: float32 ``[]``, or one for each row, ``[M]``, of an input ``[M, K]``. That it is
            positive and finite is not checked.
        zero_point: int8, of the scale's shape.

    Returns:
        int8 of the input's shape; images ``[N, C, H, W]`` in channels_last strides, else
        contiguous. Every path returns the same bytes.

    Raises:
        RuntimeError: for another dtype or shape; in backward: no gradient flows through codes.
    """
    return call_op(torch.ops.nncx.quantize_int8, input, scale, zero_point)


@torch.library.register_fake("nncx::quantize_int8")
def _fake(input: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    op = "quantize_int8"
    check(
        input.dtype in (torch.float32, torch.float16, torch.bfloat16),
        lambda: f"{op}: input must be float32, float16 or bfloat16, got {input.dtype}",
    )
    check(input.dim() >= 1, lambda: f"{op}: input must have a dimension, got a number")
    shape = list(input.shape[:1]) if scale.dim() == 1 and input.dim() == 2 else []

    def check_like(tensor: Tensor, dtype: torch.dtype, what: str) -> None:
        def sentence() -> str:
            return f"{op}: {what}, got {tensor_text(tensor)}"

        check(
            tensor.dtype == dtype and tensor.dim() == len(shape) and tensor.device == input.device,
            sentence,
        )
        for size, expected in zip(tensor.shape, shape, strict=True):
            check(size == expected, sentence)

    check_like(
        scale,
        torch.float32,
        "scale must be float32 of shape [], or [M] for an input [M, K], on the input's device",
    )
    check_like(
        zero_point,
        torch.int8,
        f"zero_point must be int8 of the scale's shape {shape} on the input's device",
    )
    strides = torch.channels_last if input.dim() == 4 else torch.contiguous_format
    return torch.empty(input.shape, dtype=torch.int8, device=input.device, memory_format=strides)


refuse_gradient("quantize_int8", "8-bit codes", "train with nncx.Int8Conv2d or nncx.Int8Linear")


def quantize_int8_reference(input: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """`quantize_int8` in plain PyTorch."""
    column = (-1, 1) if scale.dim() else ()
    q = quantize(input.float(), scale.reshape(column), zero_point.reshape(column))
    return q.contiguous(
        memory_format=torch.channels_last if input.dim() == 4 else torch.contiguous_format
    )
