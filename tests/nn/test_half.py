"""16-bit layers: what a float layer with rounded weights computes."""

import copy
import math

import pytest
import torch
from layer_families import FAMILIES, GEOMETRIES, evaluate, images
from torch import nn

from nncx.compress import freeze
from nncx.nn import HalfConv2d, HalfLinear

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@pytest.fixture(params=DTYPES)
def storage(request):
    return request.param


def _rounded(layer):
    """torch's layer with the weight that the file would hold."""
    plain = nn.Conv2d if isinstance(layer, nn.Conv2d) else nn.Linear
    twin = copy.deepcopy(layer).train()
    with torch.no_grad():
        twin.weight.copy_(layer.weight.to(DTYPES[layer.storage]))
    return lambda x: plain.forward(twin.to(x.dtype), x)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_conv_is_torchs_with_rounded_weights(geometry, storage):
    layer, x = FAMILIES[f"half, {storage}"].conv(**GEOMETRIES[geometry]), images()
    expected = _rounded(layer)(x)
    assert not torch.equal(nn.Conv2d.forward(layer, x), expected)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(evaluate(layer, x), expected)
    torch.testing.assert_close(evaluate(layer.freeze(), x), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 70), (70,), (2, 3, 4, 70), (0, 70)])
def test_linear_is_torchs_with_rounded_weights(shape, dtype, storage):
    layer, x = HalfLinear(70, 5, storage=storage), images(*shape, dtype=dtype)
    expected = _rounded(layer)(x)
    assert expected.dtype == dtype
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(evaluate(layer.freeze(), x), expected)


def test_gradients_pass_as_they_are(storage):
    layer, x = HalfConv2d(6, 9, 3, storage=storage), images()
    layer.weight.data *= 1e-3
    scale = 1e-9  # which float16 does not hold
    (scale * layer(x)).sum().backward()
    twin = nn.Conv2d(6, 9, 3)
    (scale * twin(x)).sum().backward()
    torch.testing.assert_close(layer.weight.grad, twin.weight.grad, rtol=1e-4, atol=0)


def test_a_weight_that_float16_lacks_is_refused():
    layer = HalfLinear(4, 2)
    layer.weight.data[1, 2] = 70_000.0
    message = r"must have weights that float16 holds, got 7e\+04; keep it float"
    with pytest.raises(ValueError, match=f"freeze: '0' {message}"):
        freeze(nn.Sequential(layer))
    layer.weight.data[1, 2] = math.nan
    with pytest.raises(ValueError, match="freeze: the HalfLinear must have weights that float16"):
        layer.freeze()
    layer = HalfLinear(4, 2, storage="bfloat16")
    layer.weight.data[1, 2] = 70_000.0
    assert layer.freeze().packed_weight.dtype == torch.bfloat16


@pytest.mark.parametrize("cls, geometry", [(HalfConv2d, (1, 1, 1)), (HalfLinear, (1, 1))])
def test_other_storages_are_refused(cls, geometry):
    with pytest.raises(ValueError, match="storage must be one of float16, bfloat16, got 'float8'"):
        cls(*geometry, storage="float8")
