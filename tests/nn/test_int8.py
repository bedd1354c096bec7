"""Int8 layers: exact integers, gradients of the published formula, the range of the input."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from layer_families import FAMILIES, GEOMETRIES, evaluate, images
from torch import nn

from nncx.compress import freeze
from nncx.nn import Int8Conv2d, Int8Linear
from nncx.nn.int8 import MOST_TERMS

NAMES = [name for name in FAMILIES if name.startswith("int8")]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
LOW, HIGH = FAMILIES["int8"].input_range


@pytest.fixture(params=NAMES)
def family(request):
    return FAMILIES[request.param]


def _parameters(layer, low=LOW, high=HIGH):
    """Scale and zero point, in numpy's float32."""
    low, high = np.float32(low), np.float32(high)
    if layer.symmetric:
        return max(-low, high) / np.float32(127), 0
    scale = high / np.float32(255) - low / np.float32(255)
    return scale, int(np.rint(np.float32(-128) - low / scale))


def _expected(layer, x):
    """What the layer computes, with sums of whole numbers and float32 after them."""
    scale, zero_point = _parameters(layer)
    values = x.float().numpy()
    codes = np.clip(np.rint(values * (np.float32(1) / scale)) + zero_point, -128, 127) - zero_point
    filters = layer.weight.detach().float().flatten(1).numpy()
    largest = np.abs(filters).max(1 if layer.per_channel else None, keepdims=True)
    weight_scale = largest / np.float32(127)
    weights = np.clip(np.rint(filters / weight_scale), -127, 127)

    plain = nn.Conv2d if isinstance(layer, nn.Conv2d) else nn.Linear
    twin = copy.deepcopy(layer).train().double()
    twin.weight.data = torch.from_numpy(weights).double().view_as(layer.weight)
    twin.bias = None
    sums = plain.forward(twin, torch.from_numpy(codes).double())
    assert torch.equal(sums, sums.round())
    scales = torch.from_numpy(weight_scale.reshape(-1) * scale).expand(len(filters))
    per_output = (-1, 1, 1) if plain is nn.Conv2d else (-1,)
    output = sums.detach().float() * scales.view(per_output)
    if layer.bias is not None:
        output = output + layer.bias.detach().float().view(per_output)
    return output.to(x.dtype)


# ---------------------------------------------------------------------------------------------
# values


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_conv_is_exact(geometry, isa, family):
    layer, x = family.conv(**GEOMETRIES[geometry]), 2 * images()
    expected = _expected(layer, x)
    assert torch.equal(layer(x), expected)
    assert torch.equal(evaluate(layer, x), expected)
    assert torch.equal(evaluate(layer.freeze(), x), expected)


@pytest.mark.parametrize("shape", [(3, 70), (70,), (2, 3, 4, 70), (0, 70)])
def test_linear_is_exact(shape, isa, family):
    layer, x = family.linear(70, 5), 2 * images(*shape)
    expected = _expected(layer, x)
    assert torch.equal(layer(x), expected)
    assert torch.equal(evaluate(layer, x), expected)
    assert torch.equal(evaluate(layer.freeze(), x), expected)


@pytest.mark.parametrize("features", [1, 2, 3, 5, 31, 32, 33, 63, 64, 65, 4999])
def test_any_width_is_exact(features, isa, family):
    x = images(3, features)
    for layer, inputs in [
        (family.linear(features, 7), x),
        (family.conv(features, 7, kernel_size=1), x[:, :, None, None]),
    ]:
        expected = _expected(layer, inputs)
        torch.testing.assert_close(layer(inputs), expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(evaluate(layer, inputs), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_output_has_the_dtype_of_the_input(dtype, family):
    for layer, x in [
        (family.conv(padding=1), images(dtype=dtype)),
        (family.linear(70, 5), images(3, 70, dtype=dtype)),
    ]:
        expected = _expected(layer, x)
        assert expected.dtype == dtype
        assert torch.equal(layer(x), expected)
        assert torch.equal(evaluate(layer, x), expected)
        layer.train().to(dtype)
        assert torch.equal(layer(x), evaluate(layer, x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_of_the_layer_leave_what_the_kernel_reads(dtype, family):
    layer, x = family.conv(bias=False), images()
    expected = evaluate(layer.freeze(), x)
    assert torch.equal(evaluate(layer.to(dtype), x), expected)
    layer = family.conv().to(dtype)
    assert layer.weight.dtype == dtype and layer.input_range.dtype == torch.float32
    assert torch.equal(layer(x), evaluate(layer, x))


def test_error_is_that_of_rounding(family):
    """Half a step of the input a weight, half a step of the weight an input, within the range."""
    layer = family.linear(50, 20)
    x = images(10, 50).clamp(LOW, HIGH)
    weight = layer.weight.detach()
    step, _ = _parameters(layer)
    axis = 1 if layer.per_channel else (0, 1)
    weight_step = weight.abs().amax(axis, keepdim=True) / 127
    reach = 0.5 * step * weight.abs().sum(1) + 0.5 * weight_step.T * (
        x.abs().sum(1, keepdim=True) + 25 * step
    )
    error = (evaluate(layer, x) - F.linear(x, weight, layer.bias)).abs().detach()
    assert (error <= reach + 1e-5).all() and error.max() > 0


def test_clipping_saturates_and_nan_counts_as_zero(family):
    layer = family.linear(1, 1, bias=False)
    layer.weight.data.fill_(1.0)
    step, zero_point = _parameters(layer)
    x = torch.tensor([[math.inf], [-math.inf], [1e30], [-1e30], [math.nan]])
    steps = [127 - zero_point, -128 - zero_point] * 2 + [0]
    expected = torch.tensor(steps).float() * (torch.tensor(step) * (torch.tensor(1.0) / 127)) * 127
    torch.testing.assert_close(evaluate(layer, x)[:, 0], expected, rtol=1e-6, atol=0)
    assert layer.train()(x)[-1].isnan(), "training sees it"


def test_zero_and_constant_filters(family):
    layer, x = family.linear(20, 3), images(4, 20)
    layer.weight.data[0] = 0.0
    layer.weight.data[1] = -0.25
    layer.weight.data[2] = 0.25
    outputs = evaluate(layer, x)
    assert torch.equal(outputs[:, 0], layer.bias[0].expand(4))
    sums = (outputs - layer.bias)[:, 1:].detach()
    torch.testing.assert_close(sums[:, 0], -sums[:, 1])
    assert torch.equal(layer.train()(x), outputs)
    nn.init.zeros_(layer.weight)
    assert torch.equal(evaluate(layer, x), layer.bias.expand(4, 3))


# ---------------------------------------------------------------------------------------------
# gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_those_of_the_formula(dtype, family):
    """Those of the rounded values, passed on as they are, or not at all where clipped."""
    layer, x = family.conv(padding=1, groups=3).to(dtype), 3 * images(dtype=dtype)
    x.requires_grad_()
    out_gradient = images(2, 9, 9, 8, dtype=dtype)
    layer(x).backward(out_gradient)

    step, zero_point = (float(value) for value in _parameters(layer))
    steps = (x.detach().double() / step).round() + zero_point
    rounded = ((steps.clamp(-128, 127) - zero_point) * step).requires_grad_()
    weight = layer.weight.detach().double()
    weight_step = weight.abs().amax((1, 2, 3) if layer.per_channel else None, keepdim=True) / 127
    rounded_weight = ((weight / weight_step).round() * weight_step).requires_grad_()
    bias = layer.bias.detach().double().requires_grad_()
    F.conv2d(rounded, rounded_weight, bias, padding=1, groups=3).backward(out_gradient.double())

    inside = (steps >= -128) & (steps <= 127)
    assert 0 < inside.double().mean() < 1
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(x.grad.double(), rounded.grad * inside, **close)
    torch.testing.assert_close(layer.weight.grad.double(), rounded_weight.grad, **close)
    torch.testing.assert_close(layer.bias.grad.double(), bias.grad, **close)


@pytest.mark.filterwarnings("ignore:an nncx layer in eval mode was called with gradients")
def test_gradients_in_eval_are_those_of_training(family):
    layer, x = family.linear(20, 3), images(4, 20)
    layer(x).square().sum().backward()
    expected = layer.weight.grad.clone()
    layer.zero_grad()
    layer.eval()(x).square().sum().backward()
    assert torch.equal(layer.weight.grad, expected)


def test_training_lowers_a_loss():
    layer = Int8Linear(10, 3)
    x, target = images(64, 10), images(64, 3)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    losses = []
    for _ in range(50):
        optimizer.zero_grad()
        loss = F.mse_loss(layer(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    plain = nn.Linear(10, 3)
    plain.load_state_dict({k: v for k, v in layer.state_dict().items() if k != "input_range"})
    assert losses[-1] < 0.9 * losses[0]
    assert abs(losses[-1] - F.mse_loss(plain(x), target).item()) < 0.01


class _FakeQuantized(nn.Conv2d):
    """Int8Conv2d by torch's own operators of quantization-aware training, in [-8, 8)."""

    def forward(self, x):
        x = torch.fake_quantize_per_tensor_affine(x, 16 / 255, 0, -128, 127)
        scale = self.weight.detach().abs().amax((1, 2, 3)) / 127
        zero_points = torch.zeros(len(scale), dtype=torch.int32)
        weight = torch.fake_quantize_per_channel_affine(
            self.weight, scale, zero_points, 0, -127, 127
        )
        return self._conv_forward(x, weight, self.bias)


def test_a_mobile_network_trains_to_the_loss_of_torchs_quantization_and_of_float():
    def losses(conv):
        torch.manual_seed(0)
        layers = [conv(8, 16, 3, 2, 1, groups=8), conv(16, 16, 1), conv(16, 16, 3, groups=4)]
        for layer in layers:
            if isinstance(layer, Int8Conv2d):
                layer.set_input_range(-8 - 8 / 255, 8 - 8 / 255)
                layer.observe = False
        between = [m for layer in layers for m in (layer, nn.BatchNorm2d(16), nn.ReLU6())]
        model = nn.Sequential(nn.Conv2d(3, 8, 3), *between, nn.Flatten(), nn.Linear(256, 4))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        x, y = torch.randn(16, 3, 14, 14), torch.randint(4, (16,))
        found = []
        for _ in range(10):
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    ours, theirs, in_float = losses(Int8Conv2d), losses(_FakeQuantized), losses(nn.Conv2d)
    assert in_float[-1] < 0.3 * in_float[0]
    assert ours == pytest.approx(theirs, rel=0.02, abs=0.002)
    assert ours == pytest.approx(in_float, rel=0.1, abs=0.05)


# ---------------------------------------------------------------------------------------------
# the range of the input


def test_training_follows_the_range_by_a_moving_average():
    layer = Int8Linear(4, 2)
    assert layer.input_range.tolist() == [math.inf, -math.inf]
    low, high = -1.0, 3.0
    layer(torch.tensor([[low, 0.0, 1.0, high]]))
    assert layer.input_range.tolist() == [low, high]
    for batch in [(-5.0, 1.0), (0.5, 9.0)]:
        layer(torch.tensor([[batch[0], 0.75, 0.75, batch[1]]]))
        low, high = low + 0.01 * (batch[0] - low), high + 0.01 * (batch[1] - high)
        torch.testing.assert_close(layer.input_range, torch.tensor([low, high]))
    before = layer.input_range.clone()
    evaluate(layer, 100 * images(3, 4))
    layer.train().observe = False
    layer(100 * images(3, 4))
    assert torch.equal(layer.input_range, before)


def test_the_batch_that_sets_the_range_is_computed_with_it():
    layer, x = Int8Conv2d(6, 9, 3), 10 * images()
    trained = layer(x)
    assert torch.equal(trained, evaluate(layer, x))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_batch_that_is_not_finite_leaves_the_range(value):
    layer = Int8Linear(4, 2)
    layer(torch.full((1, 4), value))
    assert layer.input_range.tolist() == [math.inf, -math.inf]
    layer.set_input_range(-1, 1)
    layer(torch.tensor([[0.0, value, 9.0, -9.0]]))
    assert layer.input_range.tolist() == [-1, 1]


def test_an_empty_batch_leaves_the_range():
    layer = Int8Linear(4, 2)
    layer(torch.empty(0, 4))
    assert layer.input_range.tolist() == [math.inf, -math.inf]


def test_gradients_do_not_reach_the_range():
    layer = Int8Conv2d(6, 9, 3)
    layer(images().requires_grad_()).sum().backward()
    assert not layer.input_range.requires_grad


def test_setting_the_range_in_eval_takes_effect():
    layer, x = Int8Linear(70, 5).eval(), images(3, 70)
    layer.set_input_range(-100, 100)
    coarse = evaluate(layer, x)
    layer.set_input_range(LOW, HIGH)
    assert torch.equal(evaluate(layer, x), _expected(layer, x))
    assert not torch.equal(evaluate(layer, x), coarse)


@pytest.mark.parametrize("bounds", [(1.0, 4.0), (-4.0, -1.0), (0.0, 0.0), (1e-42, 1e-41)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_range_contains_zero(symmetric, bounds):
    layer = Int8Linear(1, 1, bias=False, symmetric=symmetric)
    layer.weight.data.fill_(1.0)
    layer.set_input_range(*bounds)
    x = torch.tensor([[0.0], *[[bound] for bound in bounds]])
    outputs = evaluate(layer, x)
    assert outputs[0] == 0
    step = float(max(abs(bound) for bound in bounds)) / (127 if symmetric else 255)
    torch.testing.assert_close(outputs, x, rtol=0, atol=max(step, 1e-30))


def test_a_range_stopped_in_one_copy_goes_on_in_the_other():
    layer = Int8Linear(4, 2)
    layer(images(3, 4))
    other = copy.deepcopy(layer)
    other(100 * images(3, 4))
    assert not torch.equal(other.input_range, layer.input_range)


def test_the_state_of_a_float_layer_leaves_the_range(family):
    plain, layer = nn.Conv2d(6, 9, 3), family.conv()
    layer.load_state_dict(plain.state_dict())
    assert layer.input_range.tolist() == [LOW, HIGH]
    assert torch.equal(layer.weight, plain.weight)
    other = type(layer)(6, 9, 3, **family.arguments)
    other.load_state_dict(layer.state_dict())
    x = images()
    assert torch.equal(evaluate(other, x), evaluate(layer, x))


def test_training_under_compile_follows_the_range():
    torch.compiler.reset()
    layer, x = Int8Conv2d(6, 9, 3), images()
    eager = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for batch in (x, 3 * x):
        torch.testing.assert_close(compiled(batch), eager(batch))
        torch.testing.assert_close(layer.input_range, eager.input_range)


# ---------------------------------------------------------------------------------------------
# what is refused

UNKNOWN = r"must know the range of its input, got none yet; call set_input_range\(minimum, maximum"


@pytest.mark.filterwarnings("ignore:an nncx layer in eval mode was called with gradients")
@pytest.mark.parametrize(
    "layer, x", [(Int8Conv2d(6, 9, 3), images()), (Int8Linear(8, 2), images())]
)
def test_an_unknown_range_is_refused(layer, x):
    layer = copy.deepcopy(layer)
    name = type(layer).__name__
    with torch.no_grad(), pytest.raises(RuntimeError, match=f"{name} {UNKNOWN}"):
        layer.eval()(x)
    with pytest.raises(RuntimeError, match=f"{name} {UNKNOWN}"):
        layer(x)
    layer.train().observe = False
    with pytest.raises(RuntimeError, match=f"{name} {UNKNOWN}"):
        layer(x)
    with pytest.raises(ValueError, match=f"freeze: the {name} {UNKNOWN}"):
        layer.freeze()
    assert not layer.frozen


def test_freezing_a_model_with_an_unknown_range_changes_nothing(family):
    model = nn.Sequential(family.linear(4, 4), Int8Linear(4, 2)).train()
    with pytest.raises(ValueError, match=f"freeze: '1' {UNKNOWN}"):
        freeze(model)
    assert not model[0].frozen and model.training


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_weight_that_is_not_finite_is_refused(value, family):
    layer, x = family.linear(4, 2), images(3, 4)
    layer.weight.data[1, 2] = value
    assert not layer(x).isfinite().all(), "training sees it"
    message = "must have a finite weight, got NaN or infinity; train it anew"
    with torch.no_grad(), pytest.raises(RuntimeError, match=f"Int8Linear {message}"):
        layer.eval()(x)
    with pytest.raises(ValueError, match=f"freeze: '0' {message}"):
        freeze(nn.Sequential(layer))


@pytest.mark.parametrize(
    "minimum, maximum", [(math.nan, 1), (0, math.inf), (-math.inf, 0), (1, 0), (0, math.nan)]
)
def test_ranges_that_cannot_be_are_refused(minimum, maximum, family):
    layer = family.linear(4, 2)
    with pytest.raises(ValueError, match="must be finite and in order, got"):
        layer.set_input_range(minimum, maximum)
    assert layer.input_range.tolist() == [LOW, HIGH]


def test_a_frozen_layer_has_its_range(family):
    with pytest.raises(RuntimeError, match="Linear: the input range must be set before freezing"):
        family.linear(4, 2).freeze().set_input_range(-1, 1)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("name", ["input_scale", "weight_scale"])
def test_scales_that_cannot_be_are_refused(name, value, family):
    layer = family.linear(4, 2).freeze()
    layer.load_state_dict(layer.state_dict() | {name: torch.full_like(getattr(layer, name), value)})
    with pytest.raises(RuntimeError, match="Int8Linear must have scales that are positive and fin"):
        layer(images(3, 4))


def test_sums_that_int32_may_not_hold_are_refused():
    Int8Linear(MOST_TERMS, 1, device="meta")
    with pytest.raises(ValueError, match=f"Int8Linear: .* at most {MOST_TERMS} products"):
        Int8Linear(MOST_TERMS + 1, 1, device="meta")
    Int8Conv2d(2 * 7310, 2, 3, groups=2, device="meta")
    with pytest.raises(ValueError, match=r"Int8Conv2d: .* got 65799; keep this layer float"):
        Int8Conv2d(2 * 7311, 2, 3, groups=2, device="meta")


def test_the_longest_sum_is_exact(isa):
    layer = Int8Linear(MOST_TERMS, 1, bias=False)
    layer.weight.data.fill_(127.0)
    layer.set_input_range(-255, 0)
    x = torch.full((2, MOST_TERMS), -255.0)
    x[1, 0] = -254.0
    sums = torch.tensor([[-255 * 127 * MOST_TERMS], [-255 * 127 * MOST_TERMS + 127]])
    assert torch.equal(evaluate(layer, x), sums.float())
