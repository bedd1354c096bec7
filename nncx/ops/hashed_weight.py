"""The weight of a hashed layer, written out, and the transpose of that: what gradients need.

Paper: Chen et al., "Compressing Neural Networks with the Hashing Trick", ICML 2015.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from nncx.ops._common import call_op, check, check_features, tensor_text

MOST_BUCKETS = 2**31 - 1
_MASK = 2**32 - 1


def hashed_weight(buckets: Tensor, seed: int, in_features: int, out_features: int) -> Tensor:
    """Every weight of a `hashed_linear`: plus or minus the bucket that its place hashes to.

    Args:
        buckets: float32 ``[B]``. Other dtypes, and devices without a kernel, as CUDA, are left to
            torch, which hashes in int64: 8 bytes a weight, some of them at once.
        seed: any 64-bit integer.
        in_features, out_features: as in ``nn.Linear``.

    Returns:
        ``[out_features, in_features]`` in the dtype of `buckets`, the same bits on every path. It
        has gradients: `hashed_bucket_sums`.

    Raises:
        RuntimeError: if dtypes or shapes do not fit.
    """
    if not _has_kernel(buckets):
        check_weight("hashed_weight", _count(buckets), in_features, out_features)
        return hashed_weight_reference(buckets, seed, in_features, out_features)
    return call_op(torch.ops.nncx.hashed_weight, buckets, seed, in_features, out_features)


def hashed_bucket_sums(values: Tensor, seed: int, buckets: int) -> Tensor:
    """For each bucket the sum of the `values` whose places hash to it, with the hash's signs.

    Args:
        values: float32 ``[out_features, in_features]``; other dtypes and devices as above.
        seed: that of `hashed_weight`, whose transpose this is.
        buckets: how many.

    Returns:
        ``[buckets]`` in the dtype of `values`: sums in the order of the rows, on one thread of a
        CPU, the same bits on every path. It has gradients: `hashed_weight`.

    Raises:
        RuntimeError: if dtypes or shapes do not fit.
    """
    if not _has_kernel(values):
        _check_values(values, values.dtype)
        check_weight("hashed_bucket_sums", buckets, *reversed(values.shape))
        return hashed_bucket_sums_reference(values, seed, buckets)
    return call_op(torch.ops.nncx.hashed_bucket_sums, values, seed, buckets)


def _has_kernel(tensor: Tensor) -> bool:
    """Integers too: the kernel says what must hold."""
    floats = tensor.is_floating_point() and tensor.dtype != torch.float32
    return tensor.device.type in ("cpu", "meta") and not floats


def _count(buckets: Tensor) -> int:
    return buckets.shape[0] if buckets.dim() == 1 else 0


def check_weight(op: str, buckets: int, in_features: int, out_features: int) -> None:
    """Bounds the sizes of a hashed weight."""
    check_features(op, in_features, out_features)
    check(
        1 <= buckets <= MOST_BUCKETS,
        lambda: f"{op}: buckets must be 1 to {MOST_BUCKETS}, got {buckets}",
    )


def check_buckets(op: str, buckets: Tensor) -> None:
    check(
        buckets.dtype == torch.float32 and buckets.dim() == 1,
        lambda: f"{op}: buckets must be float32 of one dimension, got {tensor_text(buckets)}",
    )


def _check_values(values: Tensor, dtype: torch.dtype = torch.float32) -> None:
    check(
        values.dtype == dtype and values.dim() == 2,
        lambda: (
            "hashed_bucket_sums: values must be float32 of two dimensions, got "
            f"{tensor_text(values)}"
        ),
    )


@torch.library.register_fake("nncx::hashed_weight")
def _weight_fake(buckets: Tensor, seed: int, in_features: int, out_features: int) -> Tensor:
    op = "hashed_weight"
    check_buckets(op, buckets)
    check_weight(op, buckets.shape[0], in_features, out_features)
    return buckets.new_empty([out_features, in_features])


@torch.library.register_fake("nncx::hashed_bucket_sums")
def _sums_fake(values: Tensor, seed: int, buckets: int) -> Tensor:
    _check_values(values)
    check_weight("hashed_bucket_sums", buckets, values.shape[1], values.shape[0])
    return values.new_empty([buckets])


def _setup_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    buckets, ctx.seed, *_ = inputs
    ctx.buckets = buckets.shape[0]


def _weight_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return hashed_bucket_sums(gradient, ctx.seed, ctx.buckets), None, None, None


def _setup_sums(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, ctx.seed, _ = inputs
    ctx.out_features, ctx.in_features = values.shape


def _sums_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return hashed_weight(gradient, ctx.seed, ctx.in_features, ctx.out_features), None, None


torch.library.register_autograd(
    "nncx::hashed_weight", _weight_backward, setup_context=_setup_weight
)
torch.library.register_autograd(
    "nncx::hashed_bucket_sums", _sums_backward, setup_context=_setup_sums
)


@register_flop_formula([torch.ops.nncx.hashed_weight, torch.ops.nncx.hashed_bucket_sums])
def _flops(first_shape: Sequence[int], *args: object, **kwargs: object) -> int:
    return 0  # integers, look-ups and additions


def hash_places(
    seed: int, buckets: int, in_features: int, out_features: int, device: torch.device | str
) -> Tensor:
    """What the place of each weight hashes to, by the formula at the head of csrc/hashed_linear.h.

    Returns:
        int64 ``[out_features, in_features]`` in ``[0, 2 * buckets)``: twice the bucket, and one
        more for the sign minus.
    """
    z = (torch.arange(out_features, device=device) + 1) * _signed(0x9E3779B97F4A7C15) + seed
    z = (z ^ _shifted(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shifted(z, 27)) * _signed(0x94D049BB133111EB)
    z = (z ^ _shifted(z, 31)).unsqueeze(1)
    x = (z & _MASK) + torch.arange(in_features, device=device) * 0x9E3779B1 & _MASK
    x = (x ^ x >> 16) * 0x7FEB352D & _MASK
    x = ((x ^ x >> 15) + _shifted(z, 32) & _MASK) * 0x846CA68B & _MASK
    return _shifted(x * (2 * buckets), 32)


def _signed(word: int) -> int:
    """The int64 of the same bits."""
    return word - 2**64 if word >= 2**63 else word


def _shifted(x: Tensor, by: int) -> Tensor:
    """To the right, as unsigned numbers are."""
    return x >> by & (1 << (64 - by)) - 1


def hashed_weight_reference(
    buckets: Tensor, seed: int, in_features: int, out_features: int
) -> Tensor:
    """`hashed_weight` in plain PyTorch."""
    places = hash_places(seed, len(buckets), in_features, out_features, buckets.device)
    return torch.stack((buckets, -buckets), 1).flatten()[places]


def hashed_bucket_sums_reference(values: Tensor, seed: int, buckets: int) -> Tensor:
    """`hashed_bucket_sums` in plain PyTorch, which on a GPU sorts the places: no atomics."""
    places = hash_places(seed, buckets, values.shape[1], values.shape[0], values.device)
    signed = torch.where(places % 2 == 1, -values, values)
    return values.new_zeros(buckets).index_put((places // 2,), signed, accumulate=True)
