"""Layers of every family: drop-in for torch's, equal in training and evaluation, and alive."""

import copy
import inspect
import io
import warnings

import pytest
import torch
from layer_families import FAMILIES, evaluate, images
from torch import nn
from torch.autograd import forward_ad

from nncx import _C
from nncx.compress import freeze, repack
from nncx.nn import BinaryConnectConv2d, XNORConv2d, packed


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


def _skip_if_held(family):
    if family.held:
        pytest.skip("its weight does not move, as the family's own tests say")


# ---------------------------------------------------------------------------------------------
# drop-in


def test_signature_is_torchs_plus_keyword_only_extras(family):
    def described(cls, kind):
        parameters = inspect.signature(cls).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is kind}

    for ours, theirs in [(family.conv_class, nn.Conv2d), (family.linear_class, nn.Linear)]:
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        assert list(described(ours, kind).items()) == list(described(theirs, kind).items())
        extras = described(ours, inspect.Parameter.KEYWORD_ONLY)
        assert extras and inspect.Parameter.empty not in extras.values()


def _assert_takes_the_checkpoint(ours, theirs, family):
    names, plain = list(ours.state_dict()), list(theirs.state_dict())
    extras = family.parameters | family.buffers
    if family.stored != "weight":
        assert set(names) == set(plain) - {"weight"} | extras
        return
    assert names[: len(plain)] == plain and set(names[len(plain) :]) == extras
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours.weight, theirs.weight)


def test_checkpoints_and_repr_are_torchs(family):
    for ours, theirs in [
        (family.conv(4, 6, stride=2, padding=1, groups=2), nn.Conv2d(4, 6, 3, 2, 1, groups=2)),
        (family.conv(4, 6, kernel_size=(3, 5), bias=False), nn.Conv2d(4, 6, (3, 5), bias=False)),
        (family.linear(5, 7), nn.Linear(5, 7)),
    ]:
        _assert_takes_the_checkpoint(ours, theirs, family)
        name, _, arguments = repr(theirs).partition("(")
        assert repr(ours) == f"{type(ours).__name__}({arguments[:-1]}{family.shown})"
        assert type(ours).__name__.endswith(name)
        assert "frozen=True" in repr(family.ready(ours).freeze())


@pytest.mark.parametrize("training", [True, False])
def test_forward_refuses_other_shapes(training, family):
    conv, linear = family.conv().train(training), family.linear(60, 4).train(training)
    for shape in [(2, 5, 8, 8), (6, 8), (1, 2, 6, 8, 8)]:
        with pytest.raises(RuntimeError, match="Conv2d: input must be"):
            conv(torch.zeros(shape))
    for shape in [(3, 64), (60, 3), ()]:
        with pytest.raises(RuntimeError, match=r"Linear: input must be \[..., 60\]"):
            linear(torch.zeros(shape))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
def test_forward_refuses_integers(dtype, training, family):
    for layer, shape in [(family.conv(), (2, 6, 9, 8)), (family.linear(60, 4), (2, 60))]:
        layer.train(training)
        message = f"{type(layer).__name__}: input must be floating, got {dtype}; convert it"
        with torch.no_grad(), pytest.raises(RuntimeError, match=message):
            layer(torch.ones(shape, dtype=dtype))


@pytest.mark.parametrize("training", [True, False])
def test_unbatched_image(training, family):
    layer = family.conv(padding=1).train(training)
    x = images()
    with torch.no_grad():
        family.assert_equal(layer(x[0]), layer(x)[0])


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("padding", [1, "same"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_memory_format_follows_the_input(memory_format, padding, training, family):
    layer = family.conv(kernel_size=2, padding=padding).train(training)
    x = images().to(memory_format=memory_format)
    with torch.no_grad():
        output = layer(x)
    assert output.is_contiguous(memory_format=memory_format)
    assert nn.Conv2d(6, 9, 2, padding=padding)(x).stride() == output.stride()


def test_weights_in_channels_last_give_the_same(family):
    layer, x = family.conv(padding=1), images()
    expected = evaluate(layer, x)
    layer.to(memory_format=torch.channels_last)
    assert not getattr(layer, family.stored).is_contiguous()
    assert torch.equal(evaluate(layer, x), expected)
    family.assert_equal(layer.train()(x).detach(), expected)
    assert torch.equal(evaluate(layer.freeze(), x), expected)


def test_non_contiguous_and_empty_inputs(family):
    layer = family.conv(padding=1)
    x = images(2, 6, 9, 16)[..., ::2]
    assert torch.equal(evaluate(layer, x), evaluate(layer, x.contiguous()))
    assert evaluate(layer, x[:0]).shape == (0, 9, 9, 8)


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize("name", ["XNOR", "BinaryConnect", "int8"])  # K is a mean, which needs one
def test_no_input_features_leave_the_bias_as_in_torch(name):
    layer = FAMILIES[name].linear(0, 3)
    layer.bias.data = torch.tensor([1.0, 2.0, 3.0])
    x = torch.zeros(2, 0)
    assert torch.equal(evaluate(layer, x), layer.bias.detach().expand(2, 3))
    assert torch.equal(layer.train()(x), layer.bias.expand(2, 3))


# ---------------------------------------------------------------------------------------------
# which path runs


def test_eval_with_gradients_runs_the_float_path_and_says_so_once(family):
    packed._warn_once.cache_clear()
    layer, x = family.conv().eval(), images()
    with pytest.warns(UserWarning, match=r"torch.no_grad\(\) or nncx.freeze\(model\)") as caught:
        layer(x).sum().backward()
    assert caught[0].filename == __file__
    assert all(parameter.grad is not None for parameter in layer.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x)
        layer.requires_grad_(False)
        packed._warn_once.cache_clear()
        layer(x)  # no gradient is needed: the native kernel, hence no warning


def test_forward_never_packs(family):
    layer, x = family.conv().eval(), images()
    before = layer._prepacked
    evaluate(layer, x)
    with torch.no_grad():
        layer.eval()
        prepacked = layer._prepacked
        layer(x)
    assert layer._prepacked is prepacked and torch.equal(before, prepacked)


STALE = r"Conv2d changed since they were packed; call nncx.repack\(model\)"


@pytest.mark.filterwarnings("ignore:an nncx layer in eval mode was called with gradients")
def test_a_step_in_eval_is_refused_until_repack(family):
    _skip_if_held(family)
    layer, x = family.conv().eval(), images()
    old = evaluate(layer, x)
    optimizer = torch.optim.SGD(layer.parameters(), lr=100.0)
    layer(x).square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        with pytest.raises(RuntimeError, match=STALE):
            layer(x)
        layer.repack()
        repacked = layer(x)
        family.assert_equal(layer.train()(x), repacked)
        assert not torch.equal(repacked, old)


@pytest.mark.parametrize("frozen", [True, False])
def test_another_weight_is_refused_until_repack(frozen, family):
    _skip_if_held(family)
    layer, other, x = family.conv().eval(), family.conv().eval(), images()
    with torch.no_grad():
        stored = getattr(other, family.stored)
        stored.copy_(-stored if stored.is_floating_point() else stored.flip(0))
    name = "packed_weight" if frozen else family.stored
    if frozen:
        layer.freeze()
        other.freeze()
    expected = evaluate(other.train(), x)
    setattr(layer, name, getattr(other, name))
    with torch.no_grad(), pytest.raises(RuntimeError, match=STALE):
        layer(x)
    layer.repack()
    assert torch.equal(layer(x) if frozen else evaluate(layer, x), expected)


def test_a_frozen_weight_may_be_written_anew_with_the_same_bits(family):
    """As DistributedDataParallel does with all buffers, before every forward that trains."""
    layer, x = family.conv().freeze(), images()
    expected = layer(x)
    for _ in range(2):
        layer.packed_weight.copy_(layer.packed_weight.clone())
        assert torch.equal(layer(x), expected)
    layer.packed_weight.view(torch.uint8)[0] ^= 1
    with pytest.raises(RuntimeError, match=STALE):
        layer(x)


def test_shapes_are_found_on_meta(family):
    layer = family.conv(device="meta")
    assert layer(images().to("meta")).shape == family.conv()(images()).shape
    assert family.linear(6, 5, device="meta")(torch.empty(3, 6, device="meta")).shape == (3, 5)


def test_weights_made_in_inference_mode_have_no_version(family):
    x = images()
    with torch.inference_mode():
        layer = family.conv()
        expected = layer(x)
        family.assert_equal(expected, layer.eval()(x))
        family.assert_equal(expected, layer.freeze()(x))


@pytest.mark.parametrize("use_buffers", [True, False])
def test_averaged_model_in_eval_while_the_model_trains(use_buffers, family):
    _skip_if_held(family)
    model = nn.Sequential(family.conv(padding=1), nn.BatchNorm2d(9), family.conv(9, 4)).train()
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5), use_buffers=use_buffers
    ).eval()
    optimizer, x = torch.optim.SGD(model.parameters(), lr=0.1), images()
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
    family.assert_equal(expected(x).detach(), evaluate(average, x))
    assert not torch.equal(averaged[0].bias, model[0].bias)


def test_buffers_do_not_depend_on_the_mode(family):
    layer = family.conv()
    for training in (True, False):
        buffers = dict(layer.train(training).named_buffers())
        assert buffers.keys() == family.buffers
    assert {name for name, _ in layer.freeze().named_buffers()} == family.frozen_buffers


def test_repack_follows_the_kernel_path(family):
    layer, x = family.conv().eval(), images()
    expected = evaluate(layer, x)
    path = _C.isa()
    try:
        for name in _C.supported_isas():
            _C.set_isa(name)
            layer.repack()
            with torch.no_grad():
                family.assert_equal(layer(x), expected)
    finally:
        _C.set_isa(path)


def test_eval_mode_without_packed_weights_is_refused(family):
    layer = family.conv()
    layer.training = False  # behind the back of eval()
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"call eval\(\) or nncx.repack"):
        layer(images())


def test_a_frozen_layer_refuses_a_gradient_and_ignores_train(family):
    layer, x = family.conv().freeze(), images()
    expected = evaluate(layer, x)
    assert torch.equal(layer.train()(x), expected)
    with pytest.raises(RuntimeError, match="frozen and no gradient flows"):
        layer(x.requires_grad_())
    assert not any(p.requires_grad for p in layer.parameters())


def test_a_frozen_layer_refuses_a_gradient_by_any_of_its_tensors(family):
    layer, x = family.conv().freeze(), images()
    floats = [t for t in (*layer.parameters(), *layer.buffers()) if t.is_floating_point()]
    assert len(floats) >= 1, "the bias"
    for tensor in floats:
        tensor.requires_grad_()
        with pytest.raises(RuntimeError, match="frozen and no gradient flows"):
            layer(x)
        tensor.requires_grad_(False)
    layer(x)


def _tangent_in_a_level(layer, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(layer(forward_ad.make_dual(x, x))).tangent


def _tangent_by_jvp(layer, x):
    return torch.func.jvp(layer, (x,), (x,))[1]


@pytest.mark.parametrize("tangent", [_tangent_in_a_level, _tangent_by_jvp])
@pytest.mark.parametrize("grad_enabled", [True, False])
def test_a_frozen_layer_refuses_forward_mode_too(grad_enabled, tangent, family):
    """Which would give no tangent, or zeros, and is not switched off by no_grad."""
    layer, x = family.conv().freeze(), images()
    with torch.set_grad_enabled(grad_enabled):
        with pytest.raises(RuntimeError, match="frozen and no gradient flows"):
            tangent(layer, x)


@pytest.mark.filterwarnings("ignore:an nncx layer in eval mode was called with gradients")
def test_forward_mode_runs_the_float_path():
    """Of BinaryConnect, which is linear in x; the sign of XNOR says that it has no tangent."""
    layer, x = BinaryConnectConv2d(6, 9, 3, bias=False).eval().requires_grad_(False), images()
    torch.testing.assert_close(_tangent_in_a_level(layer, x), layer(x))
    layer = XNORConv2d(6, 9, 3).eval().requires_grad_(False)
    with pytest.raises(NotImplementedError, match="jvp"):
        _tangent_in_a_level(layer, x)


# ---------------------------------------------------------------------------------------------
# freezing, moving, copying


@pytest.mark.parametrize(
    "build", [lambda family: family.conv(padding=1), lambda family: family.linear(8, 5)]
)
def test_a_frozen_layer_is_rebuilt_on_meta(build, family):
    layer = build(family).freeze()
    with torch.device("meta"):
        rebuilt = build(family).freeze()
    rebuilt.load_state_dict(layer.state_dict(), assign=True)
    x = images()
    assert torch.equal(evaluate(rebuilt, x), evaluate(layer, x))


def test_loading_a_state_dict_repacks(family):
    source, layer, x = family.conv(), family.conv().eval(), images()
    for parameter in source.parameters():
        parameter.data = torch.randn_like(parameter)
    for assign in (False, True):
        nn.Sequential(layer).load_state_dict(nn.Sequential(source).state_dict(), assign=assign)
        with torch.no_grad():
            assert torch.equal(layer(x), evaluate(source, x))


def _pickled(layer):
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, _pickled])
def test_copies_are_whole_and_apart(duplicate, frozen, family):
    layer, x = family.conv(padding=1), images()
    if frozen:
        layer.freeze()
    expected = evaluate(layer, x)
    other = duplicate(layer)
    with torch.no_grad():
        assert torch.equal(other(x), expected)
        for tensor in [*layer.parameters(), *layer.buffers()]:
            tensor.fill_(1)
        assert torch.equal(other(x), expected)
        other.load_state_dict({k: v.clone() for k, v in layer.state_dict().items()})
        assert not torch.equal(other(x), expected), "the hook must belong to the copy"


def test_unpickling_rebuilds_the_packed_weights(family):
    """A pickle may come from a machine with another kernel path."""
    layer, x = family.conv().eval(), images()
    expected = evaluate(layer, x)
    layer._prepacked = torch.zeros_like(layer._prepacked)
    with torch.no_grad():
        assert torch.equal(_pickled(layer)(x), expected)


def test_moves_rebuild_the_packed_weights(family):
    layer, x = family.conv().eval(), images()
    with torch.no_grad():
        expected = layer(x)
        layer._prepacked = None
        assert torch.equal(layer.to("cpu")(x), expected)
    assert layer.to("meta")._prepacked is None


def test_training_keeps_no_packed_weights(family):
    layer = family.conv().eval().train()
    assert layer._prepacked is None


# ---------------------------------------------------------------------------------------------
# compilation


@pytest.fixture(autouse=True)
def _forget_graphs():
    """Each family compiles the same functions anew, which torch allows a few times only."""
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_training_compiles_into_one_graph(family):
    model = family.network()
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = images()
    torch.testing.assert_close(compiled(x), eager(x))
    compiled(x).square().sum().backward()
    eager(x).square().sum().backward()
    for ours, theirs in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("frozen", [True, False])
def test_evaluation_compiles_into_one_graph(frozen, family):
    model = family.network().eval()
    if frozen:
        freeze(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = images()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
    if not frozen:
        torch.testing.assert_close(compiled(x), model.train()(x).detach())


@pytest.mark.parametrize("frozen", [True, False])
def test_evaluation_is_exported_with_a_dynamic_batch(frozen, family):
    model = family.network().eval()
    if frozen:
        freeze(model)
    x = images(5, 6, 9, 8)
    with torch.no_grad():
        program = torch.export.export(model, (x[:3],), dynamic_shapes=({0: torch.export.Dim.AUTO},))
        assert torch.equal(program.module()(x), model(x))


# ---------------------------------------------------------------------------------------------
# a device whose kernels this build lacks: training and validation work, frozen layers refuse


@pytest.fixture
def no_kernel(monkeypatch, family):
    if not family.native:
        pytest.skip("runs on torch's kernels")
    monkeypatch.setattr(packed, "has_kernel", lambda op, device: False)
    packed._warn_once.cache_clear()


def test_without_a_kernel_eval_runs_the_float_path_and_says_so_once(no_kernel, family):
    layer, x = family.conv(), images()
    expected = layer(x)
    layer.eval()
    with torch.no_grad(), pytest.warns(UserWarning, match="no native kernel on cpu") as caught:
        assert torch.equal(layer(x), expected)
        assert torch.equal(layer(x), expected)
    assert len(caught) == 1


def test_without_a_kernel_a_frozen_layer_refuses(no_kernel, family):
    layer = family.linear(5, 7).freeze()
    message = f"frozen {type(layer).__name__} needs a native {layer.op} kernel"
    with pytest.raises(RuntimeError, match=message):
        layer(torch.randn(2, 5))
    assert "NNCX_CUDA=1" in layer._why_not_packed(torch.device("cuda"))
