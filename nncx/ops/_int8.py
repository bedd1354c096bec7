"""What the int8 ops share on the Python side."""

from typing import NamedTuple

import torch
from torch import Tensor

from nncx.ops._activation import activate, check_activation
from nncx.ops._common import (
    check,
    check_operand,
    check_out_dtype,
    check_prepacked,
    tensor_text,
)

MOST_TERMS = 65_793  # of a dot product: (2^31 - 1) // (255 * 128)


class Epilogue(NamedTuple):
    """What the int8 ops are told after the geometry, in the order of the schemas."""

    input_zero_point: Tensor | None
    scale: Tensor | None
    bias: Tensor | None
    input_scale: Tensor | None
    residual: Tensor | None
    residual_scale: Tensor | None
    residual_zero_point: Tensor | None
    activation: str
    out_scale: Tensor | None
    out_zero_point: Tensor | None
    out_dtype: torch.dtype | None


def check_terms(op: str, taps: int, channels: int) -> None:
    check(
        taps * channels <= MOST_TERMS,
        lambda: (
            f"{op}: a dot product must have at most {MOST_TERMS} terms, which fit int32, got "
            f"{taps} x {channels}"
        ),
    )


def check_int8(op: str, name: str, tensor: Tensor) -> None:
    check(tensor.dtype == torch.int8, lambda: f"{op}: {name} must be int8, got {tensor.dtype}")


def check_epilogue(
    op: str, input: Tensor, weight: Tensor, epilogue: Epilogue, out_shape: list[int]
) -> torch.dtype:
    """Checks what follows the geometry; returns the dtype of the output."""
    e = epilogue
    check(
        (e.out_scale is None) == (e.out_zero_point is None),
        lambda: f"{op}: out_scale and out_zero_point must be given together, got one of them",
    )
    if e.out_scale is None:
        dtype = check_out_dtype(op, e.out_dtype or torch.float32)
    else:
        dtype = e.out_dtype or torch.int8
        check(
            dtype == torch.int8,
            lambda: f"{op}: out_dtype must be int8 where out_scale is given, got {dtype}",
        )
    rows = input.dim() == 2
    per_row = rows and e.input_zero_point is not None and e.input_zero_point.dim() == 1
    for name, tensor, shape, its_dtype in (
        ("scale", e.scale, [out_shape[1]], torch.float32),
        ("bias", e.bias, [out_shape[1]], torch.float32),
        ("input_scale", e.input_scale, out_shape[:1], torch.float32),
        ("input_zero_point", e.input_zero_point, out_shape[:1] if per_row else [], torch.int8),
        ("residual_scale", e.residual_scale, [], torch.float32),
        ("residual_zero_point", e.residual_zero_point, [], torch.int8),
        ("out_scale", e.out_scale, [], torch.float32),
        ("out_zero_point", e.out_zero_point, [], torch.int8),
    ):
        if tensor is not None:
            check_operand(op, name, input, tensor, shape, its_dtype)
    check_activation(op, e.activation)
    _check_residual(op, input, e, out_shape)
    check_prepacked(op, input, weight)
    return dtype


def _check_residual(op: str, input: Tensor, e: Epilogue, out_shape: list[int]) -> None:
    given = e.residual_scale is not None, e.residual_zero_point is not None
    if e.residual is None:
        check(
            not any(given),
            lambda: (
                f"{op}: residual_scale and residual_zero_point must come with a residual, got none"
            ),
        )
        return
    residual = e.residual
    check(
        residual.dim() == len(out_shape) and residual.device == input.device,
        lambda: _residual_sentence(op, out_shape, residual),
    )
    for size, expected in zip(residual.shape, out_shape, strict=True):
        check(size == expected, lambda: _residual_sentence(op, out_shape, residual))
    quantized = residual.dtype == torch.int8
    check(
        given == (quantized, quantized),
        lambda: (
            f"{op}: residual_scale and residual_zero_point must come with an int8 residual, and "
            f"only with that, got a residual of {residual.dtype}"
        ),
    )
    check(
        residual.dtype in (torch.float32, torch.float16, torch.bfloat16, torch.int8),
        lambda: f"{op}: residual must be float32, float16, bfloat16 or int8, got {residual.dtype}",
    )


def _residual_sentence(op: str, out_shape: list[int], residual: Tensor) -> str:
    return (
        f"{op}: residual must have the output's shape {list(out_shape)} on the input's device, got "
        f"{tensor_text(residual)}"
    )


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """int8 codes of float32 `x`: the formula of quantize_int8."""
    rounded = (x * (1 / scale)).round()
    rounded = torch.where(rounded.isnan(), 0.0, rounded)
    return (rounded + zero_point).clamp(-128, 127).to(torch.int8)


def finish(sums: Tensor, epilogue: Epilogue) -> Tensor:
    """The epilogue, on exact integers whose output channels are dimension 1."""
    e = epilogue
    channels = (-1, *[1] * (sums.dim() - 2))
    v = sums.float()
    if e.scale is not None:
        v = v * e.scale.view(channels)
    if e.input_scale is not None:
        v = v * e.input_scale[:, None]
    if e.bias is not None:
        v = v + e.bias.view(channels)
    if e.residual is not None and e.residual_scale is None:
        v = v + e.residual.float()
    elif e.residual is not None:
        v = v + (e.residual.float() - e.residual_zero_point) * e.residual_scale
    v = activate(v, e.activation)
    if e.out_scale is not None:
        return quantize(v, e.out_scale, e.out_zero_point)
    return v.to(e.out_dtype or torch.float32)
