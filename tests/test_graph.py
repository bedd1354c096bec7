"""Graphs: the same values as the model's, through tracing, editing, files, compile and export."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from graphs import (
    MODELS,
    TORCHVISION,
    Everything,
    TwoInputs,
    torchvision_model,
    with_statistics,
)
from torch import nn

import nncx
from nncx.graph import Graph, Node, trace
from nncx.graph._operations import OPERATIONS
from nncx.nn import PackedLayer

BATCHES = (1, 3)


def _model(name):
    build, shape = MODELS[name]
    return with_statistics(build()).eval(), shape


def _check_same(graph, model, shape):
    for batch in BATCHES:
        x = torch.randn(batch, *shape)
        with torch.no_grad():
            assert torch.equal(graph(x), model(x))


def _relu_graph(**changes):
    given = {"operation": "relu", "inputs": ("x",), "arguments": {}} | changes
    return Graph([("y", *given.values())], ["x"], ["y"])


# ---------------------------------------------------------------------------------------------
# tracing


def test_tracing_shows_no_warning_of_torch(recwarn):
    trace(nn.Sequential(nn.Linear(2, 3)), torch.randn(2, 2))
    assert not recwarn.list


@pytest.mark.parametrize("name", MODELS)
def test_a_graph_computes_what_the_model_does_through_a_file(name, tmp_path):
    model, shape = _model(name)
    graph = trace(model, torch.randn(1, *shape))
    _check_same(graph, model, shape)
    nncx.save(graph, tmp_path / "graph")
    loaded = nncx.load(tmp_path / "graph")
    assert loaded.nodes == graph.nodes and str(loaded) == str(graph)
    _check_same(loaded, model, shape)


@pytest.mark.parametrize("name", TORCHVISION)
def test_networks_of_torchvision(name, tmp_path):
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    model, shape = torchvision_model(models, name)
    graph = trace(model, torch.randn(1, *shape))
    _check_same(graph, model, shape)
    nncx.save(graph, tmp_path / "graph")
    _check_same(nncx.load(tmp_path / "graph"), model, shape)


def test_layers_are_the_models_under_their_names():
    model, shape = _model("ResNet")
    graph = trace(model, torch.randn(2, *shape))
    assert graph.state_dict().keys() == model.state_dict().keys()
    modules = dict(model.named_modules())
    assert graph.named_layers() and all(
        modules[path] is layer for path, layer in graph.named_layers().items()
    )


def test_functions_of_parameters_become_layers_that_hold_them():
    model = Everything().eval()
    graph = trace(model, torch.randn(2, 3, 8, 8))
    assert type(graph.padded) is nn.Conv2d and graph.padded.weight is model.padded.weight
    assert graph.linear.weight is model.mixing and graph.linear.bias is None
    assert len(graph.calls("linear")) == 2
    assert graph.alias is graph.conv and "unused.weight" not in graph.state_dict()


class _BorrowsLater(nn.Module):
    """Takes the weight of a layer that it calls afterwards, in another way."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1, bias=False)

    def forward(self, x):
        return self.conv(F.conv2d(x, self.conv.weight, stride=2))


def test_a_function_of_a_layers_weight_does_not_take_the_place_of_the_layer():
    model = _BorrowsLater().eval()
    graph = trace(model, torch.randn(2, 3, 9, 9))
    assert graph.conv is model.conv
    _check_same(graph, model, (3, 9, 9))


def test_the_model_stays_as_it_was():
    model = with_statistics(Everything()).train()
    model.bn.eval()
    state, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    graph = trace(model, torch.randn(2, 3, 8, 8))
    assert [m.training for m in model.modules()] == modes and graph.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_several_inputs_and_outputs(tmp_path):
    model = TwoInputs()
    graph = trace(model, (torch.randn(1, 3), torch.randn(1, 5)))
    nncx.save(graph, tmp_path / "graph")
    inputs = torch.randn(4, 3), torch.randn(4, 5)
    for got in (graph(*inputs), nncx.load(tmp_path / "graph")(*inputs)):
        assert isinstance(got, tuple)
        assert all(map(torch.equal, got, model(*inputs)))
    with pytest.raises(TypeError, match=r"Graph: inputs must be 2 \(a, b\), got 1"):
        graph(inputs[0])


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.mean((1, 2, 3)).view(-1, 1),
        lambda x: x.view(x.shape[0] * 3, -1),
        lambda x: x.transpose(0, 1).flatten(1),
        lambda x: x.permute(1, 2, 3, 0).reshape(48, -1),
        lambda x: x.flatten(),
        lambda x: x.unflatten(2, (2, 2)).squeeze(1).unsqueeze(-1),
        lambda x: x.split([1, 2], 1)[1],
        lambda x: F.adaptive_max_pool2d(x, 1).squeeze((2, 3)),
    ],
)
def test_shapes_with_the_batch_anywhere(function):
    class Reshaping(nn.Module):
        def forward(self, x):
            return function(x)

    graph = trace(Reshaping(), torch.randn(1, 3, 4, 4))
    for batch in (1, 2, 5):
        x = torch.randn(batch, 3, 4, 4)
        assert torch.equal(graph(x), function(x))


def test_an_operation_in_place_changes_what_reads_its_input_later():
    class InPlace(nn.Module):
        def forward(self, x):
            y = x * 2
            F.relu(y, inplace=True)
            return y + x

    model, x = InPlace(), torch.randn(3, 4)
    assert torch.equal(trace(model, x)(x), model(x))


def test_an_operation_in_place_on_a_view_is_refused():
    class OnView(nn.Module):
        def forward(self, x):
            y = x * 2
            F.relu(y[:, ::2], inplace=True)
            return y

    with pytest.raises(ValueError, match="trace: slice_scatter.default in OnView is not an"):
        trace(OnView(), torch.randn(2, 4))


def _int8(model):
    model = nncx.convert(model, nncx.Int8()).train()
    model(torch.randn(4, 3, 16, 16))
    return model


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    "convert, count",
    [
        (lambda model: nncx.convert(model, nncx.XNOR()), 6),
        (lambda model: nncx.convert(model, nncx.BinaryConnect()), 8),
        (lambda model: nncx.convert(model, nncx.Half(torch.bfloat16)), 8),
        (_int8, 8),
    ],
    ids=["XNOR", "BinaryConnect", "Half", "Int8"],
)
def test_native_layers_are_one_node_each(convert, count, frozen, tmp_path):
    model = convert(_model("ResNet")[0])
    model = nncx.freeze(model) if frozen else model.eval()
    graph = trace(model, torch.randn(2, 3, 16, 16))
    layers = graph.named_layers().values()
    assert sum(isinstance(layer, PackedLayer) for layer in layers) == count
    nncx.save(graph, tmp_path / "graph")
    _check_same(graph, model, (3, 16, 16))
    _check_same(nncx.load(tmp_path / "graph"), model, (3, 16, 16))


def test_a_graph_freezes_converts_and_is_reported():
    graph = trace(_model("VGG9")[0], torch.randn(2, 3, 32, 32))
    before = nncx.report(graph, torch.randn(2, 3, 32, 32), repeats=1)
    frozen = nncx.freeze(nncx.convert(graph, nncx.BinaryConnect()))
    report = nncx.report(frozen, torch.randn(2, 3, 32, 32), before, repeats=1)
    assert report.total.type == "Graph" and report.macs.keys() == {"binary weights"}
    assert report.total.macs == before.total.macs > 0 and report.ratios["bytes"] > 4
    assert all(row.latency_ms is not None for row in report.layers)


# ---------------------------------------------------------------------------------------------
# a graph is a module


@pytest.mark.parametrize("through", ["deepcopy", "pickle", "compile", "export", "trace"])
def test_a_graph_goes_through(through):
    model, shape = _model("everything")
    graph, x = trace(model, torch.randn(1, *shape)), torch.randn(3, *shape)
    with torch.no_grad():
        if through == "deepcopy":
            other = copy.deepcopy(graph)
        elif through == "pickle":
            other = pickle.loads(pickle.dumps(graph))
        elif through == "compile":
            other = torch.compile(graph, fullgraph=True, backend="eager")
        elif through == "export":
            dynamic = ({0: torch.export.Dim("batch")},)
            other = torch.export.export(graph, (x,), dynamic_shapes=(dynamic,)).module()
            x = torch.randn(5, *shape)
        else:
            other = trace(graph, x[:1])
        assert torch.equal(other(x), model(x))


def test_gradients_are_those_of_the_model():
    model = with_statistics(nncx.models.ResNet(8, width=4)).train()
    graph, x = trace(copy.deepcopy(model), torch.randn(1, 3, 16, 16)), torch.randn(4, 3, 16, 16)
    for module in (model, graph):
        module(x).square().sum().backward()
    theirs = dict(model.named_parameters())
    for name, parameter in graph.named_parameters():
        assert torch.equal(parameter.grad, theirs[name].grad), name
    assert torch.equal(graph.bn.running_mean, model.bn.running_mean)


def test_values_are_freed_after_their_last_use():
    graph = trace(_model("NiN")[0], torch.randn(1, 3, 32, 32))
    alive, peak = {graph.input_names[0]}, 0
    for node in graph.nodes:
        alive.add(node.name)
        peak = max(peak, len(alive))
        alive -= set(graph._last_read[node.name])
    assert peak == 2 and alive == set(graph.output_names)


def test_a_printed_graph_has_a_line_a_node():
    lines = str(trace(_model("ResNet")[0], torch.randn(1, 3, 16, 16))).splitlines()
    assert lines[0].split() == ["node", "operation", "inputs"]
    assert lines[2].split()[:2] == ["conv", "Conv2d(3,"] and lines[-1] == "x -> fc"
    assert all(len(line) <= 100 for line in lines)


# ---------------------------------------------------------------------------------------------
# data flow and editing


def _chain():
    """x -> a -> b -> (c, d) -> e."""
    nodes = [
        Node("a", "layer", ("x",), {"path": "block.0"}),
        Node("b", "relu", ("a",), {}),
        Node("c", "layer", ("b",), {"path": "block.1"}),
        Node("d", "mul", ("b",), {"other": 2.0}),
        Node("e", "add", ("c", "d"), {}),
    ]
    graph = Graph(nodes, ["x"], ["e"])
    for path in ("block.0", "block.1"):
        graph.put_layer(path, nn.Linear(3, 3))
    return graph


def test_readers_and_producers():
    graph = _chain()
    assert [node.name for node in graph.readers("b")] == ["c", "d"]
    assert graph.node("b").inputs == ("a",) and graph.readers("e") == []
    assert graph.is_only_read_by("a", graph.node("b"))
    assert not graph.is_only_read_by("b", graph.node("c"))
    with pytest.raises(KeyError):
        graph.node("x")


def test_what_is_an_output_has_a_reader_outside():
    graph = Graph([("a", "relu", ["x"], {}), ("b", "tanh", ["a"], {})], ["x"], ["a", "b"])
    assert not graph.is_only_read_by("a", graph.node("b"))


def test_remove():
    graph, x = _chain(), torch.randn(2, 3)
    graph.remove("b")
    first, second = graph.block._modules.values()
    assert torch.equal(graph(x), second(first(x)) + 2 * first(x))
    graph.remove("c")
    assert list(graph.state_dict()) == ["block.0.weight", "block.0.bias"]
    graph.remove("a")
    assert not graph._modules and torch.equal(graph(x), x + 2 * x)
    with pytest.raises(ValueError, match="a node to remove must have one input, got 'e' with 2"):
        graph.remove("e")


def test_insert():
    graph, x = _chain(), torch.randn(2, 3)
    wanted = graph(x.relu()).tanh()
    graph.insert(Node("first", "relu", ("x",), {}), after="x")
    graph.insert(Node("last", "tanh", ("e",), {}), after="e")
    assert torch.equal(graph(x), wanted) and graph.output_names == ("last",)
    before = graph.nodes
    with pytest.raises(ValueError, match="got 'late'"):
        graph.insert(Node("bad", "relu", ("late",), {}), after="a")
    with pytest.raises(ValueError, match="a node must be inserted after another, got 'nowhere'"):
        graph.insert(Node("bad", "relu", ("x",), {}), after="nowhere")
    assert graph.nodes == before and torch.equal(graph(x), wanted)


def test_put_layer_refuses_a_place_that_is_taken():
    graph = _chain()
    with pytest.raises(ValueError, match="'block.0.more' must not lie in another layer"):
        graph.put_layer("block.0.more", nn.Linear(3, 3))
    with pytest.raises(ValueError, match="'block' must not be what other layers lie in"):
        graph.put_layer("block", nn.Linear(3, 3))
    with pytest.raises(ValueError, match="'nodes' must not have the name of something"):
        graph.put_layer("nodes", nn.Linear(3, 3))


# ---------------------------------------------------------------------------------------------
# what is refused


class _Call(nn.Module):
    """A model of one function."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.conv = nn.Conv2d(3, 3, 1)
        self.register_buffer("count", torch.zeros(3, 3))

    def forward(self, x):
        return self.function(self, self.conv(x))


@pytest.mark.parametrize(
    "function, match",
    [
        (lambda m, x: x.sort()[0], "trace: sort.default in _Call is not an operation that a graph"),
        (lambda m, x: x + m.count[0, 0], "must read what the network computes, got a parameter, a"),
        (lambda m, x: F.linear(x, m.count), "linear in _Call must be of an input and of parameter"),
        (lambda m, x: x + F.linear(m.count, m.conv.bias), "linear in _Call must be of an input"),
        (lambda m, x: m.count.add_(1)[0, 0] + x, "forward must not change buffers or inputs"),
        (lambda m, x: {"logits": x}, "forward must return a tensor or a tuple of tensors"),
        (lambda m, x: (x, 3), "forward must return a tensor or a tuple of tensors"),
        (lambda m, x: (x, (x, x)), "forward must return a tensor or a tuple of tensors"),
        (lambda m, x: x.relu() if x.sum() > 0 else x, "torch.export must be able to trace _Call"),
        (lambda m, x: x.view(2, -1), "torch.export must be able to trace _Call for any batch size"),
        (lambda m, x: x * x.shape[0], "other of mul.Tensor in _Call must be a constant"),
        (lambda m, x: x.mean((2, 3), dtype=torch.float64), "dtype of mean.dim"),
    ],
)
def test_a_model_that_no_graph_can_be_is_refused_in_one_sentence(function, match):
    with pytest.raises(ValueError, match=match) as caught:
        trace(_Call(function).eval(), torch.randn(2, 3, 4, 3))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_bad_arguments_of_trace():
    with pytest.raises(ValueError, match="trace: the model must contain its layers, got a bare"):
        trace(nn.Linear(3, 3), torch.randn(1, 3))
    with pytest.raises(TypeError, match="trace: model must be an nn.Module, got type"):
        trace(Everything, torch.randn(1, 3))
    with pytest.raises(TypeError, match="trace: example must be a tensor or a tuple of tensors"):
        trace(Everything(), [torch.randn(1, 3)])
    for shape in ((), (0, 3, 8, 8)):
        with pytest.raises(ValueError, match="trace: example must be a batch of at least one"):
            trace(Everything(), torch.randn(shape))


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"operation": "system"}, "must be one that this nncx knows, got 'system'; upgrade nncx"),
        ({"operation": ["relu"]}, "must be one that this nncx knows"),
        ({"inputs": ()}, "cannot have 0 inputs"),
        ({"inputs": ("x", "x")}, "cannot have 2 inputs"),
        ({"inputs": ("y",)}, "must read what was made before it, got 'y'"),
        ({"arguments": []}, "has no arguments by name"),
        ({"arguments": {"inplace": True}}, "cannot have inplace=True"),
        ({"operation": "add"}, "lacks other"),
        ({"operation": "add", "arguments": {"other": "1"}}, "cannot have other=1"),
        ({"operation": "add", "arguments": {"other": True}}, "cannot have other=True"),
        ({"operation": "mean", "arguments": {"dim": 1}}, "cannot have dim=1"),
        ({"operation": "mean", "arguments": {"dim": [9]}}, r"cannot have dim=\[9\]"),
        ({"operation": "mean", "arguments": {"dim": [1], "dtype": 7}}, "cannot have dtype=7"),
        ({"operation": "max_pool2d", "arguments": {"kernel_size": [0, 1]}}, "cannot have kernel"),
        ({"operation": "pad", "arguments": {"pad": [10**9, 0]}}, "cannot have pad"),
        ({"operation": "pad", "arguments": {"pad": [1], "mode": "x"}}, "cannot have mode=x"),
        ({"operation": "pad", "arguments": {"pad": [1] * 5000}}, "cannot have pad"),
        ({"operation": "reshape", "arguments": {"shape": [2**40]}}, "cannot have shape"),
        ({"operation": "softmax", "arguments": {"dim": 1.0}}, "cannot have dim=1.0"),
        ({"operation": "chunk", "arguments": {"chunks": 2}}, "outputs must be tensors"),
        ({"operation": "getitem", "arguments": {"index": 0}}, "lists are for getitem"),
        ({"operation": "layer"}, "must have an input and the path of a layer"),
        ({"operation": "layer", "arguments": {"path": ""}}, "must have an input and the path"),
        ({"operation": "layer", "arguments": 3}, "must have an input and the path of a layer"),
    ],
)
def test_nodes_that_are_not_sound_are_refused(changes, match):
    with pytest.raises(ValueError, match=match):
        _relu_graph(**changes)


@pytest.mark.parametrize(
    "nodes, inputs, outputs, match",
    [
        ([("x", "relu", ["x"], {})], ["x"], ["x"], "names must differ, got 'x' twice"),
        ([], ["x", "x"], ["x"], "inputs and outputs must have names, inputs different ones"),
        ([], [], ["x"], "inputs and outputs must have names"),
        ([], ["x"], [], "inputs and outputs must have names"),
        ([], ["x"], ["y"], "outputs must be tensors that it makes, got 'y'"),
        ([("", "relu", ["x"], {})], ["x"], [""], "names must be short strings"),
        ([("y", "relu", ["x"], {})], ["x" * 501], ["y"], "names must be short strings"),
        ([(f"{i}", "relu", ["x"], {}) for i in range(20_001)], ["x"], ["0"], "at most 20000"),
    ],
)
def test_graphs_that_are_not_sound_are_refused(nodes, inputs, outputs, match):
    with pytest.raises(ValueError, match=match):
        Graph(nodes, inputs, outputs)


def test_a_file_whose_graph_calls_a_missing_layer_is_refused(tmp_path):
    graph = _chain()
    for path in ("block.1", "block"):
        nodes = [
            node._replace(arguments={"path": path}) if node.name == "c" else node
            for node in graph.nodes
        ]
        other = Graph(nodes, ["x"], ["e"])
        other.put_layer("block.0", nn.Linear(3, 3))
        nncx.save(other, tmp_path / "graph")
        with pytest.raises(ValueError, match=f"its graph calls a layer '{path}', which it does"):
            nncx.load(tmp_path / "graph")


def test_no_listed_operation_names_code_or_a_device():
    for name, operation in OPERATIONS.items():
        kinds = set(operation.arguments.values())
        assert operation.tensors and not kinds & {"Device", "Layout", "Generator"}, name
        assert "dtype" not in operation.arguments and "generator" not in operation.arguments
