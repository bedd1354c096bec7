"""What the Python side of every op shares: its call, checks that raise, refused gradients."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from nncx._native import _C

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def call_op(op: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """``op(*arguments)``, behind autograd if no gradient is asked for.

    The backward of an op is registered in Python, which takes 4 us of a call even where it has
    nothing to do: as long as a small kernel. Compiled code has no such part, and a transform of
    torch.func decides by itself what is behind it.
    """
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return op(*arguments)
    if forward_ad._current_level >= 0:
        _refuse_tangents(op, arguments)
    transformed = torch._C._functorch.maybe_current_level() is not None
    if transformed or (torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments)):
        return op(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*arguments)


def _refuse_tangents(op: Callable[..., Tensor], arguments: tuple[Any, ...]) -> None:
    """Raises where torch would leave the derivative of forward mode out, and say nothing."""
    tensors = (each for each in arguments if isinstance(each, Tensor))
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise RuntimeError(
            f"{op.__name__}: derivatives must be asked for in reverse mode, got a tensor with a"
            " tangent; use backward() or torch.func.vjp"
        )


def check(holds: bool | torch.SymBool, sentence: Callable[[], str]) -> None:
    """Raises RuntimeError with `sentence()`, in the native op's words, unless `holds`."""
    torch._check(holds, sentence)


def shape_text(tensor: Tensor) -> str:
    return str(list(tensor.shape))


def tensor_text(tensor: Tensor) -> str:
    return f"{tensor.dtype} of shape {shape_text(tensor)} on {tensor.device}"


def refuse_gradient(op: str, through: str, advice: str) -> None:
    """Makes the op's backward raise: a gradient that is asked for is never silently None."""

    def backward(context: Any, *gradients: Tensor) -> None:
        raise RuntimeError(f"{op}: no gradient flows through {through}; {advice}")

    torch.library.register_autograd(f"nncx::{op}", backward)


def packed_bytes(channels: int) -> int:
    """Bytes of one group of `channels` signs: padded to whole 64-bit words."""
    return (channels + 63) // 64 * 8


def unpack_signs(packed: Tensor, channels: int) -> Tensor:
    """The signs behind `pack_signs` as float64 -1 and +1: ``[..., B] -> [..., channels]``."""
    bits = packed.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=packed.device) & 1
    return bits.flatten(-2)[..., :channels].double() * 2 - 1


def check_weight_shape(op: str, groups: int, out_channels: int, taps: int, channels: int) -> None:
    """Bounds the sizes of a weight, those of one group, before any is multiplied."""
    check(
        channels * taps < 2**30 and channels < 2**30,
        lambda: f"{op}: a dot product must have less than 2^30 terms, got {taps} x {channels}",
    )
    check(
        8 * groups * (out_channels + 31) * taps * (channels + 63) < 2**60,
        lambda: (
            f"{op}: the weight must fit in memory, got groups={groups}, "
            f"out_channels/groups={out_channels}, taps={taps}, in_channels/groups={channels}"
        ),
    )


def check_features(op: str, in_features: int, out_features: int) -> None:
    """Bounds the sizes of a linear layer's weight."""
    check(
        in_features >= 0 and out_features >= 0,
        lambda: (
            f"{op}: in_features and out_features must be at least 0, got {in_features} and "
            f"{out_features}"
        ),
    )
    check_weight_shape(op, 1, out_features, 1, in_features)


def prepacked_numel(
    groups: int, out_channels: int, taps: int, channels: int, device: torch.device
) -> int:
    """Bytes of a prepacked binary weight on a device, the CPU's under the active path."""
    return _C.binary_prepacked_numel(groups, out_channels, taps, channels, device.type)


def check_epilogue(
    op: str,
    input: Tensor,
    weight: Tensor,
    out_channels: int,
    per_pixel: list[int],
    scale: Tensor | None,
    bias: Tensor | None,
    input_scale: Tensor | None,
    out_dtype: torch.dtype | None,
) -> torch.dtype:
    """Checks what follows the geometry of a binary op; returns the dtype of its output."""
    dtype = check_out_dtype(op, torch.float32 if out_dtype is None else out_dtype)
    for name, tensor, shape in (
        ("scale", scale, [out_channels]),
        ("bias", bias, [out_channels]),
        ("input_scale", input_scale, per_pixel),
    ):
        if tensor is not None:
            check_operand(op, name, input, tensor, shape)
    check_prepacked(op, input, weight)
    return dtype


def check_input_dtype(op: str, input: Tensor) -> None:
    check(
        input.dtype in (torch.float32, torch.float16, torch.bfloat16),
        lambda: f"{op}: input must be float32, float16 or bfloat16, got {input.dtype}",
    )


def check_out_dtype(op: str, dtype: torch.dtype) -> torch.dtype:
    check(
        dtype in (torch.float32, torch.float16, torch.bfloat16),
        lambda: f"{op}: out_dtype must be float32, float16 or bfloat16, got {dtype}",
    )
    return dtype


def check_sign_epilogue(
    op: str, input: Tensor, weight: Tensor, out_channels: int, threshold: Tensor, flip: Tensor
) -> None:
    """Checks what a binary op compares its dot products with."""
    check_operand(op, "threshold", input, threshold, [out_channels], torch.int32)
    check_operand(op, "flip", input, flip, [out_channels], torch.bool)
    check_prepacked(op, input, weight)


def check_prepacked(op: str, input: Tensor, weight: Tensor) -> None:
    check(
        weight.device == input.device,
        lambda: (
            f"{op}: weight must be on the input's device, got {weight.device} and {input.device}"
        ),
    )
    prepack = f"{op.removesuffix('_sign')}_prepack"
    check(
        weight.dtype == torch.uint8 and weight.dim() == 1,
        lambda: (
            f"{op}: weight must come from {prepack}, got a tensor of shape {shape_text(weight)}"
        ),
    )


def check_operand(
    op: str,
    name: str,
    input: Tensor,
    tensor: Tensor,
    shape: list[int],
    dtype: torch.dtype = torch.float32,
) -> None:
    """Refuses what goes with `input`, such as a bias, in another dtype or shape."""

    def sentence() -> str:
        return (
            f"{op}: {name} must be {str(dtype).removeprefix('torch.')} of shape {shape} on the "
            f"input's device, got {tensor_text(tensor)}"
        )

    check(
        tensor.dtype == dtype and tensor.dim() == len(shape) and tensor.device == input.device,
        sentence,
    )
    for size, expected in zip(tensor.shape, shape, strict=True):
        check(size == expected, sentence)
