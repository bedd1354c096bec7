"""Linear layer whose weights are codes into a table of values.

BinaryConnect (Courbariaux et al., 2015: 1 bit), Trained Ternary Quantization (Zhu et al., 2017: 2),
Incremental Network Quantization (Zhou et al., 2017: up to 5) and Deep Compression (Han et al.,
2016: up to 8) end in such layers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from nncx.ops._codebook import (
    check_bits,
    check_operands,
    decode,
    finish,
    prepack_fake,
)
from nncx.ops._common import (
    call_op,
    check,
    check_features,
    check_input_dtype,
    refuse_gradient,
    shape_text,
)


def codebook_linear_prepack(
    codes: Tensor, bits: int, in_features: int, out_features: int
) -> Tensor:
    """Reorders dense codes for the CPU path of this process, or for a GPU.

    Args:
        codes: uint8 ``[ceil(out_features * in_features * bits / 8)]``: `nncx.nn.codes.pack_codes`
            of ``[out_features, in_features]``.
        bits: width of a code, 1 to 8.
        in_features, out_features: as in ``nn.Linear``.

    Returns:
        uint8, one dimension, opaque; see `codebook_conv2d_prepack`.

    Raises:
        RuntimeError: for another shape, dtype or width.
    """
    return torch.ops.nncx.codebook_linear_prepack(codes, bits, in_features, out_features)


def codebook_linear(
    input: Tensor,
    weight: Tensor,
    codebook: Tensor,
    bits: int,
    in_features: int,
    out_features: int,
    *,
    bias: Tensor | None = None,
    activation: str = "none",
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """``activation(F.linear(x, codebook[code], bias))``, summed in float32.

    Args:
        input: float32, float16 or bfloat16 ``[M, in_features]``.
        weight: from `codebook_linear_prepack`.
        codebook: float32 ``[2**bits]``, or one row per output: ``[out_features, 2**bits]``.
        bits, in_features, out_features: as given to `codebook_linear_prepack`.
        bias: float32 ``[out_features]``.
        activation: none, relu or relu6.
        out_dtype: float32, float16 or bfloat16; the input's by default.

    Returns:
        ``[M, out_features]``: the same bits on every run and thread count of one path, within
        ``in_features * 2**-23 * sum |w x|`` of the exact sum before it is rounded to `out_dtype`.

    Raises:
        RuntimeError: if shapes, dtypes or the path of `weight` do not fit; in backward: no gradient
            flows through packed codes.
    """
    return call_op(
        torch.ops.nncx.codebook_linear,
        input,
        weight,
        codebook,
        bits,
        in_features,
        out_features,
        bias,
        activation,
        out_dtype,
    )


@torch.library.register_fake("nncx::codebook_linear_prepack")
def _prepack_fake(codes: Tensor, bits: int, in_features: int, out_features: int) -> Tensor:
    op = "codebook_linear_prepack"
    check_bits(op, bits)
    check_features(op, in_features, out_features)
    return prepack_fake(op, codes, bits, 1, out_features, 1, in_features)


@torch.library.register_fake("nncx::codebook_linear")
def _fake(
    input: Tensor,
    weight: Tensor,
    codebook: Tensor,
    bits: int,
    in_features: int,
    out_features: int,
    bias: Tensor | None = None,
    activation: str = "none",
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    op = "codebook_linear"
    check_bits(op, bits)
    check_features(op, in_features, out_features)
    check_input_dtype(op, input)
    check(
        input.dim() == 2 and input.shape[1] == in_features,
        lambda: f"{op}: input must be [M, {in_features}], got shape {shape_text(input)}",
    )
    dtype = check_operands(
        op, input, weight, codebook, bits, out_features, bias, activation, out_dtype
    )
    return input.new_empty([input.shape[0], out_features], dtype=dtype)


refuse_gradient("codebook_linear", "packed codes", "train with float weights")


@register_flop_formula(torch.ops.nncx.codebook_linear)
def _flops(
    input_shape: Sequence[int],
    weight_shape: Sequence[int],
    codebook_shape: Sequence[int],
    bits: int,
    in_features: int,
    out_features: int,
    *args: object,
    **kwargs: object,
) -> int:
    """2 per weight and row, as torch counts a multiply and an add."""
    return 2 * input_shape[0] * in_features * out_features


def codebook_linear_reference(
    input: Tensor,
    codes: Tensor,
    codebook: Tensor,
    bits: int,
    in_features: int,
    out_features: int,
    *,
    bias: Tensor | None = None,
    activation: str = "none",
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`codebook_linear` in plain PyTorch, on codes that are dense, summed in float64."""
    w = decode(codes, codebook, bits, out_features, in_features)
    return finish(input.double() @ w.double().T, bias, activation, out_dtype or input.dtype)
