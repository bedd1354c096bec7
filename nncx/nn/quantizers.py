"""Quantizers: functions from float tensors to few values, with the gradient training pretends.

Each docstring states the forward formula, the pseudo-gradient, the paper: in that order.
"""

import torch
from torch import Tensor


def sign(x: Tensor) -> Tensor:
    """Binarise to +1 and -1 in the dtype of `x`.

    Forward: `+1 if x >= 0 else -1`; so 0 and -0 give +1, NaN gives -1 (unlike `torch.sign`).
    Pseudo-gradient: `dC/dx = dC/dy * 1[|x| < 1]`, the straight-through estimator.
    Paper: Courbariaux et al., "Binarized Neural Networks", 2016.
    """
    return _Sign.apply(x)


def xnor_sign(weight: Tensor) -> Tensor:
    """Signs of weights `[O, ...]`, in their dtype, to be followed by a product with `xnor_alpha`.

    Forward: `sign(weight)`.
    Pseudo-gradient: XNOR-Net binarises to `W~ = alpha * sign(W)` and publishes

        dC/dW_i = dC/dW~_i * (1/n + alpha * 1[|W_i| < 1]),    alpha = ||W||_1 / n

    per filter of n weights. Our layers multiply by alpha *after* the convolution, so that the
    convolution adds integers; what arrives here is `g_i = alpha * dC/dW~_i`, and therefore

        dC/dW_i = g_i * (1 / ||W||_1 + 1[|W_i| < 1]).

    For a filter that is all zeros alpha is 0, hence `g` is 0 and the gradient is 0 as well.
    Paper: Rastegari et al., "XNOR-Net", ECCV 2016.
    """
    return _XnorSign.apply(weight)


def xnor_alpha(weight: Tensor) -> Tensor:
    """Scale of XNOR-Net, `alpha = ||W||_1 / n` per filter of weights `[O, ...]`: float32 `[O]`.

    Detached: the gradient through alpha is the `1/n` term of `xnor_sign`.
    """
    if weight.is_meta:  # as in load, at once
        return weight.new_empty(len(weight), dtype=torch.float32)
    filters = weight.detach().flatten(1)
    return _l1_norm(filters) / max(filters.shape[1], 1)


def binary_connect_sign(weight: Tensor) -> Tensor:
    """Binarise weights deterministically to +1 and -1, in their dtype.

    Forward: `sign(weight)`.
    Pseudo-gradient: `dC/dw = dC/dw_b`, also where `|w| >= 1`: BinaryConnect masks nothing, it clips
    the weights to [-1, 1] after each update instead.
    Paper: Courbariaux et al., "BinaryConnect", NeurIPS 2015.
    """
    return _PassThrough.apply(weight, weight >= 0)


def binary_connect_sample(weight: Tensor) -> Tensor:
    """Binarise weights at random to +1 and -1, in their dtype; anew in every call.

    Forward: +1 with probability `p = clip((w + 1) / 2, 0, 1)`, the hard sigmoid, else -1; so the
    mean is `clip(w, -1, 1)`. NaN gives -1.
    Pseudo-gradient and paper: as `binary_connect_sign`.
    """
    # Of [-1, 1): strictly above it are all draws of w = 1 and none of w = -1.
    threshold = 2 * torch.rand_like(weight, dtype=torch.float32) - 1
    return _PassThrough.apply(weight, weight > threshold)


def _l1_norm(filters: Tensor) -> Tensor:
    # Of the row-major copy that flatten makes: the sum must not depend on the memory format.
    return filters.float().abs().sum(1)


def _hard_sign(x: Tensor) -> Tensor:
    return _plus_or_minus_one(x >= 0, x.dtype)


def _plus_or_minus_one(positive: Tensor, dtype: torch.dtype) -> Tensor:
    return positive.to(dtype).mul_(2).sub_(1)  # five times as fast as torch.where on a CPU


# torch.compile traces autograd functions of this form (context as first argument of forward) in
# every supported version of torch.


class _Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return _hard_sign(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * (x.abs() < 1)


class _XnorSign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight):
        ctx.save_for_backward(weight)
        return _hard_sign(weight)

    @staticmethod
    def backward(ctx, grad):
        (weight,) = ctx.saved_tensors
        norm = _l1_norm(weight.flatten(1))
        inverse = torch.where(norm > 0, 1 / norm, 0.0).view(-1, *[1] * (weight.dim() - 1))
        return (grad * (inverse + (weight.abs() < 1))).to(weight.dtype)


class _PassThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, positive):
        return _plus_or_minus_one(positive, weight.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad, None
