"""binary_linear whose outputs are signs again, packed: a chain of binary layers stays in bits."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from nncx.ops._common import call_op, check_sign_epilogue, packed_bytes
from nncx.ops.binary_linear import binary_linear_reference, check_geometry
from nncx.ops.pack_signs import pack_signs_reference


def binary_linear_sign(
    input: Tensor,
    weight: Tensor,
    threshold: Tensor,
    flip: Tensor,
    in_features: int,
    out_features: int,
) -> Tensor:
    """The signs of a function of `F.linear(sign(x), sign(w))`: ``(dot >= threshold) xor flip``.

    Args:
        input, weight, in_features, out_features: as `binary_linear`.
        threshold: int32 ``[out_features]``, in units of the integer dot product.
        flip: bool ``[out_features]``: the function falls with the dot product.

    Returns:
        uint8 ``[M, B]``, as `pack_signs` would make them.

    Raises:
        RuntimeError: if shapes, dtypes or the path of `weight` do not fit.
    """
    return call_op(
        torch.ops.nncx.binary_linear_sign, input, weight, threshold, flip, in_features, out_features
    )


@torch.library.register_fake("nncx::binary_linear_sign")
def _fake(
    input: Tensor,
    weight: Tensor,
    threshold: Tensor,
    flip: Tensor,
    in_features: int,
    out_features: int,
) -> Tensor:
    op = "binary_linear_sign"
    check_geometry(op, input, in_features, out_features)
    check_sign_epilogue(op, input, weight, out_features, threshold, flip)
    return input.new_empty([input.shape[0], packed_bytes(out_features)])


@register_flop_formula(torch.ops.nncx.binary_linear_sign)
def _flops(
    input_shape: Sequence[int],
    weight_shape: Sequence[int],
    threshold_shape: Sequence[int],
    flip_shape: Sequence[int],
    in_features: int,
    out_features: int,
    *args: object,
    **kwargs: object,
) -> int:
    """2 per product of signs."""
    return 2 * input_shape[0] * in_features * out_features


def binary_linear_sign_reference(
    input: Tensor,
    weight: Tensor,
    threshold: Tensor,
    flip: Tensor,
    in_features: int,
    out_features: int,
) -> Tensor:
    """`binary_linear_sign` in plain PyTorch, on weights that are packed but not prepacked."""
    positive = binary_linear_reference(input, weight, in_features, out_features) >= threshold
    return pack_signs_reference((positive ^ flip).float() - 0.5)
