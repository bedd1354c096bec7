"""XNOR layers: their arithmetic, equal in bits in training and evaluation."""

import copy
import inspect
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from layer_families import FAMILIES, evaluate, images, signs
from layer_families import GEOMETRIES as SHARED_GEOMETRIES
from properties import many_examples
from torch import nn

import nncx
from nncx.nn import XNORConv2d, XNORLinear, xnor
from nncx.nn.xnor import SCALES

GEOMETRIES = SHARED_GEOMETRIES | {
    "pad -1": {"padding": 1, "pad_value": -1},
    "pad +1, same": {"kernel_size": 2, "padding": "same", "pad_value": 1},
}

_conv = FAMILIES["XNOR"].conv


def _torch_layer(layer, weight):
    """torch's layer of the same geometry without bias, in float64."""
    names = inspect.signature(nn.Conv2d).parameters.keys() - {"bias", "device", "dtype"}
    arguments = {name: getattr(layer, name) for name in names}
    plain = nn.Conv2d(**arguments, bias=False, dtype=torch.float64)
    plain.weight.data = weight.double()
    return plain


def _expected_conv(layer, x, weight, bias):
    """The definition in float64, by torch's own layer (pad_value 0 only)."""
    dots = _torch_layer(layer, signs(weight))(signs(x).double())
    alpha = weight.double().abs().mean((1, 2, 3)).view(-1, 1, 1)
    output = dots if layer.scale == "none" else dots * alpha
    if layer.scale == "alpha_k":
        box = torch.full_like(weight, 1 / weight[0].numel())
        output = output * _torch_layer(layer, box)(x.double().abs())
    return output if bias is None else output + bias.double().view(-1, 1, 1)


# ---------------------------------------------------------------------------------------------
# drop-in


def test_repr_shows_what_is_not_default():
    layer = _conv(scale="alpha_k", pad_value=-1).freeze()
    assert repr(layer).endswith("scale=alpha_k, frozen=True, pad_value=-1)")


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: XNORConv2d(3, 4, 3, scale="beta"), "one of none, alpha, alpha_k, got 'beta'"),
        (lambda: XNORLinear(3, 4, scale=None), "one of none, alpha, alpha_k, got None"),
        (lambda: XNORConv2d(3, 4, 3, pad_value=2), "pad_value must be -1, 0 or 1, got 2"),
        (
            lambda: XNORConv2d(3, 4, 3, padding=1, padding_mode="reflect", pad_value=1),
            "pad_value=1 needs padding_mode='zeros', got 'reflect'",
        ),
    ],
)
def test_constructor_refuses(build, message):
    with pytest.raises(ValueError, match=message):
        build()


# ---------------------------------------------------------------------------------------------
# values


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_conv_trains_andevaluates_to_the_same_bits(geometry, scale, isa):
    layer = _conv(**GEOMETRIES[geometry], scale=scale)
    x = images()
    trained = layer.train()(x).detach()
    evaluated = evaluate(layer, x)
    assert torch.equal(trained, evaluated)
    if not layer.pad_value:
        expected = _expected_conv(layer, x, layer.weight.detach(), layer.bias)
        torch.testing.assert_close(evaluated.double(), expected, rtol=1e-5, atol=1e-5)
    frozen = evaluate(layer.freeze(), x)
    assert torch.equal(frozen, evaluated)


_pairs = st.integers(1, 3) | st.tuples(st.integers(1, 4), st.integers(1, 3))


@many_examples
@given(
    channels=st.tuples(st.integers(1, 40), st.integers(1, 12)),
    groups=st.integers(1, 3),
    kernel_size=_pairs,
    stride=_pairs,
    padding=st.sampled_from(["same", "valid"]) | st.integers(0, 3),
    dilation=_pairs,
    bias=st.booleans(),
    padding_mode=st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
    scale=st.sampled_from(SCALES),
    pad_value=st.sampled_from([0, 0, -1, 1]),
    batch=st.integers(0, 3),
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    channels_last=st.booleans(),
)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_any_arguments(
    isa, channels, groups, kernel_size, stride, padding, dilation, bias, padding_mode, dtype,
    scale, pad_value, batch, size, channels_last,
) -> None:  # fmt: skip
    """What torch's layer takes: trained, evaluated and frozen alike, and as torch computes it."""
    arguments = dict(kernel_size=kernel_size, stride=1 if padding == "same" else stride)
    arguments |= dict(padding=padding, dilation=dilation, groups=groups, bias=bias)
    pad_value = pad_value if padding_mode == "zeros" else 0
    widths = [count * groups for count in channels]
    layer = _conv(*widths, **arguments, padding_mode=padding_mode, scale=scale, pad_value=pad_value)
    x = images(batch, widths[0], *size, dtype=dtype)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    try:
        shape = nn.Conv2d(*widths, **arguments, padding_mode=padding_mode)(x.float()).shape
    except RuntimeError:  # torch's layer refuses it too: the image is smaller than the kernel
        assume(False)
    trained = layer.train()(x).detach()
    evaluated = evaluate(layer, x)
    assert evaluated.shape == shape and evaluated.dtype == dtype
    assert torch.equal(trained, evaluated)
    if not pad_value:
        expected = _expected_conv(layer, x.float(), layer.weight.detach(), layer.bias)
        tolerance = 0.02 if dtype in (torch.float16, torch.bfloat16) else 1e-5
        torch.testing.assert_close(
            evaluated.double(), expected.double(), rtol=tolerance, atol=tolerance
        )
    assert torch.equal(evaluate(layer.freeze(), x), evaluated)


@pytest.mark.parametrize("pad_value", [-1, 1])
def test_pad_value_is_the_sign_of_the_border(pad_value):
    layer = _conv(padding=(1, 2), pad_value=pad_value)
    inner = _conv(padding=0)
    inner.load_state_dict(layer.state_dict())
    x = images()
    bordered = F.pad(x, (2, 2, 1, 1), value=pad_value)
    assert torch.equal(evaluate(layer, x), evaluate(inner, bordered))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("shape", [(3, 70), (70,), (2, 3, 4, 70), (0, 70)])
def test_linear_trains_andevaluates_to_the_same_bits(shape, scale, isa):
    torch.manual_seed(0)
    layer = XNORLinear(70, 5, scale=scale)
    x = images(*shape)
    trained = layer(x).detach()
    evaluated = evaluate(layer, x)
    assert torch.equal(trained, evaluated)

    weight = layer.weight.detach().double()
    expected = F.linear(signs(x).double(), signs(weight).double())
    if scale != "none":
        expected = expected * weight.abs().mean(1)
    if scale == "alpha_k":
        expected = expected * x.double().abs().mean(-1, keepdim=True)
    expected = expected + layer.bias.detach().double()
    torch.testing.assert_close(evaluated.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(evaluate(layer.freeze(), x), evaluated)


@pytest.mark.parametrize("features", [1, 63, 64, 65, 4999])
def test_widths_around_the_word(features):
    torch.manual_seed(0)
    linear, conv = XNORLinear(features, 3), XNORConv2d(features, 3, 1)
    x = images(2, features)
    for layer, inputs in [(linear, x), (conv, x[:, :, None, None])]:
        assert torch.equal(layer.train()(inputs).detach(), evaluate(layer, inputs))


@pytest.mark.parametrize("scale", SCALES)
def test_gradients_are_the_published_ones(scale):
    """By torch's autograd on W~ = alpha * sign(W), then the formula of XNOR-Net."""
    layer = _conv(padding=1, groups=3, scale=scale).double()
    layer.weight.data = torch.randn_like(layer.weight)  # on both sides of 1
    x = (images(dtype=torch.float64) * 2).requires_grad_()
    weights_of_loss = images(2, 9, 9, 8, dtype=torch.float64)
    (layer(x) * weights_of_loss).sum().backward()

    binary_input = signs(x.detach()).requires_grad_()
    magnitude = x.detach().abs().requires_grad_()
    weight = layer.weight.detach()
    alpha = weight.abs().mean((1, 2, 3), keepdim=True) if scale != "none" else 1.0
    binary = (alpha * signs(weight)).requires_grad_()
    output = F.conv2d(binary_input, binary, padding=1, groups=3)
    if scale == "alpha_k":
        box = torch.full_like(weight, 1 / weight[0].numel())
        output = output * F.conv2d(magnitude, box, padding=1, groups=3)
    (output * weights_of_loss).sum().backward()

    inside = (weight.abs() < 1).double()
    one_over_n = 1 / weight[0].numel() if scale != "none" else 0.0
    expected = binary.grad * (one_over_n + alpha * inside)
    torch.testing.assert_close(layer.weight.grad, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        layer.bias.grad, weights_of_loss.sum((0, 2, 3)), rtol=1e-4, atol=1e-5
    )
    expected = binary_input.grad * (x.detach().abs() < 1)
    if scale == "alpha_k":
        expected = expected + magnitude.grad * x.detach().sign()
    torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------
# few channels a group: bytes in the place of bits

# Channels, filters, groups and what else is not torch's default.
GROUPED = {
    "depthwise": (17, 17, 17, {"padding": 1}),
    "depthwise, multiplier 2": (
        33,
        66,
        33,
        {"kernel_size": (5, 2), "stride": (1, 2), "padding": 2},
    ),
    "depthwise, fewer filters than lanes": (2, 6, 2, {"dilation": (2, 3), "padding": (3, 0)}),
    "3 channels a group": (21, 14, 7, {"stride": 2, "padding": 1, "dilation": 2}),
    "4 channels a group": (20, 20, 5, {"padding": "same"}),
    "16 channels, one filter a group": (48, 3, 3, {"padding": 1, "padding_mode": "reflect"}),
    "17 channels a group": (51, 6, 3, {"padding": 1}),
}


def _grouped(name: str, **arguments) -> XNORConv2d:
    in_channels, out_channels, groups, others = GROUPED[name]
    return _conv(in_channels, out_channels, groups=groups, **others | arguments)


@pytest.mark.parametrize("name", GROUPED)
def test_few_channels_a_group(name, isa, monkeypatch):
    """In bits or in bytes, trained, evaluated or frozen: the bits of the definition."""
    for scale, pad_value, channels_last in [
        ("none", 0, True), ("alpha", 0, False), ("alpha", -1, True), ("alpha_k", 0, True),
        ("alpha_k", 1, False),
    ]:  # fmt: skip
        layer = _grouped(name, scale=scale)
        layer.pad_value = pad_value = 0 if layer.padding_mode != "zeros" else pad_value
        x = images(2, layer.in_channels, 11, 13)
        special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan])
        x[0, :, 3, :5] = special if scale != "alpha_k" else special[:2].repeat(3)[:5]
        if channels_last:
            x = x.to(memory_format=torch.channels_last)
        evaluated = evaluate(layer, x)
        assert torch.equal(layer.train()(x).detach(), evaluated)
        if not pad_value:
            expected = _expected_conv(layer, x, layer.weight.detach(), layer.bias)
            torch.testing.assert_close(evaluated.double(), expected, rtol=1e-5, atol=1e-5)
            assert scale != "none" or torch.equal(evaluated, expected.float())
        with monkeypatch.context() as patch:
            patch.setattr(xnor, "_MOST_CHANNELS_IN_BYTES", 0)
            assert torch.equal(evaluate(layer, x), evaluated)
        assert torch.equal(evaluate(layer.freeze(), x), evaluated)


@pytest.mark.parametrize("name, in_bytes", [("3 channels a group", True), ("depthwise", True),
                                            ("17 channels a group", False)])  # fmt: skip
def test_which_layers_run_in_bytes(name, in_bytes):
    layer = _grouped(name)
    assert layer._runs_in_bytes(layer.weight.device) == in_bytes
    assert not layer._runs_in_bytes(torch.device("cuda"))
    packed = layer.freeze().state_dict()["packed_weight"]
    assert packed.numel() == -(-layer.out_channels * layer.in_channels // layer.groups * 9 // 8)


def test_filters_longer_than_an_int8_sum_run_in_bits():
    layer = _conv(2, 2, groups=2, kernel_size=(1, 65_794), scale="none", bias=False)
    x = images(1, 2, 1, 65_794)
    assert not layer._runs_in_bytes(x.device)
    assert torch.equal(layer(x).detach(), evaluate(layer, x))


def test_a_depthwise_layer_lives_as_others_do(tmp_path):
    """Frozen, saved, loaded, copied, pickled, compiled and exported, for any batch."""
    model = nn.Sequential(_grouped("depthwise", scale="alpha_k"), _conv(17, 34, groups=17))
    x = images(2, 17, 9, 8)
    expected = evaluate(model, x)
    nncx.save(nncx.freeze(model), tmp_path / "model.safetensors")
    models = [nncx.load(tmp_path / "model.safetensors"), copy.deepcopy(model)]
    models += [pickle.loads(pickle.dumps(model))]
    models += [torch.compile(model, fullgraph=True, backend="aot_eager")]
    dynamic = ({0: torch.export.Dim("batch")},)
    models += [torch.export.export(model, (x,), dynamic_shapes=dynamic, strict=False).module()]
    for other in models:
        with torch.no_grad():
            assert torch.equal(other(x), expected)
            assert torch.equal(other(x[:1].repeat(3, 1, 1, 1))[2], expected[0])


class _Reference(nn.Conv2d):
    """XNOR-Net's layer as torch's autograd has it: values and gradients, less an epsilon."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight.detach()
        alpha = weight.abs().mean((1, 2, 3), keepdim=True)
        gradient = self.weight * (1 / weight[0].numel() + alpha * (weight.abs() < 1)) / alpha
        binary_weight = signs(weight) + (gradient - gradient.detach())
        clipped = x.clamp(-1, 1)
        binary = signs(x.detach()) + (clipped - clipped.detach())
        return self._conv_forward(binary, binary_weight, None) * alpha.view(-1, 1, 1)


def test_a_mobile_network_trains_to_the_loss_of_its_definition():
    def losses(conv: type[nn.Conv2d]) -> list[float]:
        torch.manual_seed(0)
        depthwise = conv(12, 24, 3, 2, 1, groups=12, bias=False)
        grouped = conv(24, 24, 3, padding=1, groups=6, bias=False)
        model = nn.Sequential(
            *(nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), depthwise),
            *(nn.BatchNorm2d(24), conv(24, 24, 1, bias=False), nn.BatchNorm2d(24), grouped),
            *(nn.BatchNorm2d(24), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(96, 4)),
        )
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        x, y = torch.randn(24, 3, 12, 12), torch.randint(4, (24,))
        found = []
        for _ in range(15):
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    ours, theirs = losses(XNORConv2d), losses(_Reference)
    assert theirs[-1] < 0.7 * theirs[0]
    assert ours == pytest.approx(theirs, rel=1e-3)


# ---------------------------------------------------------------------------------------------
# dtypes, shapes, memory formats


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("scale", SCALES)
def test_output_has_the_dtype_of_the_input(scale, dtype):
    layer = _conv(padding=1, scale=scale).to(dtype)
    x = images(dtype=dtype)
    trained = layer(x).detach()
    assert trained.dtype == dtype
    assert torch.equal(trained, evaluate(layer, x))
    assert torch.equal(trained, evaluate(layer.freeze(), x))


@pytest.mark.parametrize("move", [lambda m: m.half(), lambda m: m.to(torch.bfloat16)])
def test_a_frozen_layer_keeps_alpha_in_float32(move):
    layer = _conv().freeze()
    layer.bias.data.zero_()
    before = evaluate(layer, images())
    move(layer)
    assert layer.alpha.dtype == torch.float32
    assert layer.bias.dtype != torch.float32
    assert torch.equal(evaluate(layer, images()), before)


def test_autocast_keeps_dot_products_exact():
    """4999 signs sum to odd numbers far above 2048, which half precision would round."""
    torch.manual_seed(0)
    layer = XNORLinear(4999, 3, scale="none", bias=False)
    with torch.no_grad():
        layer.weight.abs_()
    x = torch.ones(2, 4999)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            assert layer.train()(x).eq(4999).all()
            assert evaluate(layer, x).eq(4999).all()
            conv = XNORConv2d(4999, 3, 1, scale="none", bias=False)
            conv.weight.data.abs_()
            assert conv(x[:, :, None, None]).eq(4999).all()


# ---------------------------------------------------------------------------------------------
# freezing


@pytest.mark.parametrize("scale", SCALES)
def test_frozen_state_dict_is_packed(scale):
    layer = _conv(scale=scale)
    positive = (layer.weight >= 0).flatten().tolist()
    state = layer.freeze().state_dict()
    assert set(state) == {"packed_weight", "bias"} | ({"alpha"} if scale != "none" else set())
    assert state["packed_weight"].dtype == torch.uint8
    assert state["packed_weight"].shape == (-(-9 * 6 * 9 // 8),)
    bits = [byte >> i & 1 for byte in state["packed_weight"].tolist() for i in range(8)]
    assert bits[: len(positive)] == positive
    if scale != "none":
        assert state["alpha"].dtype == torch.float32 and state["alpha"].shape == (9,)
    assert "_prepacked" not in state and layer.weight is None and layer.precision == "binary"
    assert layer.freeze() is layer
