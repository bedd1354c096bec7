"""Quantizers: functions from float tensors to few values, with the gradient training pretends.

Each docstring states the forward formula, the pseudo-gradient, the paper: in that order.
"""

import math

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


def ternary_regions(weight: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Where weights are large: above D, and below -D, with `D = threshold * max |weight|`.

    Returns:
        Two bool tensors like `weight`. Neither has a weight of 0, nor any if one weight is NaN.
    """
    weight = weight.detach()
    if not weight.numel():
        return weight > 0, weight < 0
    limit = threshold * weight.abs().amax()
    return weight > limit, weight < -limit


def ternary(weight: Tensor, positive: Tensor, negative: Tensor, threshold: float) -> Tensor:
    """Quantise weights to three values, two of which are learned; in the dtype of `weight`.

    Forward: `positive` above D, `-negative` below -D, else 0: regions of `ternary_regions`.
    Gradient: `dC/dpositive` is the sum of `dC/dy` above D; `dC/dnegative` minus the sum below -D.
    Pseudo-gradient: `dC/dW = dC/dy * {positive, 1, negative}`: above D, between, below -D.
    Paper: Zhu et al., "Trained Ternary Quantization", ICLR 2017.

    Args:
        positive, negative: `[]`.
    """
    return _Ternary.apply(weight, positive, negative, *ternary_regions(weight, threshold))


def inq_codebook(weight: Tensor, bits: int) -> Tensor:
    """The values of Incremental Network Quantization for a weight: 0 and powers of two.

    `{0, 2**n2 ... 2**n1, -2**n2 ... -2**n1}` in this order, then zeros that no code stands for;
    `n1 = floor(log2(4 * max |weight| / 3))`, hence `2**n1` is the nearest power of two to the
    largest magnitude, and `n2 = n1 + 1 - 2**(bits - 2)`. Zeros alone get zeros.

    Args:
        weight: any shape.
        bits: 2 to 8: 3, 5, 9, 17, 33, 65 or 129 values.

    Returns:
        float32 `[2**bits]`.

    Paper: Zhou et al., "Incremental Network Quantization", ICLR 2017.
    """
    if not weight.numel():
        return weight.new_zeros(2**bits, dtype=torch.float32)
    largest = weight.detach().abs().amax().item()
    mantissa, exponent = math.frexp(largest)  # exact, unlike a logarithm
    n1 = exponent if mantissa >= 0.75 else exponent - 1
    powers = [math.ldexp(float(largest > 0), n1 - i) for i in reversed(range(2 ** (bits - 2)))]
    values = [0.0, *powers, *(-power for power in powers)]
    return weight.new_tensor(values + [0.0] * (2**bits - len(values)), dtype=torch.float32)


def inq_codes(weight: Tensor, codebook: Tensor) -> Tensor:
    """Codes of weights into a codebook of `inq_codebook`: uint8, in the shape of `weight`.

    Of two adjacent magnitudes a < b of the codebook, 0 the smallest, `|w|` becomes b from
    `(a + b) / 2` on, up to `3 * b / 2`. That is the paper's rule, but for what is larger than all
    of it: there is none of that at first, and what training makes so large becomes `2**n1`, not 0.
    """
    count = len(codebook) // 4
    magnitudes = codebook[1 : count + 1]
    edges = torch.cat([magnitudes[:1] / 2, magnitudes[1:] * 0.75])
    steps = torch.bucketize(weight.detach().abs().float().contiguous(), edges, right=True)
    return torch.where((weight < 0) & (steps > 0), steps + count, steps).to(torch.uint8)


INT8_MIN, INT8_MAX = -128, 127  # of activations; weights are in [-127, 127]


def int8_input_parameters(range: Tensor, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scale and zero point of int8 activations whose values lie in a range.

    Affine: `scale = (maximum - minimum) / 255`, `zero_point = clamp(rint(-128 - minimum / scale))`.
    Symmetric: `scale = max(-minimum, maximum) / 127`, `zero_point = 0`.
    The range is first widened to contain 0, which thereby has a code of its own: padding, and what
    a ReLU cuts off, stay exact. A range of nothing but 0 (or of less than any float32 has a
    reciprocal for) gets the scale 1.

    Args:
        range: float32 `[2]`: minimum and maximum.
        symmetric: whether the zero point shall be 0.

    Returns:
        scale, float32 `[]`, and zero point, int8 `[]`, as `nncx.ops.quantize_int8` takes them.

    Paper: Jacob et al., "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference", CVPR 2018.
    """
    if range.is_meta:  # as in load, at once
        return range.new_empty(()), range.new_empty((), dtype=torch.int8)
    minimum, maximum = range[0].clamp(max=0.0), range[1].clamp(min=0.0)
    if symmetric:
        scale = _or_one(torch.maximum(-minimum, maximum) / INT8_MAX)
        return scale, torch.zeros_like(scale, dtype=torch.int8)
    scale = _or_one(maximum / 255 - minimum / 255)  # the difference itself could be infinite
    zero_point = (INT8_MIN - minimum / scale).round().clamp(INT8_MIN, INT8_MAX)
    return scale, zero_point.to(torch.int8)


def int8_input(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Quantise activations: their int8 codes less the zero point, as integers in float32.

    Forward: `clamp(rint(x * (1 / scale)) + zero_point, -128, 127) - zero_point`, ties to even: the
    codes of `nncx.ops.quantize_int8`, but NaN stays NaN, so that training sees it.
    Pseudo-gradient: `dC/dx = dC/dq / scale`, 0 where clipped: rounding counts as the identity.
    Paper: Jacob et al., CVPR 2018, whose simulated values are `scale` times these.
    """
    steps = _Round.apply(x.float() * scale.reciprocal())
    zero_point = zero_point.float()
    return _Clip.apply(steps, INT8_MIN - zero_point, INT8_MAX - zero_point)


def int8_weight_scale(weight: Tensor, per_channel: bool) -> Tensor:
    """Scale of int8 weights `[O, ...]`, `max |W| / 127`: float32 `[O]`, or `[1]` for all.

    Detached. Zeros alone get the scale 1.
    """
    size = len(weight) if per_channel else 1
    if weight.is_meta or not weight.numel():
        return weight.new_ones(size, dtype=torch.float32)
    filters = weight.detach().float().reshape(size, -1)
    return _or_one(torch.linalg.vector_norm(filters, torch.inf, dim=1) / INT8_MAX)


def int8_weight(weight: Tensor, scale: Tensor) -> Tensor:
    """Quantise weights `[O, ...]` to int8 codes, as integers in float32.

    Forward: `clamp(rint(W / scale), -127, 127)`, ties to even; `scale` of `int8_weight_scale`.
    Pseudo-gradient: `dC/dW = dC/dq / scale`, 0 where clipped (with that scale, nowhere).
    Paper: Jacob et al., CVPR 2018.
    """
    steps = _Round.apply(weight.float() / scale.view(-1, *[1] * (weight.dim() - 1)))
    return _Clip.apply(steps, -INT8_MAX, INT8_MAX)


def half_weight(weight: Tensor, storage: torch.dtype) -> Tensor:
    """Round weights to 16 bits; the result has their own dtype.

    Forward: the nearest of `storage`, float16 or bfloat16, ties to even.
    Pseudo-gradient: `dC/dW = dC/dW_h`.
    """
    return _RoundTo.apply(weight, storage)


def _or_one(scale: Tensor) -> Tensor:
    """1 for a scale whose reciprocal float32 may lack: nothing but zeros was seen."""
    return torch.where(scale.abs() < torch.finfo(torch.float32).tiny, 1.0, scale)


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


class _Ternary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, positive, negative, above, below):
        ctx.save_for_backward(positive, negative, above, below)
        return torch.where(above, positive, torch.where(below, -negative, 0)).to(weight.dtype)

    @staticmethod
    def backward(ctx, grad):
        positive, negative, above, below = ctx.saved_tensors
        scale = torch.where(above, positive, torch.where(below, negative, 1))
        return grad * scale, (grad * above).sum(), -(grad * below).sum(), None, None


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()  # ties to even

    @staticmethod
    def backward(ctx, grad):
        return grad


class _Clip(torch.autograd.Function):
    """torch.clamp; but what is at a bound has a gradient, which torch's has only before 2.14."""

    @staticmethod
    def forward(ctx, x, low, high):
        ctx.save_for_backward((x >= low) & (x <= high))
        return torch.clamp(x, low, high)

    @staticmethod
    def backward(ctx, grad):
        (inside,) = ctx.saved_tensors
        return grad * inside, None, None


class _RoundTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dtype):
        return x.to(dtype).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad, None
