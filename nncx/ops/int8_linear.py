"""Linear layer of 8-bit integers, exact in int32.

Vanhoucke et al., "Improving the speed of neural networks on CPUs", 2011; Jacob et al.,
"Quantization and training of neural networks for efficient integer-arithmetic-only inference",
CVPR 2018.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from nncx._native import _C
from nncx.ops._common import call_op, check, check_features, refuse_gradient, shape_text
from nncx.ops._int8 import Epilogue, check_epilogue, check_int8, check_terms, finish


def int8_linear_prepack(weight: Tensor) -> Tensor:
    """Reorders the weights of `int8_linear` for the CPU path of this process, or for a GPU.

    Args:
        weight: int8 ``[out_features, in_features]``, of at most 65,793 in_features.

    Returns:
        uint8, one dimension, opaque; see `int8_conv2d_prepack`.

    Raises:
        RuntimeError: for another shape or dtype.
    """
    return torch.ops.nncx.int8_linear_prepack(weight)


def int8_linear(
    input: Tensor,
    weight: Tensor,
    in_features: int,
    out_features: int,
    *,
    input_zero_point: Tensor | None = None,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    input_scale: Tensor | None = None,
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
    residual_zero_point: Tensor | None = None,
    activation: str = "none",
    out_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """``activation(((F.linear(q - zero_point, w) * scale) * input_scale + bias) + residual)``.

    The sum is exact in integers; each operation behind it is rounded to float32 on its own.

    Args:
        input: int8 ``[M, in_features]`` from `quantize_int8`.
        weight: from `int8_linear_prepack`.
        in_features, out_features: as in ``nn.Linear``.
        input_zero_point: int8 ``[]`` or, one for each row, ``[M]``; 0 by default.
        scale: float32 ``[out_features]``: the weights' scales, times the input's if that is one.
        bias: float32 ``[out_features]``.
        input_scale: float32 ``[M]``: the scale of each row.
        residual: added before the activation: ``[M, out_features]`` in float32, float16 or
            bfloat16, or in int8, which stands for
            ``(residual - residual_zero_point) * residual_scale``.
        residual_scale, residual_zero_point: float32 ``[]`` and int8 ``[]``, of an int8 residual.
        activation: none, relu or relu6.
        out_scale, out_zero_point: float32 ``[]`` and int8 ``[]``: the output is int8, with the
            bytes that `quantize_int8` makes of the float32 output.
        out_dtype: float32 (default), float16 or bfloat16; int8 only with `out_scale`.

    Returns:
        ``[M, out_features]``. Every path returns the same bits.

    Raises:
        RuntimeError: if shapes, dtypes or the path of `weight` do not fit; in backward: no gradient
            flows through 8-bit codes.
    """
    return call_op(
        torch.ops.nncx.int8_linear,
        input,
        weight,
        in_features,
        out_features,
        input_zero_point,
        scale,
        bias,
        input_scale,
        residual,
        residual_scale,
        residual_zero_point,
        activation,
        out_scale,
        out_zero_point,
        out_dtype,
    )


@torch.library.register_fake("nncx::int8_linear_prepack")
def _prepack_fake(weight: Tensor) -> Tensor:
    op = "int8_linear_prepack"
    check_int8(op, "weight", weight)
    check(
        weight.dim() == 2,
        lambda: f"{op}: weight must be [out_features, in_features], got shape {shape_text(weight)}",
    )
    out_features, in_features = weight.shape
    check_features(op, in_features, out_features)
    check_terms(op, 1, in_features)
    numel = _C.int8_prepacked_numel(1, out_features, 1, in_features, weight.device.type)
    return weight.new_empty(numel, dtype=torch.uint8)


@torch.library.register_fake("nncx::int8_linear")
def _fake(
    input: Tensor,
    weight: Tensor,
    in_features: int,
    out_features: int,
    input_zero_point: Tensor | None = None,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    input_scale: Tensor | None = None,
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
    residual_zero_point: Tensor | None = None,
    activation: str = "none",
    out_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    op = "int8_linear"
    check_features(op, in_features, out_features)
    check_terms(op, 1, in_features)
    check_int8(op, "input", input)
    check(
        input.dim() == 2 and input.shape[1] == in_features,
        lambda: f"{op}: input must be [M, {in_features}], got shape {shape_text(input)}",
    )
    epilogue = Epilogue(
        input_zero_point,
        scale,
        bias,
        input_scale,
        residual,
        residual_scale,
        residual_zero_point,
        activation,
        out_scale,
        out_zero_point,
        out_dtype,
    )
    shape = [input.shape[0], out_features]
    return input.new_empty(shape, dtype=check_epilogue(op, input, weight, epilogue, shape))


refuse_gradient("int8_linear", "8-bit codes", "train with nncx.Int8Linear")


@register_flop_formula(torch.ops.nncx.int8_linear)
def _flops(
    input_shape: Sequence[int],
    weight_shape: Sequence[int],
    in_features: int,
    out_features: int,
    *args: object,
    out_shape: Sequence[int],
    **kwargs: object,
) -> int:
    """2 per product, as torch counts a multiply and an add."""
    return 2 * input_shape[0] * in_features * out_features


def int8_linear_reference(
    input: Tensor, weight: Tensor, in_features: int, out_features: int, **epilogue: object
) -> Tensor:
    """`int8_linear` in plain PyTorch, on weights ``[out_features, in_features]``."""
    e = Epilogue(**{name: None for name in Epilogue._fields} | {"activation": "none"} | epilogue)
    zero_point = 0 if e.input_zero_point is None else e.input_zero_point.double().view(-1, 1)
    # float64 holds the sums: they are below 2^53. GPUs have no product of int64.
    return finish(((input.double() - zero_point) @ weight.double().T).long(), e)
