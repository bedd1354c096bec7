"""Linear layer whose weights share few values, found by a hash of their place.

Paper: Chen et al., "Compressing Neural Networks with the Hashing Trick", ICML 2015.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from nncx.ops._activation import activate, check_activation, mask_gradient
from nncx.ops._common import (
    call_op,
    check,
    check_input_dtype,
    check_operand,
    check_out_dtype,
    shape_text,
)
from nncx.ops.hashed_weight import (
    check_buckets,
    check_weight,
    hashed_bucket_sums,
    hashed_weight,
    hashed_weight_reference,
)


def hashed_linear(
    input: Tensor,
    buckets: Tensor,
    seed: int,
    in_features: int,
    out_features: int,
    *,
    bias: Tensor | None = None,
    activation: str = "none",
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """``activation(F.linear(x, V, bias))`` with V = `hashed_weight`, which is never in memory.

    Weight (o, k) is plus or minus one of the buckets, and which one a hash of the seed, o and k
    says: csrc/hashed_linear.h has the formula, a contract of nncx's files.

    Args:
        input: float32, float16 or bfloat16 ``[M, in_features]``. float64 is left to torch, with all
            of V in memory.
        buckets: float32 ``[B]``, from 1 to 2**31 - 1 of them.
        seed: any 64-bit integer.
        in_features, out_features: as in ``nn.Linear``.
        bias: float32 ``[out_features]``.
        activation: none, relu or relu6.
        out_dtype: float32, float16 or bfloat16; the input's by default.

    Returns:
        ``[M, out_features]``: the same bits on every run and thread count of one path, within
        ``in_features * 2**-23 * sum |w x|`` of the exact sum before it is rounded to `out_dtype`.
        Gradients are those of the formula; backward has V in memory while it runs, and as much
        again for the gradient of V.

    Raises:
        RuntimeError: if shapes, dtypes or devices do not fit.
    """
    if input.dtype == torch.float64:
        _check(input, buckets, in_features, out_features, bias, activation, out_dtype)
        return hashed_linear_reference(
            input,
            buckets,
            seed,
            in_features,
            out_features,
            bias=bias,
            activation=activation,
            out_dtype=out_dtype,
        )
    return call_op(
        torch.ops.nncx.hashed_linear,
        input,
        buckets,
        seed,
        in_features,
        out_features,
        bias,
        activation,
        out_dtype,
    )


def _check(
    input: Tensor,
    buckets: Tensor,
    in_features: int,
    out_features: int,
    bias: Tensor | None,
    activation: str,
    out_dtype: torch.dtype | None,
) -> torch.dtype:
    """The dtype of the output; for float64, whose operands may be that too, not all is refused."""
    op = "hashed_linear"
    is_double = input.dtype == torch.float64
    if not is_double:
        check_buckets(op, buckets)
    check_weight(op, buckets.shape[0], in_features, out_features)
    if not is_double:
        check_input_dtype(op, input)
    check(
        input.dim() == 2 and input.shape[1] == in_features,
        lambda: f"{op}: input must be [M, {in_features}], got shape {shape_text(input)}",
    )
    check_activation(op, activation)
    check_operand(op, "buckets", input, buckets, [buckets.shape[0]], buckets.dtype)
    if bias is not None:
        dtype = bias.dtype if is_double else torch.float32
        check_operand(op, "bias", input, bias, [out_features], dtype)
    if is_double and out_dtype is None:
        return input.dtype
    return check_out_dtype(op, input.dtype if out_dtype is None else out_dtype)


@torch.library.register_fake("nncx::hashed_linear")
def _fake(
    input: Tensor,
    buckets: Tensor,
    seed: int,
    in_features: int,
    out_features: int,
    bias: Tensor | None = None,
    activation: str = "none",
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    check_input_dtype("hashed_linear", input)
    dtype = _check(input, buckets, in_features, out_features, bias, activation, out_dtype)
    return input.new_empty([input.shape[0], out_features], dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, buckets, ctx.seed, _, _, _, ctx.activation, _ = inputs
    saved = () if ctx.activation == "none" else (output,)
    ctx.save_for_backward(input, buckets, *saved)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    input, buckets, *output = ctx.saved_tensors
    if output:
        gradient = mask_gradient(gradient, *output, ctx.activation)
    gradient = gradient.float()
    of_input = of_buckets = of_bias = None
    if ctx.needs_input_grad[0]:
        weight = hashed_weight(buckets, ctx.seed, input.shape[1], gradient.shape[1])
        of_input = (gradient @ weight).to(input.dtype)
    if ctx.needs_input_grad[1]:
        of_weight = gradient.T @ input.float()
        of_buckets = hashed_bucket_sums(of_weight, ctx.seed, buckets.shape[0])
    if ctx.needs_input_grad[5]:
        of_bias = gradient.sum(0)
    return of_input, of_buckets, None, None, None, of_bias, None, None


torch.library.register_autograd("nncx::hashed_linear", _backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.nncx.hashed_linear)
def _flops(
    input_shape: Sequence[int],
    buckets_shape: Sequence[int],
    seed: int,
    in_features: int,
    out_features: int,
    *args: object,
    **kwargs: object,
) -> int:
    """2 per virtual weight and row, as torch counts a multiply and an add: hashing saves none."""
    return 2 * input_shape[0] * in_features * out_features


def hashed_linear_reference(
    input: Tensor,
    buckets: Tensor,
    seed: int,
    in_features: int,
    out_features: int,
    *,
    bias: Tensor | None = None,
    activation: str = "none",
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`hashed_linear` in plain PyTorch, summed in float64."""
    weight = hashed_weight_reference(buckets, seed, in_features, out_features).double()
    y = F.linear(input.double(), weight, None if bias is None else bias.double())
    return activate(y, activation).to(out_dtype or input.dtype)
