"""Linear layer on packed signs, on XNOR-popcount kernels (Rastegari et al., XNOR-Net, 2016)."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from nncx.ops._common import (
    call_op,
    check,
    check_epilogue,
    check_features,
    check_weight_shape,
    packed_bytes,
    prepacked_numel,
    refuse_gradient,
    shape_text,
    unpack_signs,
)


def binary_linear_prepack(weight: Tensor, in_features: int) -> Tensor:
    """Reorders packed weights for the CPU path of this process, or for a GPU.

    Args:
        weight: uint8 ``[out_features, B]``: ``pack_signs`` of ``[out_features, in_features]``.
        in_features: numbers in a row.

    Returns:
        uint8, one dimension, opaque; see `binary_conv2d_prepack`.
    """
    return torch.ops.nncx.binary_linear_prepack(weight, in_features)


def binary_linear(
    input: Tensor,
    weight: Tensor,
    in_features: int,
    out_features: int,
    *,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    input_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """``(F.linear(sign(x), sign(w)) * scale) * input_scale + bias``, the product exact in integers.

    Args:
        input: uint8 ``[M, B]`` from ``pack_signs(x)``; padding bits are 0.
        weight: from `binary_linear_prepack`.
        in_features, out_features: as in ``nn.Linear``.
        scale, bias: float32 ``[out_features]``.
        input_scale: float32 ``[M]``.
        out_dtype: float32 (default), float16 or bfloat16.

    Returns:
        ``[M, out_features]``.

    Raises:
        RuntimeError: if shapes, dtypes or the path of `weight` do not fit; in backward: no gradient
            flows through packed signs.
    """
    return call_op(
        torch.ops.nncx.binary_linear,
        input,
        weight,
        in_features,
        out_features,
        scale,
        bias,
        input_scale,
        out_dtype,
    )


@torch.library.register_fake("nncx::binary_linear_prepack")
def _prepack_fake(weight: Tensor, in_features: int) -> Tensor:
    op = "binary_linear_prepack"
    check(in_features >= 0, lambda: f"{op}: in_features must be at least 0, got {in_features}")
    check_weight_shape(op, 1, 0, 1, in_features)
    _check_rows(op, "weight", "out_features", weight, in_features)
    check_weight_shape(op, 1, weight.shape[0], 1, in_features)
    return weight.new_empty(prepacked_numel(1, weight.shape[0], 1, in_features, weight.device))


def _check_rows(op: str, name: str, rows: str, packed: Tensor, features: int) -> None:
    check(
        packed.dtype == torch.uint8
        and packed.dim() == 2
        and packed.shape[1] == packed_bytes(features),
        lambda: (
            f"{op}: {name} must be uint8 [{rows}, {packed_bytes(features)}] from pack_signs, "
            f"got {packed.dtype} of shape {shape_text(packed)}"
        ),
    )


def check_geometry(op: str, input: Tensor, in_features: int, out_features: int) -> None:
    """Refuses sizes that cannot be, and an input that is not packed rows of them."""
    check_features(op, in_features, out_features)
    _check_rows(op, "input", "M", input, in_features)


@torch.library.register_fake("nncx::binary_linear")
def _fake(
    input: Tensor,
    weight: Tensor,
    in_features: int,
    out_features: int,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    input_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    op = "binary_linear"
    check_geometry(op, input, in_features, out_features)
    rows = input.shape[0]
    dtype = check_epilogue(
        op, input, weight, out_features, [rows], scale, bias, input_scale, out_dtype
    )
    return input.new_empty([rows, out_features], dtype=dtype)


refuse_gradient("binary_linear", "packed signs", "train with nncx.XNORLinear")


@register_flop_formula(torch.ops.nncx.binary_linear)
def _flops(
    input_shape: Sequence[int],
    weight_shape: Sequence[int],
    in_features: int,
    out_features: int,
    *args: object,
    **kwargs: object,
) -> int:
    """2 per product of signs, as torch counts a multiply and an add."""
    return 2 * input_shape[0] * in_features * out_features


def binary_linear_reference(
    input: Tensor,
    weight: Tensor,
    in_features: int,
    out_features: int,
    *,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    input_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`binary_linear` in plain PyTorch, on weights that are packed but not prepacked."""
    y = (unpack_signs(input, in_features) @ unpack_signs(weight, in_features).T).float()
    if scale is not None:
        y = y * scale
    if input_scale is not None:
        y = y * input_scale[:, None]
    if bias is not None:
        y = y + bias
    return y.to(out_dtype or torch.float32)
