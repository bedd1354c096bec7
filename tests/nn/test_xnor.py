"""XNOR layers: drop-in for torch's, equal in training and evaluation, and alive through moves."""

import copy
import inspect
import io
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from properties import many_examples
from torch import nn

from nncx import _C
from nncx.compress import freeze, repack
from nncx.nn import XNORConv2d, XNORLinear, packed
from nncx.nn.xnor import SCALES

GEOMETRIES = {
    "plain": {},
    "stride": {"stride": 2, "padding": 1},
    "mixed": {"kernel_size": (3, 2), "stride": (1, 2), "padding": (2, 1), "dilation": (2, 1)},
    "groups": {"groups": 3, "padding": 1},
    "pointwise": {"kernel_size": 1, "bias": False},
    "same": {"padding": "same"},
    "same, even kernel": {"kernel_size": (4, 3), "padding": "same", "dilation": (1, 2)},
    "valid": {"padding": "valid"},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "replicate": {"padding": (1, 2), "padding_mode": "replicate"},
    "circular, same": {"kernel_size": 2, "padding": "same", "padding_mode": "circular"},
    "pad -1": {"padding": 1, "pad_value": -1},
    "pad +1, same": {"kernel_size": 2, "padding": "same", "pad_value": 1},
}


def _conv(in_channels=6, out_channels=9, **arguments):
    torch.manual_seed(0)
    return XNORConv2d(in_channels, out_channels, **{"kernel_size": 3} | arguments)


def _images(*shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*shape or (2, 6, 9, 8), generator=generator).to(dtype)


def _signs(x):
    return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)


def _evaluate(layer, x):
    with torch.no_grad():
        return layer.eval()(x)


def _torch_layer(layer, weight):
    """torch's layer of the same geometry without bias, in float64."""
    names = inspect.signature(nn.Conv2d).parameters.keys() - {"bias", "device", "dtype"}
    arguments = {name: getattr(layer, name) for name in names}
    plain = nn.Conv2d(**arguments, bias=False, dtype=torch.float64)
    plain.weight.data = weight.double()
    return plain


def _expected_conv(layer, x, weight, bias):
    """The definition in float64, by torch's own layer (pad_value 0 only)."""
    dots = _torch_layer(layer, _signs(weight))(_signs(x).double())
    alpha = weight.double().abs().mean((1, 2, 3)).view(-1, 1, 1)
    output = dots if layer.scale == "none" else dots * alpha
    if layer.scale == "alpha_k":
        box = torch.full_like(weight, 1 / weight[0].numel())
        output = output * _torch_layer(layer, box)(x.double().abs())
    return output if bias is None else output + bias.double().view(-1, 1, 1)


# ---------------------------------------------------------------------------------------------
# drop-in


@pytest.mark.parametrize("ours, theirs", [(XNORConv2d, nn.Conv2d), (XNORLinear, nn.Linear)])
def test_signature_is_torchs_plus_keyword_only_extras(ours, theirs):
    def described(cls, kinds):
        parameters = inspect.signature(cls).parameters.values()
        return [(p.name, p.default) for p in parameters if p.kind in kinds]

    positional = [inspect.Parameter.POSITIONAL_OR_KEYWORD]
    assert described(ours, positional) == described(theirs, positional)
    extras = described(ours, [inspect.Parameter.KEYWORD_ONLY])
    assert ("scale", "alpha") in extras


@pytest.mark.parametrize(
    "ours, theirs",
    [
        (XNORConv2d(4, 6, 3, 2, 1, groups=2), nn.Conv2d(4, 6, 3, 2, 1, groups=2)),
        (XNORConv2d(4, 6, (3, 5), bias=False), nn.Conv2d(4, 6, (3, 5), bias=False)),
        (XNORLinear(5, 7), nn.Linear(5, 7)),
    ],
)
def test_checkpoints_and_repr_are_torchs(ours, theirs):
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours.weight, theirs.weight)
    assert repr(ours) == f"XNOR{repr(theirs)[:-1]}, scale=alpha)"


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


@pytest.mark.parametrize("training", [True, False])
def test_forward_refuses_other_shapes(training):
    conv, linear = _conv().train(training), XNORLinear(60, 4).train(training)
    for shape in [(2, 5, 8, 8), (6, 8), (1, 2, 6, 8, 8)]:
        with pytest.raises(RuntimeError, match="XNORConv2d: input must be"):
            conv(torch.zeros(shape))
    for shape in [(3, 64), (60, 3), ()]:
        with pytest.raises(RuntimeError, match=r"XNORLinear: input must be \[..., 60\]"):
            linear(torch.zeros(shape))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
def test_forward_refuses_integers(dtype, training):
    for layer, shape in [(_conv(), (2, 6, 9, 8)), (XNORLinear(60, 4), (2, 60))]:
        layer.train(training)
        message = f"{type(layer).__name__}: input must be floating, got {dtype}; convert it"
        with torch.no_grad(), pytest.raises(RuntimeError, match=message):
            layer(torch.ones(shape, dtype=dtype))


# ---------------------------------------------------------------------------------------------
# values


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_conv_trains_and_evaluates_to_the_same_bits(geometry, scale, isa):
    layer = _conv(**GEOMETRIES[geometry], scale=scale)
    x = _images()
    trained = layer.train()(x).detach()
    evaluated = _evaluate(layer, x)
    assert torch.equal(trained, evaluated)
    if not layer.pad_value:
        expected = _expected_conv(layer, x, layer.weight.detach(), layer.bias)
        torch.testing.assert_close(evaluated.double(), expected, rtol=1e-5, atol=1e-5)
    frozen = _evaluate(layer.freeze(), x)
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
    x = _images(batch, widths[0], *size, dtype=dtype)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    try:
        shape = nn.Conv2d(*widths, **arguments, padding_mode=padding_mode)(x.float()).shape
    except RuntimeError:  # torch's layer refuses it too: the image is smaller than the kernel
        assume(False)
    trained = layer.train()(x).detach()
    evaluated = _evaluate(layer, x)
    assert evaluated.shape == shape and evaluated.dtype == dtype
    assert torch.equal(trained, evaluated)
    if not pad_value:
        expected = _expected_conv(layer, x.float(), layer.weight.detach(), layer.bias)
        tolerance = 0.02 if dtype in (torch.float16, torch.bfloat16) else 1e-5
        torch.testing.assert_close(
            evaluated.double(), expected.double(), rtol=tolerance, atol=tolerance
        )
    assert torch.equal(_evaluate(layer.freeze(), x), evaluated)


@pytest.mark.parametrize("pad_value", [-1, 1])
def test_pad_value_is_the_sign_of_the_border(pad_value):
    layer = _conv(padding=(1, 2), pad_value=pad_value)
    inner = _conv(padding=0)
    inner.load_state_dict(layer.state_dict())
    x = _images()
    bordered = F.pad(x, (2, 2, 1, 1), value=pad_value)
    assert torch.equal(_evaluate(layer, x), _evaluate(inner, bordered))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("shape", [(3, 70), (70,), (2, 3, 4, 70), (0, 70)])
def test_linear_trains_and_evaluates_to_the_same_bits(shape, scale, isa):
    torch.manual_seed(0)
    layer = XNORLinear(70, 5, scale=scale)
    x = _images(*shape)
    trained = layer(x).detach()
    evaluated = _evaluate(layer, x)
    assert torch.equal(trained, evaluated)

    weight = layer.weight.detach().double()
    expected = F.linear(_signs(x).double(), _signs(weight).double())
    if scale != "none":
        expected = expected * weight.abs().mean(1)
    if scale == "alpha_k":
        expected = expected * x.double().abs().mean(-1, keepdim=True)
    expected = expected + layer.bias.detach().double()
    torch.testing.assert_close(evaluated.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(_evaluate(layer.freeze(), x), evaluated)


@pytest.mark.parametrize("features", [1, 63, 64, 65, 4999])
def test_widths_around_the_word(features):
    torch.manual_seed(0)
    linear, conv = XNORLinear(features, 3), XNORConv2d(features, 3, 1)
    x = _images(2, features)
    for layer, inputs in [(linear, x), (conv, x[:, :, None, None])]:
        assert torch.equal(layer.train()(inputs).detach(), _evaluate(layer, inputs))


@pytest.mark.parametrize("scale", SCALES)
def test_gradients_are_the_published_ones(scale):
    """By torch's autograd on W~ = alpha * sign(W), then the formula of XNOR-Net."""
    layer = _conv(padding=1, groups=3, scale=scale).double()
    layer.weight.data = torch.randn_like(layer.weight)  # on both sides of 1
    x = (_images(dtype=torch.float64) * 2).requires_grad_()
    weights_of_loss = _images(2, 9, 9, 8, dtype=torch.float64)
    (layer(x) * weights_of_loss).sum().backward()

    signs = _signs(x.detach()).requires_grad_()
    magnitude = x.detach().abs().requires_grad_()
    weight = layer.weight.detach()
    alpha = weight.abs().mean((1, 2, 3), keepdim=True) if scale != "none" else 1.0
    binary = (alpha * _signs(weight)).requires_grad_()
    output = F.conv2d(signs, binary, padding=1, groups=3)
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
    expected = signs.grad * (x.detach().abs() < 1)
    if scale == "alpha_k":
        expected = expected + magnitude.grad * x.detach().sign()
    torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------
# dtypes, shapes, memory formats


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("scale", SCALES)
def test_output_has_the_dtype_of_the_input(scale, dtype):
    layer = _conv(padding=1, scale=scale).to(dtype)
    x = _images(dtype=dtype)
    trained = layer(x).detach()
    assert trained.dtype == dtype
    assert torch.equal(trained, _evaluate(layer, x))
    assert torch.equal(trained, _evaluate(layer.freeze(), x))


@pytest.mark.parametrize("move", [lambda m: m.half(), lambda m: m.to(torch.bfloat16)])
def test_a_frozen_layer_keeps_alpha_in_float32(move):
    layer = _conv().freeze()
    layer.bias.data.zero_()
    before = _evaluate(layer, _images())
    move(layer)
    assert layer.alpha.dtype == torch.float32
    assert layer.bias.dtype != torch.float32
    assert torch.equal(_evaluate(layer, _images()), before)


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
            assert _evaluate(layer, x).eq(4999).all()
            conv = XNORConv2d(4999, 3, 1, scale="none", bias=False)
            conv.weight.data.abs_()
            assert conv(x[:, :, None, None]).eq(4999).all()


@pytest.mark.parametrize("training", [True, False])
def test_unbatched_image(training):
    layer = _conv(padding=1, scale="alpha_k").train(training)
    x = _images()
    with torch.no_grad():
        assert torch.equal(layer(x[0]), layer(x)[0])


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("padding", [1, "same"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_memory_format_follows_the_input(memory_format, padding, training):
    layer = _conv(kernel_size=2, padding=padding).train(training)
    x = _images().to(memory_format=memory_format)
    with torch.no_grad():
        output = layer(x)
    assert output.is_contiguous(memory_format=memory_format)
    assert nn.Conv2d(6, 9, 2, padding=padding)(x).stride() == output.stride()


def test_non_contiguous_and_empty_inputs():
    layer = _conv(padding=1)
    x = _images(2, 6, 9, 16)[..., ::2]
    assert torch.equal(_evaluate(layer, x), _evaluate(layer, x.contiguous()))
    assert _evaluate(layer, x[:0]).shape == (0, 9, 9, 8)


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_no_input_features_leave_the_bias_as_in_torch():
    layer = XNORLinear(0, 3)
    layer.bias.data = torch.tensor([1.0, 2.0, 3.0])
    x = torch.zeros(2, 0)
    assert torch.equal(_evaluate(layer, x), layer.bias.detach().expand(2, 3))
    assert torch.equal(layer.train()(x), layer.bias.expand(2, 3))


# ---------------------------------------------------------------------------------------------
# which path runs


def test_eval_with_gradients_runs_the_float_path_and_says_so_once():
    packed._warn_once.cache_clear()
    layer, x = _conv().eval(), _images()
    with pytest.warns(UserWarning, match=r"torch.no_grad\(\) or nncx.freeze\(model\)") as caught:
        layer(x).sum().backward()
    assert caught[0].filename == __file__
    assert layer.weight.grad is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x)
        layer.requires_grad_(False)
        packed._warn_once.cache_clear()
        layer(x)  # no gradient is needed: the native kernel, hence no warning


def test_forward_never_packs():
    layer, x = _conv().eval(), _images()
    before = layer._prepacked
    _evaluate(layer, x)
    with torch.no_grad():
        layer.eval()
        prepacked = layer._prepacked
        layer(x)
    assert layer._prepacked is prepacked and torch.equal(before, prepacked)


STALE = r"XNORConv2d changed since they were packed; call nncx.repack\(model\)"


@pytest.mark.filterwarnings("ignore:an nncx layer in eval mode was called with gradients")
def test_a_step_in_eval_is_refused_until_repack():
    layer, x = _conv().eval(), _images()
    old = _evaluate(layer, x)
    optimizer = torch.optim.SGD(layer.parameters(), lr=100.0)
    layer(x).square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        with pytest.raises(RuntimeError, match=STALE):
            layer(x)
        layer.repack()
        assert torch.equal(layer(x), layer.train()(x))
        assert not torch.equal(layer(x), old)


@pytest.mark.parametrize("frozen", [True, False])
def test_another_weight_is_refused_until_repack(frozen):
    layer, other, x = _conv().eval(), _conv().eval(), _images()
    with torch.no_grad():
        other.weight.neg_()
    name = "packed_weight" if frozen else "weight"
    if frozen:
        layer.freeze()
        other.freeze()
    expected = _evaluate(other.train(), x)
    setattr(layer, name, getattr(other, name))
    with torch.no_grad(), pytest.raises(RuntimeError, match=STALE):
        layer(x)
    layer.repack()
    assert torch.equal(layer(x) if frozen else _evaluate(layer, x), expected)


def test_weights_made_in_inference_mode_have_no_version():
    x = _images()
    with torch.inference_mode():
        layer = _conv()
        expected = layer(x)
        assert torch.equal(layer.eval()(x), expected)
        assert torch.equal(layer.freeze()(x), expected)


@pytest.mark.parametrize("use_buffers", [True, False])
def test_averaged_model_in_eval_while_the_model_trains(use_buffers):
    model = nn.Sequential(_conv(padding=1), nn.BatchNorm2d(9), _conv(9, 4)).train()
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5), use_buffers=use_buffers
    ).eval()
    optimizer, x = torch.optim.SGD(model.parameters(), lr=0.1), _images()
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
        average.update_parameters(model)
    with torch.no_grad(), pytest.raises(RuntimeError, match=STALE):
        average(x)
    repack(average)
    averaged, expected = average.module, copy.deepcopy(average.module).train()
    expected[1].eval()
    assert torch.equal(_evaluate(average, x), expected(x).detach())
    assert not torch.equal(averaged[0].weight, model[0].weight)


def test_buffers_do_not_depend_on_the_mode():
    layer = _conv()
    assert list(layer.train().buffers()) == list(layer.eval().buffers()) == []
    assert {name for name, _ in layer.freeze().named_buffers()} == {"packed_weight", "alpha"}


def test_repack_follows_the_kernel_path():
    layer, x = _conv().eval(), _images()
    expected = _evaluate(layer, x)
    path = _C.isa()
    try:
        for name in _C.supported_isas():
            _C.set_isa(name)
            layer.repack()
            with torch.no_grad():
                assert torch.equal(layer(x), expected)
    finally:
        _C.set_isa(path)


def test_eval_mode_without_packed_weights_is_refused():
    layer = _conv()
    layer.training = False  # behind the back of eval()
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"call eval\(\) or nncx.repack"):
        layer(_images())


def test_a_frozen_layer_refuses_a_gradient_and_ignores_train():
    layer, x = _conv().freeze(), _images()
    expected = _evaluate(layer, x)
    assert torch.equal(layer.train()(x), expected)
    with pytest.raises(RuntimeError, match="frozen and no gradient flows"):
        layer(x.requires_grad_())
    assert not any(p.requires_grad for p in layer.parameters())


# ---------------------------------------------------------------------------------------------
# freezing, moving, copying


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


@pytest.mark.parametrize("build", [lambda: _conv(padding=1), lambda: XNORLinear(8, 5)])
def test_a_frozen_layer_is_rebuilt_on_meta(build):
    layer = build().freeze()
    with torch.device("meta"):
        rebuilt = build().freeze()
    rebuilt.load_state_dict(layer.state_dict(), assign=True)
    x = _images(2, 6, 9, 8)
    assert torch.equal(_evaluate(rebuilt, x), _evaluate(layer, x))


def test_loading_a_state_dict_repacks():
    source, layer, x = _conv(), _conv().eval(), _images()
    source.weight.data = torch.randn_like(source.weight)
    for assign in (False, True):
        nn.Sequential(layer).load_state_dict(nn.Sequential(source).state_dict(), assign=assign)
        with torch.no_grad():
            assert torch.equal(layer(x), _evaluate(source, x))


def _pickled(layer):
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, _pickled])
def test_copies_are_whole_and_apart(duplicate, frozen):
    layer, x = _conv(padding=1), _images()
    if frozen:
        layer.freeze()
    expected = _evaluate(layer, x)
    other = duplicate(layer)
    with torch.no_grad():
        assert torch.equal(other(x), expected)
        for tensor in [*layer.parameters(), *layer.buffers()]:
            tensor.zero_()
        assert torch.equal(other(x), expected)
        other.load_state_dict({k: v.clone() for k, v in layer.state_dict().items()})
        assert not torch.equal(other(x), expected), "the hook must belong to the copy"


def test_unpickling_rebuilds_the_packed_weights():
    """A pickle may come from a machine with another kernel path."""
    layer, x = _conv().eval(), _images()
    expected = _evaluate(layer, x)
    layer._prepacked = torch.zeros_like(layer._prepacked)
    with torch.no_grad():
        assert torch.equal(_pickled(layer)(x), expected)


def test_moves_rebuild_the_packed_weights():
    layer, x = _conv().eval(), _images()
    with torch.no_grad():
        expected = layer(x)
        layer._prepacked = None
        assert torch.equal(layer.to("cpu")(x), expected)
    assert layer.to("meta")._prepacked is None


def test_training_keeps_no_packed_weights():
    layer = _conv().eval().train()
    assert layer._prepacked is layer.alpha is None


# ---------------------------------------------------------------------------------------------
# compilation


@pytest.mark.parametrize("scale", ["alpha", "alpha_k"])
def test_training_compiles_into_one_graph(scale):
    torch.manual_seed(0)
    model = nn.Sequential(
        _conv(padding="same", kernel_size=2, scale=scale),
        nn.Flatten(1),
        XNORLinear(9 * 72, 3, scale=scale),
    )
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = _images()
    torch.testing.assert_close(compiled(x), eager(x))
    compiled(x).square().sum().backward()
    eager(x).square().sum().backward()
    for ours, theirs in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("frozen", [True, False])
def test_evaluation_compiles_into_one_graph(frozen):
    model = nn.Sequential(_conv(padding=1, scale="alpha_k"), nn.Flatten(1), XNORLinear(9 * 72, 3))
    model.eval()
    if frozen:
        for layer in (model[0], model[2]):
            layer.freeze()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = _images()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
    if not frozen:
        torch.testing.assert_close(compiled(x), model.train()(x).detach())


@pytest.mark.parametrize("frozen", [True, False])
def test_evaluation_is_exported_with_a_dynamic_batch(frozen):
    model = nn.Sequential(_conv(padding=1), nn.Flatten(1), XNORLinear(9 * 72, 3)).eval()
    if frozen:
        freeze(model)
    x = _images(5, 6, 9, 8)
    with torch.no_grad():
        program = torch.export.export(model, (x[:3],), dynamic_shapes=({0: torch.export.Dim.AUTO},))
        assert torch.equal(program.module()(x), model(x))


# ---------------------------------------------------------------------------------------------
# a device whose kernels this build lacks: training and validation work, frozen layers refuse


@pytest.fixture
def no_kernel(monkeypatch):
    monkeypatch.setattr(packed, "has_kernel", lambda op, device: False)
    packed._warn_once.cache_clear()


def test_without_a_kernel_eval_runs_the_float_path_and_says_so_once(no_kernel):
    layer, x = _conv(), _images()
    expected = layer(x)
    layer.eval()
    with torch.no_grad(), pytest.warns(UserWarning, match="no native kernel on cpu") as caught:
        assert torch.equal(layer(x), expected)
        assert torch.equal(layer(x), expected)
    assert len(caught) == 1


def test_without_a_kernel_a_frozen_layer_refuses(no_kernel):
    layer = XNORLinear(5, 7).freeze()
    with pytest.raises(RuntimeError, match="frozen XNORLinear needs a native binary_linear kernel"):
        layer(torch.randn(2, 5))
