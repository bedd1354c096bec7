"""Quantizers against their published formulas."""

import pytest
import torch

from nncx.nn.quantizers import (
    binary_connect_sample,
    binary_connect_sign,
    sign,
    xnor_alpha,
    xnor_sign,
)

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("binarize", [sign, xnor_sign, binary_connect_sign])
def test_sign_of_special_values(binarize, dtype):
    x = torch.tensor([[0.0, -0.0, 1e-7, -1e-7, torch.inf, -torch.inf, torch.nan]], dtype=dtype)
    y = binarize(x)
    assert y.dtype == dtype
    assert y.tolist() == [[1, 1, 1, -1, 1, -1, -1]]


def test_sign_passes_gradients_strictly_inside_one():
    x = torch.tensor([-1.5, -1.0, -0.99, -0.0, 0.5, 1.0, torch.nan], requires_grad=True)
    sign(x).backward(torch.arange(1.0, 8.0))
    assert x.grad.tolist() == [0, 0, 3, 4, 5, 0, 0]


@pytest.mark.parametrize("shape", [(3, 4, 3, 3), (5, 7)])
def test_xnor_gradient_is_the_published_one(shape):
    torch.manual_seed(0)
    weight = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    published = torch.randn(shape, dtype=torch.float64)  # dC/dW~

    per_filter = (-1, *[1] * (len(shape) - 1))
    alpha = xnor_alpha(weight).double().view(per_filter)
    (alpha * xnor_sign(weight)).backward(published)

    count = weight[0].numel()
    inside = (weight.detach().abs() < 1).double()
    exact_alpha = weight.detach().abs().flatten(1).mean(1).view(per_filter)
    torch.testing.assert_close(
        weight.grad, published * (1 / count + exact_alpha * inside), rtol=1e-6, atol=1e-9
    )


def test_filter_of_zeros_gets_a_zero_gradient():
    weight = torch.zeros(2, 3)
    weight[1] = 0.5
    weight.requires_grad_()
    (xnor_alpha(weight)[:, None] * xnor_sign(weight)).sum().backward()
    assert weight.grad.isfinite().all()
    assert weight.grad[0].eq(0).all() and weight.grad[1].ne(0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_alpha_is_the_mean_magnitude_in_float32(dtype):
    torch.manual_seed(0)
    weight = torch.randn(6, 5, 3, 3).to(dtype)
    alpha = xnor_alpha(weight.requires_grad_())
    assert alpha.dtype == torch.float32 and not alpha.requires_grad
    exact = weight.detach().double().abs().mean((1, 2, 3))
    torch.testing.assert_close(alpha.double(), exact, rtol=1e-6, atol=0)


def test_alpha_does_not_depend_on_the_memory_format():
    torch.manual_seed(0)
    weight = torch.randn(6, 37, 3, 3)
    channels_last = weight.to(memory_format=torch.channels_last)
    assert torch.equal(xnor_alpha(weight), xnor_alpha(channels_last))


def test_alpha_of_empty_filters_is_zero():
    assert xnor_alpha(torch.empty(3, 0)).tolist() == [0, 0, 0]


# ---------------------------------------------------------------------------------------------
# BinaryConnect


@pytest.mark.parametrize("dtype", DTYPES)
def test_samples_are_sure_from_one_on(dtype):
    weight = torch.tensor([1, -1, 1.5, -1.5, torch.inf, -torch.inf, torch.nan], dtype=dtype)
    samples = binary_connect_sample(weight.repeat(100_000, 1))
    assert samples.dtype == dtype
    expected = torch.tensor([1, -1, 1, -1, 1, -1, -1], dtype=dtype)
    assert torch.equal(samples, expected.expand_as(samples))


@pytest.mark.parametrize("drawn", [0.0, 1 - 2**-24])  # the ends of what torch.rand gives
def test_samples_are_sure_at_the_ends_of_the_draw_too(drawn, monkeypatch):
    monkeypatch.setattr(torch, "rand_like", lambda x, dtype: torch.full_like(x, drawn, dtype=dtype))
    assert binary_connect_sample(torch.tensor([1.0, -1.0])).tolist() == [1, -1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_samples_are_plus_one_with_the_probability_of_the_hard_sigmoid(dtype):
    count = 200_000
    weight = torch.tensor([-0.99, -0.75, -0.1, -0.0, 0.0, 0.01, 0.5, 0.9], dtype=dtype)
    samples = binary_connect_sample(weight.repeat(count, 1)).double()
    assert samples.abs().eq(1).all()
    p = ((weight.double() + 1) / 2).clamp(0, 1)
    deviation = 2 * (p * (1 - p) / count).sqrt()
    assert ((samples.mean(0) - weight.double()).abs() < 5 * deviation).all()


def test_samples_are_drawn_anew_independently_and_from_the_seed():
    weight = torch.zeros(64, 64)
    torch.manual_seed(1)
    first, second = binary_connect_sample(weight), binary_connect_sample(weight)
    torch.manual_seed(1)
    assert torch.equal(binary_connect_sample(weight), first)
    assert abs((first * second).mean().item()) < 5 / 64, "uncorrelated: 64 * 64 products of +-1"


@pytest.mark.parametrize("binarize", [binary_connect_sign, binary_connect_sample])
def test_binary_connect_passes_every_gradient(binarize):
    weight = torch.tensor([-1.5, -1.0, -0.0, 0.5, 1.0, 2.0, torch.nan], requires_grad=True)
    binarize(weight).backward(torch.arange(1.0, 8.0))
    assert weight.grad.tolist() == [1, 2, 3, 4, 5, 6, 7]
