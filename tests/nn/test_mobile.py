"""Layers of factorised convolutions against torch's."""

import copy
import inspect

import pytest
import torch
import torch.nn.functional as F
from layer_families import GEOMETRIES, images
from torch import nn

import nncx
from nncx import ChannelShuffle, DepthwiseConv2d, DepthwiseSeparableConv2d, GroupedConv2d
from nncx.nn.mobile import ACTIVATIONS

DEPTHWISE = {
    name: {key: value for key, value in arguments.items() if key != "groups"}
    for name, arguments in GEOMETRIES.items()
}
every_geometry = pytest.mark.parametrize("geometry", GEOMETRIES)


def twin(layer: nn.Conv2d) -> nn.Conv2d:
    """torch's layer with the same weights."""
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation")
    given = {name: getattr(layer, name) for name in (*names, "groups", "padding_mode")}
    theirs = nn.Conv2d(**given, bias=layer.bias is not None)
    theirs.load_state_dict(layer.state_dict())
    return theirs


def grouped(**arguments) -> GroupedConv2d:
    torch.manual_seed(0)
    return GroupedConv2d(6, 9, **{"kernel_size": 3} | arguments)


def depthwise(**arguments) -> DepthwiseConv2d:
    torch.manual_seed(0)
    return DepthwiseConv2d(6, **{"kernel_size": 3} | arguments)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@every_geometry
def test_layers_compute_what_torchs_do(geometry, memory_format, training):
    x = images().contiguous(memory_format=memory_format)
    for layer in (grouped(**GEOMETRIES[geometry]), depthwise(**DEPTHWISE[geometry])):
        layer.train(training)
        y = layer(x)
        torch.testing.assert_close(y, twin(layer)(x))
        assert y.is_contiguous(memory_format=memory_format)
        torch.testing.assert_close(layer(x[0]), y[0])


@pytest.mark.parametrize("activation, function", [("relu", F.relu), ("relu6", F.relu6)])
def test_gradients_are_those_of_torch(activation, function):
    layers = [
        grouped(groups=3, padding=1, activation=activation),
        depthwise(multiplier=2, stride=2, activation=activation),
    ]
    for layer in layers:
        theirs = twin(layer)
        ours_in, theirs_in = (4 * images()).requires_grad_(), (4 * images()).requires_grad_()
        (layer(ours_in) ** 2).sum().backward()
        (function(theirs(theirs_in)) ** 2).sum().backward()
        close = {"rtol": 1e-5, "atol": 1e-4}  # of gradients of up to 100
        torch.testing.assert_close(ours_in.grad, theirs_in.grad, **close)
        for name, parameter in theirs.named_parameters():
            torch.testing.assert_close(layer.get_parameter(name).grad, parameter.grad, **close)


def test_a_shuffled_output_is_channel_shuffles_of_the_plain_one():
    layer = grouped(groups=3, shuffle=3, activation="relu").eval()
    expected = F.channel_shuffle(F.relu(twin(layer)(images())), 3)
    torch.testing.assert_close(layer(images()), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.int64])
def test_shuffle_deals_channels_out(dtype):
    x = torch.arange(6, dtype=dtype).view(1, 6, 1, 1).expand(2, 6, 3, 2)
    y = ChannelShuffle(2)(x)
    assert y.dtype == dtype and y[1, :, 2, 1].tolist() == [0, 3, 1, 4, 2, 5]


def test_shuffles_gradient_is_the_shuffle_back():
    x = images().requires_grad_()
    weight = images(6, 9, 8)
    (ChannelShuffle(3)(x) * weight).sum().backward()
    assert torch.equal(x.grad[0], F.channel_shuffle(weight[None], 2)[0])


def test_separable_convolution_is_its_two_factors():
    torch.manual_seed(0)
    layer = DepthwiseSeparableConv2d(
        6, 4, 3, 2, padding=1, depthwise_activation="relu6", activation="relu"
    )
    x = 4 * images()
    expected = F.relu(twin(layer.pointwise)(F.relu6(twin(layer.depthwise)(x))))
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer(x[1]), expected[1])
    seen = []
    layer.pointwise.register_forward_hook(lambda *call: seen.append(call[2]))
    y = layer(x)  # the halves in turn
    assert len(seen) == 1 and seen[0] is y
    layer.pointwise._forward_hooks.clear()
    assert torch.equal(layer(x), y) and len(seen) == 1
    shapes = {name: list(tensor.shape) for name, tensor in layer.state_dict().items()}
    assert shapes == {
        "depthwise.weight": [6, 1, 3, 3],
        "depthwise.bias": [6],
        "pointwise.weight": [4, 6, 1, 1],
        "pointwise.bias": [4],
    }


def test_the_signature_of_grouped_is_torchs_plus_keyword_only_extras():
    ours, theirs = (inspect.signature(c).parameters for c in (GroupedConv2d, nn.Conv2d))
    assert [*ours] == [*theirs, "shuffle", "activation"]
    assert all(ours[name].default == theirs[name].default for name in theirs)


def test_checkpoints_and_repr_are_torchs():
    layers = [
        (grouped(groups=3), ")"),
        (grouped(bias=False, shuffle=3, activation="relu6"), ", activation=relu6, shuffle=3)"),
        (depthwise(padding=1, multiplier=2), ")"),
        (depthwise(activation="relu", bias=False), ", activation=relu)"),
    ]
    for layer, end in layers:
        theirs = twin(layer)  # which loads the layer's state
        assert list(layer.state_dict()) == list(theirs.state_dict())
        assert repr(layer) == type(layer).__name__ + repr(theirs).removeprefix("Conv2d")[:-1] + end


def test_a_layer_copies_and_remembers_what_it_was_given():
    layer = copy.deepcopy(depthwise(multiplier=3, activation="relu"))
    assert (layer.channels, layer.multiplier, layer.out_channels) == (6, 3, 18)
    assert (layer(images()) >= 0).all()


def separable(**arguments) -> DepthwiseSeparableConv2d:
    torch.manual_seed(0)
    return DepthwiseSeparableConv2d(6, 4, **{"kernel_size": 3} | arguments)


def test_separable_takes_every_padding_and_autocast():
    x = images()
    for arguments in ({"padding": "same"}, {"padding": (2, 1), "padding_mode": "reflect"}):
        layer = separable(multiplier=2, **arguments)
        torch.testing.assert_close(layer(x), twin(layer.pointwise)(twin(layer.depthwise)(x)))
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert y.dtype == torch.bfloat16 and torch.equal(y, layer.pointwise(layer.depthwise(x)))


def test_report_counts_both_halves_of_a_separable_convolution():
    layers = nncx.report(nn.Sequential(separable()), images(), repeats=1).layers
    assert {row.name: row.macs for row in layers} == {
        "0.depthwise": 6 * 9 * 42,
        "0.pointwise": 4 * 6 * 42,
    }


@pytest.mark.parametrize("make", [grouped, depthwise], ids=["grouped", "depthwise"])
def test_autocast_is_torchs(make):
    layer, x = make(padding=1), images()
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = layer(x), twin(layer)(x)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("make", [grouped, depthwise], ids=["grouped", "depthwise"])
def test_float64_goes_to_torch(make):
    layer = make(padding=1).double()
    x = images(2, 6, 4, 4, dtype=torch.float64).requires_grad_()
    assert torch.equal(layer(x), twin(layer).double()(x))
    assert torch.autograd.gradcheck(layer, (x,))


def test_layers_compile_and_export():
    torch.manual_seed(0)
    model = nn.Sequential(
        GroupedConv2d(6, 8, 1, groups=2, shuffle=2, activation="relu"),
        DepthwiseConv2d(8, 3, padding=1),
        ChannelShuffle(4),
        DepthwiseSeparableConv2d(8, 4, 3),
    ).eval()
    x = images()
    expected = model(x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},), strict=False)
    torch.testing.assert_close(program.module()(images(3, 6, 9, 8)), model(images(3, 6, 9, 8)))
    graph = nncx.graph.trace(model, x)
    torch.testing.assert_close(graph(x), expected)
    assert [node.layer for node in graph.nodes] == ["0", "1", "2", "3"]


def test_report_counts_what_torchs_layers_would():
    torch.manual_seed(0)
    ours = nn.Sequential(grouped(groups=3, shuffle=3), ChannelShuffle(3), DepthwiseConv2d(9, 3))
    theirs = nn.Sequential(twin(ours[0]), nn.ChannelShuffle(3), twin(ours[2]))
    pair = [nncx.report(model, images(), repeats=1) for model in (ours, theirs)]
    assert [row.macs for row in pair[0].layers] == [9 * 2 * 9 * 42, 9 * 9 * 20]
    for mine, other in zip(pair[0].layers, pair[1].layers, strict=True):
        assert (mine.macs, mine.parameters, mine.bytes, mine.precision) == (
            other.macs,
            other.parameters,
            other.bytes,
            other.precision,
        )


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: grouped(activation="tanh"), "GroupedConv2d: activation must be .* got 'tanh'"),
        (lambda: grouped(shuffle=2), "shuffle must divide the 9 output channels, got 2"),
        (lambda: grouped(shuffle=0), "shuffle must divide the 9 output channels, got 0"),
        (lambda: grouped(groups=2), "must be divisible by groups"),
        (lambda: DepthwiseConv2d(0, 3), "DepthwiseConv2d: channels must be at least 1, got 0"),
        (lambda: depthwise(multiplier=0), "multiplier must be at least 1, got 0"),
        (lambda: ChannelShuffle(0), "ChannelShuffle: groups must be at least 1, got 0"),
        (
            lambda: DepthwiseSeparableConv2d(6, 4, 3, depthwise_activation="x"),
            f"activation must be one of {', '.join(ACTIVATIONS)}, got 'x'",
        ),
    ],
)
def test_bad_arguments(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("make", [grouped, depthwise], ids=["grouped", "depthwise"])
@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 12, 8, 8), (6, 8), (1, 2, 6, 8, 8)])
def test_forward_refuses_other_shapes(make, shape):
    with pytest.raises(RuntimeError, match=r"Conv2d: input must be \[N, 6, H, W\] or \[6, H, W\]"):
        make()(torch.zeros(shape))


def test_training_through_the_layers_reaches_the_loss_of_torchs():
    def losses(convert: bool) -> list[float]:
        torch.manual_seed(0)
        block = [nn.Conv2d(8, 8, 1, groups=2), nn.BatchNorm2d(8), nn.ReLU(), nn.ChannelShuffle(2)]
        block += [nn.Conv2d(8, 16, 3, 2, 1, groups=8), nn.BatchNorm2d(16), nn.ReLU6()]
        model = nn.Sequential(
            *(nn.Conv2d(3, 8, 1), *block, nn.Conv2d(16, 8, 1)),
            *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4)),
        )
        if convert:
            nncx.convert(model, nncx.Mobile())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        x, y = torch.randn(16, 3, 16, 16), torch.randint(4, (16,))
        found = []
        for _ in range(20):
            loss = F.cross_entropy(model.train()(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    ours, theirs = losses(True), losses(False)
    assert theirs[-1] < 0.7 * theirs[0]
    assert ours == pytest.approx(theirs, rel=1e-3)
