"""A chain of binary layers that stays in bits gives the bits of the layers one by one."""

import pytest
import torch
from torch import nn

from nncx import ops
from nncx.nn import XNORConv2d, XNORLinear, fold_sign


def _norm(channels: int, kind: type) -> nn.Module:
    """Statistics and parameters of every sort: gamma of both signs and 0, bias that decides."""
    norm = kind(channels).eval()
    nn.init.normal_(norm.running_mean, std=3)
    nn.init.uniform_(norm.running_var, 0.1, 9)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    norm.weight.data[::6] = 0
    norm.bias.data[:3] = torch.tensor([1.0, -1.0, 0.0])
    norm.weight.data[:3] = 0
    return norm.requires_grad_(False)


@pytest.mark.parametrize("scale", ["none", "alpha"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_conv_chain(isa: str, scale: str, bias: bool, frozen: bool) -> None:
    first = XNORConv2d(20, 70, 3, padding=1, bias=bias, scale=scale).eval()
    second = XNORConv2d(70, 24, 3, groups=2).eval()
    if frozen:
        first.freeze()
    norm, pool = _norm(70, nn.BatchNorm2d), nn.MaxPool2d(2)
    x = torch.randn(2, 20, 12, 10)
    threshold, flip = fold_sign(first, norm)
    with torch.no_grad():
        expected = second(pool(norm(first(x))))
    packed = ops.binary_conv2d_sign(
        *(ops.pack_signs(x), first._prepacked, threshold, flip),
        *(20, 70, 3, 1, 1),
        out_groups=2,
    )
    packed = ops.max_pool2d_signs(packed, 2)
    out = ops.binary_conv2d(
        *(packed, second._prepacked, 70, 24, 3), groups=2, scale=second.alpha, bias=second.bias
    )
    assert torch.equal(out, expected)


def test_linear_chain(isa: str) -> None:
    first, norm = XNORLinear(100, 37).eval(), _norm(37, nn.BatchNorm1d)
    x = torch.randn(50, 100)
    threshold, flip = fold_sign(first, norm, nn.Hardtanh().eval())
    packed = ops.binary_linear_sign(ops.pack_signs(x), first._prepacked, threshold, flip, 100, 37)
    with torch.no_grad():
        assert torch.equal(packed, ops.pack_signs(norm(first(x))))


def test_every_dot_product_is_on_the_right_side() -> None:
    """All 2 * 9 + 1 values a dot product of 9 signs could take, through the layers themselves."""
    layer, norm = XNORConv2d(1, 40, 3).eval(), _norm(40, nn.BatchNorm2d)
    threshold, flip = fold_sign(layer, norm)
    dots = torch.arange(-9, 10).view(-1, 1, 1, 1)
    with torch.no_grad():
        y = norm(dots * layer.alpha.view(-1, 1, 1) + layer.bias.view(-1, 1, 1))
    bits = (dots >= threshold.view(-1, 1, 1)) ^ flip.view(-1, 1, 1)
    assert torch.equal(bits, y >= 0)
    assert {True, False} == set(flip.tolist())


def test_refuses() -> None:
    layer = XNORConv2d(4, 8, 3).eval()
    with pytest.raises(ValueError, match="must not scale by its input, got scale='alpha_k'"):
        fold_sign(XNORConv2d(4, 8, 3, scale="alpha_k").eval())
    with pytest.raises(ValueError, match="BatchNorm2d must be in eval mode, got training mode"):
        fold_sign(layer, nn.BatchNorm2d(8))
    with pytest.raises(ValueError, match="XNORConv2d must be in eval mode"):
        fold_sign(layer.train())
