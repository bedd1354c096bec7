"""Mobile: which layers it swaps, what they take in, and that nothing else changes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from graphs import with_statistics
from torch import nn

import nncx
from nncx import (
    ChannelShuffle,
    DepthwiseConv2d,
    DepthwiseSeparableConv2d,
    GroupedConv2d,
    Mobile,
    convert,
)
from nncx.models import MobileNet, ShuffleNet, ShuffleNetV2

NETWORKS = {
    "mobilenet": lambda: MobileNet(num_classes=5, width=0.25),
    "mobilenet for small images": lambda: MobileNet(1, 5, width=0.25, small_images=True),
    "shufflenet": lambda: ShuffleNet(num_classes=5, groups=3, width=0.25),
    "shufflenet, 1 group": lambda: ShuffleNet(num_classes=5, groups=1, width=0.25),
    "shufflenet v2": lambda: ShuffleNetV2(num_classes=5, width=0.5),
}


SEPARABLE_LAYERS = {
    "mobilenet": 13,
    "mobilenet for small images": 13,
    "shufflenet": 0,
    "shufflenet, 1 group": 16,
    "shufflenet v2": 19,
}


def images(model: nn.Module, size: int = 40) -> torch.Tensor:
    channels = getattr(model, "in_channels", 3)
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(1))


def kinds(model: nn.Module) -> list[type[nn.Module]]:
    return [type(module) for module in model.modules()]


def assert_same(model: nn.Module, converted: nn.Module, x: torch.Tensor) -> None:
    """Equal to 1e-4 of the largest output."""
    with torch.no_grad():
        expected, found = model(x), converted(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_networks_compute_the_same_with_everything_folded(network, memory_format):
    torch.manual_seed(0)
    model = with_statistics(NETWORKS[network]()).eval()
    x = images(model).contiguous(memory_format=memory_format)
    converted = convert(copy.deepcopy(model), Mobile())
    assert_same(model, converted, x)
    found = kinds(converted)
    assert nn.BatchNorm2d not in found and nn.ChannelShuffle not in found
    assert found.count(nn.Conv2d) == 1 and not converted.training
    assert found.count(DepthwiseSeparableConv2d) == SEPARABLE_LAYERS[network]


@pytest.mark.parametrize(
    "name",
    ["mobilenet_v2", "mobilenet_v3_small", "shufflenet_v2_x0_5", "shufflenet_v2_x1_0", "resnet18"],
)
def test_torchvisions_networks_compute_the_same(name):
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    model = with_statistics(torchvision.models.get_model(name, weights=None, num_classes=5)).eval()
    converted = convert(copy.deepcopy(model), Mobile())
    assert_same(model, converted, images(model, 64))
    assert nn.BatchNorm2d not in kinds(converted)


@pytest.mark.parametrize("network", NETWORKS)
def test_in_training_mode_nothing_is_folded_and_parameters_are_the_same(network):
    torch.manual_seed(0)
    model = NETWORKS[network]()
    before = dict(model.named_parameters())
    state = list(model.state_dict())
    expected = kinds(model)
    convert(model, Mobile())
    assert {name: id(p) for name, p in model.named_parameters()} == {
        name: id(p) for name, p in before.items()
    }
    assert list(model.state_dict()) == state
    found = kinds(model)
    assert found.count(nn.BatchNorm2d) == expected.count(nn.BatchNorm2d) > 0
    assert found.count(nn.ReLU) == expected.count(nn.ReLU) > 0
    assert found.count(DepthwiseConv2d) > 9 and model.training


def block(*layers: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return with_statistics(nn.Sequential(*layers)).eval()


def depthwise(channels: int = 4) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)


def pointwise(groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(4, 4, 1, groups=groups, bias=False)


NORM, RELU, RELU6, SHUFFLE = nn.BatchNorm2d, nn.ReLU, nn.ReLU6, nn.ChannelShuffle
SEPARABLE = [DepthwiseSeparableConv2d, DepthwiseConv2d, GroupedConv2d]


@pytest.mark.parametrize(
    "layers, left",
    [
        ((depthwise, lambda: NORM(4), RELU), [DepthwiseConv2d]),
        ((depthwise, lambda: NORM(4), RELU6), [DepthwiseConv2d]),
        ((depthwise, RELU6), [DepthwiseConv2d]),
        ((depthwise, RELU, lambda: NORM(4)), [DepthwiseConv2d, NORM]),
        ((depthwise, lambda: NORM(4), lambda: NORM(4)), [DepthwiseConv2d, NORM]),
        ((depthwise, RELU, RELU6), [DepthwiseConv2d, RELU6]),
        ((depthwise, lambda: SHUFFLE(2)), [DepthwiseConv2d, ChannelShuffle]),
        ((depthwise, lambda: NORM(4, affine=False)), [DepthwiseConv2d]),
        ((depthwise, lambda: NORM(4, track_running_stats=False)), [DepthwiseConv2d, NORM]),
        ((depthwise, nn.Tanh), [DepthwiseConv2d, nn.Tanh]),
        ((pointwise, lambda: NORM(4), RELU, lambda: SHUFFLE(2)), [GroupedConv2d]),
        ((pointwise, lambda: SHUFFLE(2)), [GroupedConv2d]),
        ((pointwise, lambda: SHUFFLE(2), lambda: SHUFFLE(4)), [GroupedConv2d, ChannelShuffle]),
        ((pointwise, lambda: SHUFFLE(2), RELU), [GroupedConv2d, RELU]),
        ((pointwise, lambda: SHUFFLE(2), lambda: NORM(4)), [GroupedConv2d, NORM]),
        ((lambda: nn.Conv2d(4, 4, 3), lambda: NORM(4), RELU), [nn.Conv2d, RELU]),
        ((RELU, lambda: pointwise(2)), [RELU, GroupedConv2d]),
        ((depthwise, pointwise), SEPARABLE),
        ((depthwise, lambda: NORM(4), RELU6, pointwise, lambda: NORM(4), RELU), SEPARABLE),
        ((lambda: nn.Conv2d(4, 8, 3, groups=4), lambda: nn.Conv2d(8, 5, 1, bias=False)), SEPARABLE),
        ((depthwise, RELU, pointwise, lambda: NORM(4)), SEPARABLE),
        ((depthwise, pointwise, lambda: SHUFFLE(2)), [*SEPARABLE, ChannelShuffle]),
        ((depthwise, pointwise, RELU, pointwise, RELU), [*SEPARABLE, GroupedConv2d]),
        ((depthwise, lambda: pointwise(2)), [DepthwiseConv2d, GroupedConv2d]),
        ((depthwise, lambda: nn.Conv2d(4, 4, 1, 2)), [DepthwiseConv2d, GroupedConv2d]),
        ((depthwise, lambda: nn.Conv2d(4, 4, 1, padding=1)), [DepthwiseConv2d, GroupedConv2d]),
    ],
)
def test_what_a_layer_takes_in(layers, left):
    model = block(*(make() for make in layers))
    converted = convert(copy.deepcopy(model), Mobile())
    assert [kind for kind in kinds(converted)[1:] if kind is not nn.Identity] == left
    assert_same(model, converted, 4 * torch.randn(2, 4, 6, 5))


class Branches(nn.Module):
    """What is read twice, called twice, or read by forward itself cannot be folded."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.relu = depthwise(), nn.BatchNorm2d(4), nn.ReLU()
        self.twice, self.norm = pointwise(), nn.BatchNorm2d(4)
        self.read, self.last = pointwise(2), nn.BatchNorm2d(4)

    def forward(self, x):
        x = self.conv(x)
        x = x + self.bn(x)
        x = self.norm(self.twice(self.relu(self.twice(self.relu(x)))))
        return self.last(self.read(x)) * self.last.weight.sum()


def test_what_others_read_stays():
    torch.manual_seed(0)
    model = with_statistics(Branches()).eval()
    converted = convert(copy.deepcopy(model), Mobile())
    assert nn.Identity not in kinds(converted)
    assert kinds(converted).count(GroupedConv2d) == 2
    assert_same(model, converted, images(nn.Conv2d(4, 1, 1), 6))


def test_the_output_of_the_model_is_read():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.relu = depthwise(), nn.ReLU()

        def forward(self, x):
            y = self.conv(x)
            return y, self.relu(y)

    model = Net().eval()
    x = torch.randn(1, 4, 5, 5)
    expected = model(x)
    for found, want in zip(convert(model, Mobile())(x), expected, strict=True):
        torch.testing.assert_close(found, want)


def test_parts_in_training_mode_stay():
    model = block(depthwise(), nn.BatchNorm2d(4), nn.ReLU())
    model[1].train()
    assert kinds(convert(model, Mobile()))[1:] == [DepthwiseConv2d, nn.BatchNorm2d, nn.ReLU]


def test_skipped_layers_and_norms_stay():
    model = block(depthwise(), nn.BatchNorm2d(4), pointwise(), nn.BatchNorm2d(4))
    convert(model, Mobile(), skip=["0", "3"])
    assert kinds(model)[1:] == [nn.Conv2d, nn.BatchNorm2d, GroupedConv2d, nn.BatchNorm2d]


def test_a_model_that_cannot_be_traced_converts_without_folding():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = depthwise(), nn.BatchNorm2d(4)

        def forward(self, x):
            return self.bn(self.conv(x)) if x.sum() > 0 else x

    model = Net().eval()
    with pytest.raises(ValueError, match="pass rewire=False"):
        convert(model, Mobile())
    assert type(model.conv) is nn.Conv2d
    convert(model, Mobile(), rewire=False)
    assert type(model.conv) is DepthwiseConv2d and type(model.bn) is nn.BatchNorm2d
    assert type(convert(Net().train(), Mobile()).conv) is DepthwiseConv2d


def test_hooks_on_what_would_be_folded_are_refused():
    model = block(depthwise(), nn.BatchNorm2d(4))
    model[1].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="'1' must be a plain layer, got one with hooks"):
        convert(model, Mobile())
    assert kinds(model)[1:] == [nn.Conv2d, nn.BatchNorm2d]


def test_nothing_to_convert():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"has no layer for Mobile\(\) that is not skipped"):
        convert(model, Mobile())


@pytest.mark.parametrize(
    "layer, kind",
    [
        (nn.Conv2d(4, 8, 3, groups=4), DepthwiseConv2d),
        (nn.Conv2d(4, 8, 3, groups=2), GroupedConv2d),
        (nn.Conv2d(4, 8, (1, 1), 2), GroupedConv2d),
        (nn.Conv2d(1, 8, 1), GroupedConv2d),
        (
            nn.Conv2d(4, 4, (4, 3), padding="same", groups=4, padding_mode="reflect"),
            DepthwiseConv2d,
        ),
    ],
)
def test_geometry_is_kept(layer, kind):
    x = torch.randn(2, layer.in_channels, 7, 6)
    model = convert(nn.Sequential(layer), Mobile())
    assert type(model[0]) is kind and model[0].weight is layer.weight
    torch.testing.assert_close(model[0](x), layer(x))


def test_a_folded_network_is_stored_and_loaded(tmp_path):
    torch.manual_seed(0)
    model = convert(with_statistics(NETWORKS["shufflenet"]()).eval(), Mobile())
    nncx.save(model, tmp_path / "net.safetensors")
    loaded = nncx.load(tmp_path / "net.safetensors")
    x = images(model)
    assert repr(loaded) == repr(model)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))


class Foreign(nn.Module):
    def __init__(self, channels: int = 4, bias: bool = False):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, channels, 3, bias=bias), nn.BatchNorm2d(channels))
        self.body = nn.Sequential(depthwise(channels), nn.BatchNorm2d(channels), nn.ReLU6())
        self.mix = nn.Sequential(nn.Conv2d(channels, 4, 1), nn.ChannelShuffle(2), nn.Tanh())

    def forward(self, x):
        return self.mix(self.body(self.stem(x)))


@pytest.mark.filterwarnings("ignore:nncx.save. load will not do without into=")
@pytest.mark.parametrize("training", [True, False])
def test_a_network_of_another_class_is_filled_into_a_new_one(training, tmp_path):
    torch.manual_seed(0)
    model = convert(with_statistics(Foreign()).train(training), Mobile()).eval()
    nncx.save(model, tmp_path / "net.safetensors")
    loaded = nncx.load(tmp_path / "net.safetensors", into=Foreign())
    x = images(model, 8)
    assert repr(loaded) == repr(model) and torch.equal(loaded(x), model(x))
    others = [Foreign(channels=6), Foreign(bias=True)] if training else [Foreign(channels=6)]
    for other in others:
        with pytest.raises(ValueError, match="in the file and .* in into="):
            nncx.load(tmp_path / "net.safetensors", into=other)


def test_the_graph_of_a_network_of_another_class_needs_no_class(tmp_path):
    torch.manual_seed(0)
    model = convert(with_statistics(Foreign()).eval(), Mobile())
    x = images(model, 8)
    nncx.save(nncx.graph.trace(model, x), tmp_path / "net.safetensors")
    torch.testing.assert_close(nncx.load(tmp_path / "net.safetensors")(x), model(x))


def test_macs_and_weights_of_a_converted_network_are_those_of_the_original():
    model = NETWORKS["shufflenet"]().eval()
    x = images(model)
    before = nncx.report(model, x, repeats=1)
    after = nncx.report(convert(model, Mobile()), x, repeats=1)
    assert after.total.macs == before.total.macs
    assert after.total.parameters < before.total.parameters  # a bias for a weight and a bias


def test_networks_learn_from_a_teacher():
    torch.manual_seed(0)
    teacher = MobileNet(1, 3, width=0.25, small_images=True)
    student = convert(ShuffleNetV2(1, 3, width=0.5, small_images=True), Mobile())
    x = torch.randn(4, 1, 16, 16)
    loss = F.mse_loss(student(x), teacher.eval()(x).detach())
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())
