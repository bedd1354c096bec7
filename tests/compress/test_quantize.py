"""quantize: the int8 arithmetic of its formulas on a folded graph, and what it refuses."""

import copy
import functools
import math

import numpy as np
import pytest
import torch
from graphs import MODELS, torchvision_model, with_statistics
from torch import nn
from torch.nn.utils import prune

import nncx
from nncx.compress import fold_batch_norm, vanhoucke
from nncx.compress.observers import MSE, Entropy, MinMax, MovingAverage, Percentile
from nncx.graph import trace

CONV_AND_LINEAR = (nncx.Int8Conv2d, nncx.Int8Linear)


class Small(nn.Module):
    """A user's class: two convolutions, two linear layers, a norm to fold."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, stride=2, groups=2)
        self.head = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5))

    def forward(self, x):
        x = self.conv2(self.bn1(self.conv1(x)).relu())
        return self.head(x.relu().mean((2, 3)))


def _batches(count=3, shape=(3, 9, 9)):
    return [torch.randn(4, *shape) for _ in range(count)]


def _small():
    return with_statistics(Small()).eval()


@functools.cache
def _traced():
    return trace(_small(), _batches()[0])


def _graph():
    """That of a `Small`, which `quantize` need not trace."""
    return copy.deepcopy(_traced())


def _int8_layers(graph):
    return {p for p, layer in graph.named_layers().items() if isinstance(layer, CONV_AND_LINEAR)}


def _snr_db(wanted, got):
    return 10 * math.log10(wanted.square().sum() / (wanted - got).square().sum())


# ---------------------------------------------------------------------------------------------
# what it makes


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("per_channel", [False, True])
def test_a_perceptron_is_computed_as_the_formulas_say(per_channel, symmetric, isa):
    model = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3))
    batches = _batches(shape=(7,))
    graph = nncx.quantize(model, batches, per_channel=per_channel, symmetric=symmetric)

    def layer(values, seen, linear):
        low, high = min(seen.min(), 0), max(seen.max(), 0)
        scale = np.float32(max(-low, high) / 127 if symmetric else (high - low) / 255)
        zero = 0 if symmetric else int(np.clip(np.rint(-128 - low / scale), -128, 127))
        q = np.clip(np.rint(values * (np.float32(1) / scale)) + zero, -128, 127).astype(int) - zero
        weight = linear.weight.detach().numpy()
        w_scale = np.abs(weight).max(1 if per_channel else None, keepdims=True) / np.float32(127)
        q_w = np.clip(np.rint(weight / w_scale), -127, 127).astype(int)
        scales = np.broadcast_to(w_scale.ravel() * scale, len(weight))
        return (q @ q_w.T).astype(np.float32) * scales + linear.bias.detach().numpy()

    seen, x = torch.cat(batches), torch.randn(6, 7)
    hidden = model[0](seen).relu().detach().numpy()
    wanted = layer(
        np.maximum(layer(x.numpy(), seen.numpy(), model[0]), 0).astype(np.float32), hidden, model[2]
    )
    with torch.no_grad():
        torch.testing.assert_close(graph(x), torch.from_numpy(wanted), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_networks_in_int8_are_close_to_float_and_come_back_from_a_file(name, tmp_path):
    build, shape = MODELS[name]
    model = with_statistics(build()).eval()
    batches = _batches(2, shape)
    graph = nncx.quantize(model, batches)
    quantizable = {
        p
        for p, m in trace(model, batches[0]).named_layers().items()
        if type(m) in (nn.Conv2d, nn.Linear)
    }
    assert _int8_layers(graph) == quantizable and not graph.training
    with torch.no_grad():
        assert name == "everything" or _snr_db(model(batches[0]), graph(batches[0])) > 20
        unfrozen = graph(batches[0])
    nncx.save(nncx.freeze(graph), tmp_path / "int8")
    loaded = nncx.load(tmp_path / "int8")
    assert torch.equal(loaded(batches[0]), unfrozen)


def test_a_resnet18_of_torchvision_is_a_quarter_and_loads_without_its_class(tmp_path):
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    model, shape = torchvision_model(models, "resnet18")
    batches = _batches(2, shape)
    nncx.save(trace(model, batches[0]), tmp_path / "float")
    graph = nncx.freeze(nncx.quantize(model, batches))
    nncx.save(graph, tmp_path / "int8")
    assert (tmp_path / "int8").stat().st_size < 0.27 * (tmp_path / "float").stat().st_size
    loaded, x = nncx.load(tmp_path / "int8"), torch.randn(3, *shape)
    assert torch.equal(loaded(x), graph(x))
    with torch.no_grad():
        assert _snr_db(model(x), loaded(x)) > 20


@pytest.mark.parametrize(
    "observer",
    [MinMax(), MovingAverage(), Percentile(), Entropy(), MSE()],
    ids=lambda o: type(o).__name__,
)
def test_a_range_is_what_the_observer_says_of_the_folded_network(observer):
    batches = _batches()
    graph = nncx.quantize(_graph(), batches, observer)
    floats = fold_batch_norm(_graph(), batches[0])
    seen = {path: observer.new() for path in floats.named_layers()}
    for path, layer in floats.named_layers().items():
        layer.register_forward_pre_hook(lambda _, args, path=path: seen[path].observe(args[0]))
    with torch.no_grad():
        for batch in batches:
            floats(batch)
    for path, layer in graph.named_layers().items():
        wanted = torch.tensor(seen[path].range(symmetric=False))
        assert torch.equal(layer.input_range, wanted), path


@pytest.fixture(scope="module")
def trained():
    """The graph of a LeNet5 that knows the digits, inputs to calibrate it with, its test set."""
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    torch.manual_seed(0)
    splits = nncx.data.load("digits")
    images, labels = splits.train.tensors
    model = nncx.models.LeNet5(image_size=8, padding=2, norm=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(5):
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    return trace(model.eval(), images), images[:512].split(64), splits.test.tensors


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("observer", [MinMax, MovingAverage, Percentile, Entropy, MSE])
def test_a_trained_network_loses_no_more_than_one_digit_of_359(observer, symmetric, trained):
    model, batches, (images, labels) = trained
    graph = nncx.freeze(nncx.quantize(model, batches, observer(), symmetric=symmetric))
    with torch.no_grad():
        wanted, got = model(images), graph(images)
    right = [(logits.argmax(1) == labels).sum().item() for logits in (wanted, got)]
    assert right[0] > 340 and right[1] >= right[0] - 1
    assert _snr_db(wanted, got) > 30


def test_the_model_stays_as_it_was_and_shares_nothing_with_the_graph():
    model = _small().train()
    state = copy.deepcopy(model.state_dict())
    graph = nncx.freeze(nncx.quantize(model, _batches()))
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    theirs = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert not theirs & {tensor.data_ptr() for tensor in graph.state_dict().values()}


def test_a_graph_is_quantized_as_its_model():
    model, batches = _small(), _batches()
    graph = trace(model, batches[0])
    before = graph.nodes
    again = nncx.quantize(graph, batches)
    assert graph.nodes == before and graph.named_layers()["conv1"] is model.conv1
    with torch.no_grad():
        assert torch.equal(again(batches[0]), nncx.quantize(model, batches)(batches[0]))


def test_batches_of_a_data_loader_are_read_once():
    model, batches = _graph(), _batches()
    labelled = ((batch, torch.zeros(4)) for batch in batches)
    with torch.no_grad():
        got = nncx.quantize(model, labelled)(batches[0])
        assert torch.equal(got, nncx.quantize(model, batches)(batches[0]))
    assert next(labelled, None) is None


@pytest.mark.parametrize(
    "skip, left",
    [
        (None, {"conv1", "conv2", "head.0", "head.2"}),
        (["conv1", "head"], {"conv2"}),
        (lambda name, layer: isinstance(layer, nn.Conv2d), {"head.0", "head.2"}),
    ],
)
def test_skip(skip, left):
    assert _int8_layers(nncx.quantize(_graph(), _batches(), skip=skip)) == left


def test_vanhoucke_is_a_scale_a_layer_and_a_float_input_layer():
    graph = vanhoucke(_graph(), _batches())
    assert _int8_layers(graph) == {"conv2", "head.0", "head.2"}
    for path in _int8_layers(graph):
        layer = graph.get_submodule(path)
        assert not layer.per_channel and not layer.symmetric


def test_a_shared_layer_sees_all_its_inputs_and_stays_shared():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.Tanh(), nn.Sequential(shared, nn.Linear(4, 2)))
    batch = 10 * torch.rand(5, 4)
    graph = nncx.quantize(model, [batch])
    first, again, _ = graph.named_layers().values()
    assert first is again
    inner = shared(batch).tanh()
    wanted = torch.stack([torch.minimum(inner.min(), batch.min()), batch.max()])
    assert torch.equal(first.input_range, wanted.detach())


def test_the_graph_trains_on():
    graph, x = nncx.quantize(_graph(), _batches()).train(), torch.randn(2, 3, 9, 9)
    graph(x).sum().backward()
    assert all(parameter.grad is not None for parameter in graph.parameters())


# ---------------------------------------------------------------------------------------------
# what it refuses


@pytest.mark.parametrize("task", [nncx.quantize, nncx.sensitivity, vanhoucke])
def test_a_tensor_is_no_list_of_batches(task):
    with pytest.raises(TypeError, match=r"batches must be several.* got one tensor; pass \[inputs"):
        task(nn.Sequential(nn.Linear(3, 2)), torch.randn(4, 3))


def test_what_is_in_int8_already():
    graph = nncx.quantize(nn.Sequential(nn.Linear(3, 2)), [torch.randn(4, 3)])
    with pytest.raises(ValueError, match="got none; pass the float model, not one that is compr"):
        nncx.quantize(graph, [torch.randn(4, 3)])


@pytest.mark.parametrize("task", [nncx.quantize, nncx.sensitivity, vanhoucke])
def test_no_batches_and_batches_of_something_else(task):
    name = task.__name__
    with pytest.raises(ValueError, match=f"{name}: batches must be at least one, got none"):
        task(_small(), [])
    with pytest.raises(TypeError, match=f"{name}: a batch must be a tensor.*got ndarray"):
        task(_small(), [np.zeros((1, 3, 9, 9))])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_calibration_data_that_are_not_finite(value):
    batches = _batches()
    batches[1][0, 0, 0, 0] = value
    with pytest.raises(ValueError, match="must be finite, got NaN or infinity in the input of 'co"):
        nncx.quantize(_graph(), batches)


def test_a_weight_that_is_not_finite():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    nn.init.constant_(model[1].weight, float("nan"))
    with pytest.raises(ValueError, match="quantize: '1' must have a finite weight, got NaN or inf"):
        nncx.quantize(model, [torch.ones(2, 4)])


def test_nothing_to_quantize():
    with pytest.raises(ValueError, match="must have a Conv2d or Linear that is not skipped, got n"):
        nncx.quantize(nn.Sequential(nn.BatchNorm2d(3)), _batches())
    with pytest.raises(ValueError, match="must have a Conv2d or Linear that is not skipped, got n"):
        nncx.quantize(_graph(), _batches(), skip=["conv1", "conv2", "head"])


def test_an_unknown_name_in_skip():
    with pytest.raises(ValueError, match="quantize: skip names 'conv9', which the model does not"):
        nncx.quantize(_graph(), _batches(), skip=["conv9"])
    with pytest.raises(ValueError, match="quantize: skip must be a list of names, got 'conv1'"):
        nncx.quantize(_graph(), _batches(), skip="conv1")


@pytest.mark.parametrize(
    "spoil, match",
    [
        (lambda layer: layer.register_forward_hook(lambda *_: None), "'0' .* got one with hooks"),
        (
            lambda layer: prune.l1_unstructured(layer, "weight", 2),
            "'0' .* got one with a reparametrised weight",
        ),
    ],
)
def test_a_layer_that_a_swap_would_not_keep(spoil, match):
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU()).eval()
    spoil(model[0])
    with pytest.raises(ValueError, match=f"quantize: {match}"):
        nncx.quantize(model, [torch.randn(2, 3)])


def test_a_layer_of_too_many_terms():
    model = nn.Sequential(nn.Linear(70_000, 1), nn.Linear(1, 1))
    with pytest.raises(ValueError, match="'0' cannot be int8 .*at most 65793 products.*; skip it"):
        nncx.quantize(model, [torch.ones(1, 70_000)])
    nncx.quantize(model, [torch.ones(1, 70_000)], skip=["0"])


def test_a_model_that_cannot_be_traced():
    with pytest.raises(ValueError, match="trace: "):
        nncx.quantize(nn.Sequential(nn.Linear(3, 3), nn.LSTM(3, 3)), [torch.ones(2, 3)])


# ---------------------------------------------------------------------------------------------
# sensitivity


def test_sensitivity_is_that_of_one_layer_in_int8():
    model, batches = _graph(), _batches()
    figures = iter(range(10))
    result = nncx.sensitivity(model, batches, metric=lambda graph: next(figures))
    x, names = torch.cat(batches), ["conv1", "conv2", "head.0", "head.2"]
    assert [row.name for row in result.layers] == names
    floats = fold_batch_norm(_graph(), batches[0])
    for row in (*result.layers, result.total):
        skip = [name for name in names if row.name not in (name, "all")]
        graph = nncx.quantize(model, batches, skip=skip)
        with torch.no_grad():
            assert row.snr_db == pytest.approx(_snr_db(floats(x), graph(x)), abs=1e-3)
    assert [row.metric for row in (*result.layers, result.total)] == [0, 1, 2, 3, 4]
    assert result.metric == 5 and result.total.weights == sum(r.weights for r in result.layers)


def test_a_printed_sensitivity_has_a_line_a_layer():
    result = nncx.sensitivity(_graph(), iter(_batches()))
    lines = str(result).splitlines()
    assert lines[0].split() == ["layer", "type", "weights", "SNR", "(dB)"]
    assert lines[2].split()[:3] == ["conv1", "Conv2d", "216"] and lines[-1].startswith("all ")
    with_metric = str(nncx.sensitivity(_graph(), _batches(), metric=lambda graph: 0.125))
    assert with_metric.endswith("metric of the float network: 0.125")


def test_a_layer_whose_output_is_exact_has_infinite_ratio():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    for layer in model:
        nn.init.zeros_(layer.bias)
        nn.init.eye_(layer.weight)
    result = nncx.sensitivity(model, [127 * torch.eye(2)], symmetric=True)
    assert result.total.snr_db == math.inf and "inf" in str(result)
