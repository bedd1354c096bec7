"""Hashed layers: what a float layer with the weights of the hash computes, in a file of buckets."""

import copy
import inspect
import io
import math
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from layer_families import evaluate, images
from torch import nn

import nncx
from nncx import _C
from nncx.nn import HashedLinear, packed

sys.path.append(str(Path(__file__).parents[1] / "ops"))
from hashes import virtual_weight  # noqa: E402

FORMATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def _forget_graphs():
    torch.compiler.reset()


def _layer(in_features=70, out_features=33, **arguments):
    torch.manual_seed(0)
    return HashedLinear(in_features, out_features, **{"seed": 5} | arguments)


def _expected(layer, x):
    """torch's layer in float64."""
    buckets = (layer.packed_weight if layer.frozen else layer.weight).detach().double()
    weight = virtual_weight(buckets, layer.seed, layer.in_features, layer.out_features)
    bias = None if layer.bias is None else layer.bias.detach().double()
    return F.linear(x.double(), weight, bias)


# ---------------------------------------------------------------------------------------------
# drop-in


def test_signature_is_torchs_plus_keyword_only_extras():
    def described(cls, kind):
        parameters = inspect.signature(cls).parameters.values()
        return [(p.name, p.default) for p in parameters if p.kind is kind]

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    assert described(HashedLinear, kind) == described(nn.Linear, kind)
    extras = dict(described(HashedLinear, inspect.Parameter.KEYWORD_ONLY))
    assert extras == {"compression": 1 / 8, "buckets": None, "seed": 0}


def test_repr_and_state():
    layer = _layer()
    assert repr(layer) == (
        "HashedLinear(in_features=70, out_features=33, bias=True, buckets=289, seed=5)"
    )
    assert {name: tuple(t.shape) for name, t in layer.state_dict().items()} == {
        "weight": (289,),
        "bias": (33,),
    }
    assert repr(layer.freeze()).endswith("seed=5, frozen=True)")
    assert {name: tuple(t.shape) for name, t in layer.state_dict().items()} == {
        "packed_weight": (289,),
        "bias": (33,),
    }


@pytest.mark.parametrize(
    ("arguments", "buckets"),
    [
        ({}, 2),
        ({"compression": 1}, 12),
        ({"compression": 1 / 64}, 1),
        ({"compression": 0.26}, 4),
        ({"buckets": 20}, 20),
        ({"buckets": 5, "compression": 1 / 2}, 5),
    ],
)
def test_number_of_buckets(arguments, buckets):
    layer = HashedLinear(3, 4, **arguments)
    assert layer.buckets == layer.weight.numel() == buckets
    assert layer.compression == buckets / 12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"compression": 0}, r"compression must be in \(0, 1\], got 0"),
        ({"compression": 1.01}, r"compression must be in \(0, 1\], got 1.01"),
        ({"compression": math.nan}, r"compression must be in \(0, 1\], got nan"),
        ({"buckets": 0}, r"buckets must be from 1 to 2\*\*31 - 1, got 0"),
        ({"buckets": 2**31}, r"buckets must be from 1 to 2\*\*31 - 1, got 2147483648"),
        ({"seed": 2**63}, "seed must be a 64-bit integer, got 9223372036854775808"),
        ({"seed": 1.5}, "seed must be a 64-bit integer, got 1.5"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=f"HashedLinear: {message}"):
        HashedLinear(3, 4, **arguments)


def test_a_new_layer_has_the_width_of_torchs():
    """Whatever the number of buckets: the fan-in is the virtual one."""
    layer, plain = _layer(400, 300, compression=1 / 64), nn.Linear(400, 300)
    assert layer.weight.abs().max() <= 1 / 20 and layer.bias.abs().max() <= 1 / 20
    virtual = layer.virtual_weight()
    torch.testing.assert_close(virtual.std(), plain.weight.std(), rtol=0.03, atol=0)
    torch.testing.assert_close(layer.bias.std(), plain.bias.std(), rtol=0.15, atol=0)


def test_the_virtual_weight_is_never_allocated_by_the_constructor():
    layer = HashedLinear(2**29, 2**20, buckets=10)
    assert [parameter.numel() for parameter in layer.parameters()] == [10, 2**20]
    assert HashedLinear(5, 3, device="meta").weight.is_meta
    assert HashedLinear(5, 3, dtype=torch.float64).bias.dtype == torch.float64


# ---------------------------------------------------------------------------------------------
# what it computes


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("shape", [(3, 70), (70,), (2, 3, 4, 70), (0, 70), (1, 70)])
def test_is_torchs_layer_with_the_weights_of_the_hash(shape, dtype):
    layer, x = _layer(), images(*shape, dtype=dtype)
    expected = _expected(layer, x)
    tolerance = {torch.float16: 2e-3, torch.bfloat16: 2e-2}.get(dtype, 1e-5)
    for out in (layer(x).detach(), evaluate(layer, x), evaluate(layer.freeze(), x)):
        assert out.dtype == dtype and out.shape == (*shape[:-1], 33)
        torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_no_features_and_no_bias():
    layer = _layer(0, 3)
    assert torch.equal(evaluate(layer, torch.zeros(2, 0)), layer.bias.detach().expand(2, 3))
    layer, x = _layer(bias=False), images(3, 70)
    torch.testing.assert_close(evaluate(layer, x), _expected(layer, x).float())
    torch.testing.assert_close(layer.train()(x), _expected(layer, x).float())


def test_the_gradient_of_a_bucket_is_the_sum_of_its_weights():
    """The formula of the paper: of sign * input * gradient of the output, and the bias as torch."""
    layer, x, gradient = _layer(), images(9, 70).requires_grad_(), images(9, 33)
    layer(x).backward(gradient)
    of_weight = gradient.T.double() @ x.detach().double()
    ones = torch.eye(layer.buckets, dtype=torch.float64)
    expected = torch.stack(
        [(virtual_weight(one, layer.seed, 70, 33) * of_weight).sum() for one in ones]
    )
    torch.testing.assert_close(layer.weight.grad.double(), expected, rtol=1e-4, atol=1e-4)
    of_input = gradient.double() @ layer.virtual_weight().detach().double()
    torch.testing.assert_close(x.grad.double(), of_input, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.bias.grad, gradient.sum(0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_dtypes_train(dtype):
    layer, x = _layer().to(dtype), images(9, 70, dtype=dtype)
    layer(x).sum().backward()
    assert layer.weight.grad.dtype == dtype
    ones = torch.ones(9, 33, dtype=torch.float64)
    expected = nncx.ops.hashed_bucket_sums(ones.T @ x.double(), layer.seed, layer.buckets)
    tolerance = {torch.float16: 2e-2, torch.bfloat16: 2e-1}.get(dtype, 1e-6)
    difference = layer.weight.grad.double() - expected
    assert difference.abs().max() <= tolerance * expected.abs().max()


def test_autocast_decides_the_dtype():
    layer, x = _layer(), images(3, 70)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == evaluate(layer, x).dtype == torch.bfloat16


def test_the_seed_decides_which_weights_are_shared():
    first, same, other = _layer(seed=1), _layer(seed=1), _layer(seed=2)
    assert torch.equal(first.virtual_weight(), same.virtual_weight())
    assert not torch.equal(first.virtual_weight(), other.virtual_weight())
    assert torch.equal(first.weight, other.weight)


def test_every_path_computes_the_same():
    layer, x = _layer().eval(), images(9, 70)
    expected, path = evaluate(layer, x), _C.isa()
    try:
        for name in _C.supported_isas():
            _C.set_isa(name)
            torch.testing.assert_close(evaluate(layer, x), expected)
    finally:
        _C.set_isa(path)


@pytest.mark.parametrize("training", [True, False])
def test_other_inputs_are_refused(training):
    layer = _layer().train(training)
    for shape in [(3, 71), (70, 3), ()]:
        with pytest.raises(RuntimeError, match=r"HashedLinear: input must be \[..., 70\]"):
            layer(torch.zeros(shape))
    with pytest.raises(RuntimeError, match="HashedLinear: input must be floating"):
        layer(torch.ones(3, 70).int())


# ---------------------------------------------------------------------------------------------
# training, evaluation, freezing


def test_eval_with_gradients_runs_the_float_path_and_says_so():
    packed._warn_once.cache_clear()
    layer = _layer().eval()
    with pytest.warns(UserWarning, match=r"torch.no_grad\(\) or nncx.freeze\(model\)"):
        layer(images(2, 70)).sum().backward()
    assert layer.weight.grad is not None


STALE = r"HashedLinear changed since they were packed; call nncx.repack\(model\)"


def test_changed_buckets_are_refused_until_repack():
    layer, x = _layer().eval(), images(2, 70)
    with torch.no_grad():
        layer.weight.neg_()
        with pytest.raises(RuntimeError, match=STALE):
            layer(x)
        layer.repack()
        torch.testing.assert_close(layer(x), _expected(layer, x).float())
    layer.freeze()
    expected = layer(x)
    layer.packed_weight.copy_(layer.packed_weight.clone())  # as DistributedDataParallel does
    assert torch.equal(layer(x), expected)
    layer.packed_weight[0] += 1
    with pytest.raises(RuntimeError, match=STALE):
        layer(x)


def test_a_frozen_layer_refuses_gradients_and_keeps_float32():
    layer, x = _layer(dtype=torch.float16).freeze(), images(2, 70)
    assert layer.packed_weight.dtype == torch.float32
    expected = layer(x)
    assert torch.equal(layer.train()(x), expected)
    with pytest.raises(RuntimeError, match="frozen and no gradient flows"):
        layer(x.clone().requires_grad_())
    assert layer.half().packed_weight.dtype == torch.float32


def _pickled(layer):
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, _pickled])
def test_copies_are_whole_and_apart(duplicate, frozen):
    layer, x = _layer(), images(2, 70)
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


@pytest.mark.parametrize("frozen", [True, False])
def test_compiles_into_one_graph_and_is_exported(frozen):
    model = nn.Sequential(_layer(), nn.ReLU(), _layer(33, 5, seed=6)).eval()
    if frozen:
        nncx.freeze(model)
    x = images(5, 70)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
        program = torch.export.export(model, (x[:3],), dynamic_shapes=({0: torch.export.Dim.AUTO},))
        assert torch.equal(program.module()(x), model(x))


def test_training_compiles_into_one_graph():
    model = nn.Sequential(_layer(), nn.ReLU(), _layer(33, 5, seed=6))
    eager, x = copy.deepcopy(model), images(5, 70)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(x).square().sum().backward()
    eager(x).square().sum().backward()
    for ours, theirs in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_shapes_are_found_on_meta():
    assert _layer(device="meta")(torch.empty(3, 70, device="meta")).shape == (3, 33)
    assert _layer().eval().to("meta")._prepacked is None


def test_without_a_kernel(monkeypatch):
    monkeypatch.setattr(packed, "has_kernel", lambda op, device: False)
    packed._warn_once.cache_clear()
    layer, x = _layer(), images(2, 70)
    expected = layer(x)
    layer.eval()
    with torch.no_grad(), pytest.warns(UserWarning, match="no native kernel on cpu"):
        assert torch.equal(layer(x), expected)
    with pytest.raises(RuntimeError, match="frozen HashedLinear needs a native hashed_linear"):
        layer.freeze()(x)


# ---------------------------------------------------------------------------------------------
# files


@pytest.mark.parametrize("frozen", [True, False])
def test_a_file_gives_the_same_bits(tmp_path, frozen):
    model = nn.Sequential(_layer(784, 100), nn.ReLU(), _layer(100, 10, buckets=99, seed=-(2**63)))
    if frozen:
        nncx.freeze(model)
    x = images(3, 784)
    expected = evaluate(model, x)
    nncx.save(model, tmp_path / "m.safetensors")
    loaded = nncx.load(tmp_path / "m.safetensors")
    assert [type(layer) for layer in loaded] == [HashedLinear, nn.ReLU, HashedLinear]
    assert loaded[2].seed == -(2**63) and loaded[2].frozen == frozen
    assert torch.equal(evaluate(loaded, x), expected)
    size = (tmp_path / "m.safetensors").stat().st_size
    assert size <= 4 * (9800 + 100 + 99 + 10) + 1500


def test_a_file_fits_into_the_float_network_it_was_made_of(tmp_path):
    def network():
        return nn.Sequential(nn.Linear(70, 33), nn.ReLU(), nn.Linear(33, 5))

    model, x = nncx.convert(network(), nncx.Hashed()), images(3, 70)
    nncx.save(nncx.freeze(model), tmp_path / "m.safetensors")
    loaded = nncx.load(tmp_path / "m.safetensors", into=network())
    assert torch.equal(evaluate(loaded, x), evaluate(model, x))
    with pytest.raises(ValueError, match="cannot be loaded"):
        nncx.load(tmp_path / "m.safetensors", into=nn.Sequential(nn.Linear(70, 34)))


def test_a_small_file_may_claim_a_large_layer_and_cost_nothing(tmp_path):
    """Its virtual weight is never written out, but in training."""
    layer = nn.Sequential(HashedLinear(2**29, 2, buckets=4))
    nncx.save(nncx.freeze(layer), tmp_path / "m.safetensors")
    loaded = nncx.load(tmp_path / "m.safetensors")
    assert sum(tensor.nbytes for tensor in loaded.state_dict().values()) == 4 * (4 + 2)


def test_a_state_dict_repacks():
    source, layer, x = _layer(), _layer().eval(), images(2, 70)
    source.weight.data = torch.randn_like(source.weight)
    for assign in (False, True):
        layer.load_state_dict(source.state_dict(), assign=assign)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(layer(x), evaluate(source, x))
