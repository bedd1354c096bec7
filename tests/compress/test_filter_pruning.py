"""prune_filters: the network that is left computes what the whole one does without those maps."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from graphs import TORCHVISION, torchvision_model, with_statistics
from hypothesis import given, settings
from hypothesis import strategies as st
from properties import many_examples
from pruned import check_smaller, randomized, sizes
from torch import nn
from torch.nn.utils import prune

import nncx
from nncx.compress import Scan, filter_sensitivity, prune_filters
from nncx.graph import trace
from nncx.graph._channels import _RULES
from nncx.graph._operations import OPERATIONS


def _chain():
    return nn.Sequential(
        *(nn.Conv2d(2, 7, 3, padding=1), nn.BatchNorm2d(7), nn.PReLU(7)),
        *(nn.Conv2d(7, 10, 3, bias=False), nn.BatchNorm2d(10), nn.Sigmoid(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(40, 5), nn.ReLU(), nn.Linear(5, 3)),
    )


X = torch.randn(2, 2, 6, 6, dtype=torch.float64)


def _pruned(model, x=X, amount=0.5, **arguments):
    return prune_filters(model, x, amount, **arguments)


# ---------------------------------------------------------------------------------------------
# which filters go


@pytest.mark.parametrize("criterion, order", [("L1", 1), ("L2", 2)])
def test_the_filters_of_least_norm_go(criterion, order):
    model = randomized(_chain())
    smaller = _pruned(model, amount=0.3, criterion=criterion)
    assert sizes(smaller) == {"0": 5, "3": 7, "8": 5, "10": 3}
    inputs = torch.arange(2)
    for name, count in (("0", 5), ("3", 7)):
        weight = model.get_submodule(name).weight
        norms = weight.flatten(1).abs().pow(order).sum(1)
        stay = norms.topk(count).indices.sort().values
        assert torch.equal(smaller.get_submodule(name).weight, weight[stay][:, inputs])
        inputs = stay
    check_smaller(model, smaller, X)


def test_the_removed_filters_are_silent_filters():
    """What is left, seen the other way: filters without output, bias or BatchNorm's shift."""
    model = randomized(_chain())
    model[5] = nn.ReLU()  # which keeps a 0
    smaller = _pruned(model)
    silent = copy.deepcopy(model)
    for name, norm in (("0", 1), ("3", 4)):
        gone = ~torch.isin(model.get_submodule(name).weight, smaller.get_submodule(name).weight)
        gone = gone.flatten(1).all(1)
        tensors = [silent.get_submodule(name).weight, silent[norm].bias, silent[norm].running_mean]
        for tensor in [*tensors, silent[0].bias] if name == "0" else tensors:
            tensor.data[gone] = 0
    torch.testing.assert_close(smaller(X), silent(X))


def test_greedy_does_not_count_weights_for_maps_that_are_gone():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Conv2d(2, 2, 1), nn.Conv2d(2, 1, 1)).double()
    model[0].weight.data = torch.tensor([1.0, 2.0]).double().view(2, 1, 1, 1)
    model[1].weight.data = torch.tensor([[9.0, 1.0], [0.0, 2.0]]).double().view(2, 2, 1, 1)
    x = torch.randn(1, 1, 2, 2).double()
    for scheme, left in (("independent", 1), ("greedy", 2)):
        assert _pruned(model, x, scheme=scheme).get_submodule("1").weight.tolist() == [[[[left]]]]


def test_amounts_by_name():
    model = randomized(nncx.models.VGG9(width=4, hidden=8))
    x = torch.randn(1, 3, 32, 32).double()
    amounts = {"stage1": 0.5, "stage1.0": 0.25, "stage3.3": 0.75, "fc1": 0.5}
    smaller = _pruned(model, x, amounts)
    before = sizes(model)
    changed = {name: n for name, n in sizes(smaller).items() if n != before[name]}
    assert changed == {"stage1.0": 3, "stage1.3": 2, "stage3.3": 4, "fc1": 4}
    assert smaller.fc1.in_features == 4 * 16
    check_smaller(model, smaller, x)


def test_skipped_layers_keep_all():
    skipped = _pruned(_chain().double(), skip=["0"])
    assert sizes(skipped) == {"0": 7, "3": 5, "8": 5, "10": 3}
    assert sizes(_pruned(_chain().double(), skip=lambda name, _: name == "3"))["3"] == 10


@pytest.mark.parametrize(
    "arguments, left",
    [
        ({"amount": 0.99}, (1, 1)),
        ({"amount": 0.99, "minimum": 3}, (3, 3)),
        ({"amount": 0.4, "multiple": 4}, (7, 8)),
        ({"amount": 0.5, "multiple": 4}, (4, 8)),
        ({"amount": 0}, (7, 10)),
    ],
)
def test_how_many_stay(arguments, left):
    found = sizes(_pruned(_chain().double(), **arguments))
    assert (found["0"], found["3"]) == left


@pytest.mark.parametrize("share", [0.9, 0.66, 0.3])
def test_a_share_of_the_macs_is_met_by_the_least_fraction(share):
    model = with_statistics(nncx.models.VGG9(width=16, hidden=32)).eval()
    x = torch.randn(2, 3, 32, 32)
    smaller = prune_filters(model, x, macs=share)
    before, after = (nncx.report(each, x, repeats=1).total.macs for each in (model, smaller))
    assert after <= share * before
    fraction = 1 - sizes(smaller)["stage3.3"] / 64
    one_less = prune_filters(model, x, fraction - 1 / 64)
    assert nncx.report(one_less, x, repeats=1).total.macs > share * before


def test_parameters_and_macs_by_formula():
    smaller = _pruned(_chain().double(), amount=0.5)  # 7 -> 4, 10 -> 5
    report = nncx.report(smaller, X, repeats=1)
    parameters = (4 * 18 + 4) + 8 + 4 + 5 * 36 + 10 + (5 * 20 + 5) + (15 + 3)
    assert report.total.parameters == parameters
    assert report.total.macs == 36 * 4 * 18 + 16 * 5 * 36 + 5 * 20 + 15


# ---------------------------------------------------------------------------------------------
# ties


class _Net(nn.Module):
    """A network of drawn blocks: images [N, 2, 6, 6] -> [N, 3]."""

    def __init__(self, blocks, flatten):
        super().__init__()
        channels = 4
        self.stem = nn.Conv2d(2, channels, 3, padding=1)
        self.blocks = nn.ModuleList()
        for kind, width in blocks:
            self.blocks.append(_BLOCKS[kind](channels, width))
            channels = self.blocks[-1].outputs
        self.flatten = flatten
        self.fc = nn.Linear(channels * (36 if flatten else 1), 3)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.fc(x.flatten(1) if self.flatten else x.mean((2, 3)))


class _Block(nn.Module):
    def __init__(self, inputs, width):
        super().__init__()
        self.outputs = width
        self.conv = nn.Conv2d(inputs, width, 3, padding=1)
        self.bn = nn.BatchNorm2d(width)

    def forward(self, x):
        return F.leaky_relu(self.bn(self.conv(x)))


class _Residual(_Block):
    def __init__(self, inputs, width):
        super().__init__(inputs, width)
        self.back = nn.Conv2d(width, inputs, 1, bias=False)
        self.outputs = inputs

    def forward(self, x):
        return x + self.back(super().forward(x))


class _Concat(_Residual):
    def __init__(self, inputs, width):
        super().__init__(inputs, width)
        self.outputs = 2 * inputs

    def forward(self, x):
        return torch.cat([x, self.back(self.bn(self.conv(x)))], 1)


class _Grouped(_Block):
    def __init__(self, inputs, width):
        super().__init__(inputs, width)
        self.grouped = nn.Conv2d(width, 2 * width, 3, padding=1, groups=2)
        self.depthwise = nn.Conv2d(2 * width, 4 * width, 3, padding=1, groups=2 * width)
        self.outputs = 4 * width

    def forward(self, x):
        return self.depthwise(self.grouped(super().forward(x)).relu())


class _Shuffled(_Grouped):
    def forward(self, x):
        x = self.grouped(super(_Grouped, self).forward(x))
        n, channels, height, width = x.shape
        x = x.view(n, 2, channels // 2, height, width).transpose(1, 2).reshape(x.shape)
        return self.depthwise(F.pad(x, (1, 0, 0, 0))[..., 1:])


class _Split(_Block):
    def forward(self, x):
        first, second = super().forward(x).chunk(2, 1)
        rest = second[:, 1:].mean(1, keepdim=True)  # of which nothing can go
        return torch.cat([second, F.max_pool2d(first, 3, 1, 1)], 1) * torch.sigmoid(rest)


class _Scaled(_Block):
    def __init__(self, inputs, width):
        super().__init__(inputs, width)
        self.gate = nn.Conv2d(width, width, 1)

    def forward(self, x):
        x = super().forward(x)
        return x * torch.sigmoid(self.gate(F.adaptive_max_pool2d(x, 1)))


class _Pixels(_Block):
    def __init__(self, inputs, width):
        super().__init__(inputs, 4 * width)
        self.up = nn.ConvTranspose2d(width, 2 * width, 2, stride=2, groups=2)
        self.outputs = 8 * width

    def forward(self, x):
        return F.pixel_unshuffle(
            F.max_pool2d(self.up(F.pixel_shuffle(super().forward(x), 2)), 2), 2
        )


_BLOCKS = {
    **{"plain": _Block, "residual": _Residual, "concat": _Concat, "grouped": _Grouped},
    **{"shuffled": _Shuffled, "split": _Split, "scaled": _Scaled, "pixels": _Pixels},
}


@settings(many_examples, max_examples=15)
@given(
    st.lists(st.tuples(st.sampled_from([*_BLOCKS]), st.sampled_from([4, 6])), max_size=3),
    st.booleans(),
    st.booleans(),
    st.floats(0, 0.95),
)
def test_what_is_left_computes_the_same(blocks, flatten, tied, amount):
    torch.manual_seed(0)
    model = randomized(_Net(blocks, flatten))
    check_smaller(model, _pruned(model, amount=amount, tied=tied), X)


@pytest.mark.parametrize("kind", _BLOCKS)
@pytest.mark.parametrize("tied", [False, True])
def test_each_kind_of_block_loses_filters(kind, tied):
    model = randomized(_Net([(kind, 4), (kind, 4)], True))
    smaller = _pruned(model, tied=tied)
    before, after = sizes(model), sizes(smaller)
    assert sum(after.values()) < sum(before.values())
    outputs_are_tied = kind in ("residual", "scaled")
    assert smaller.fc.in_features < model.fc.in_features or (outputs_are_tied and not tied)
    check_smaller(model, smaller, X)


def test_ends_of_residual_blocks_stay_whole_unless_tied():
    model = randomized(_Net([("residual", 6), ("residual", 6)], False))
    assert sizes(_pruned(model)) == sizes(model) | {"blocks.0.conv": 3, "blocks.1.conv": 3}
    smaller = sizes(_pruned(model, tied=True))
    assert smaller["stem"] == smaller["blocks.0.back"] == smaller["blocks.1.back"] == 2


def test_ties_go_by_the_mean_norm():
    model = randomized(_Net([("residual", 6)], False))
    smaller = _pruned(model, tied=True)
    norms = [m.weight.flatten(1).abs().sum(1) for m in (model.stem, model.blocks[0].back)]
    stay = (sum(norms) / 2).topk(2).indices.sort().values
    assert torch.equal(smaller.stem.weight, model.stem.weight[stay])


def test_a_layer_that_is_called_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(2, 4, 3, padding=1)
            self.again = nn.Conv2d(4, 4, 3, padding=1)
            self.alias = self.again
            self.last = nn.Conv2d(4, 2, 1)

        def forward(self, x):
            return self.last(self.alias(self.again(self.first(x))))

    model = randomized(Twice())
    smaller = _pruned(model, tied=True)
    assert smaller.alias is smaller.again and smaller.again.out_channels == 2
    with torch.no_grad():
        gone = ~torch.isin(model.first.weight, smaller.first.weight).flatten(1).all(1)
        for layer in (model.again, model.last):
            layer.weight[:, gone] = 0
        torch.testing.assert_close(smaller(X), model(X))


class _Sharing(nn.Module):
    """Two layers of different stride with one weight, and a norm over several channels."""

    def __init__(self):
        super().__init__()
        self.conv, self.twin = (nn.Conv2d(2, 2, 1, stride=n, bias=False) for n in (1, 2))
        self.twin.weight = self.conv.weight
        self.wide = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.free = nn.Conv2d(4, 4, 1)
        self.last = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.last(self.free(self.norm(self.wide(self.twin(self.conv(x))))))


def test_layers_that_share_a_weight_or_whose_channels_mix_stay_whole():
    smaller = _pruned(_Sharing().double())
    assert sizes(smaller) == {"conv": 2, "twin": 2, "wide": 4, "free": 2, "last": 4}
    assert smaller.twin.weight is smaller.conv.weight
    with pytest.raises(
        ValueError, match=r"'wide' must stay whole: 'norm' \(GroupNorm\) cannot lose"
    ):
        _pruned(_Sharing().double(), amount={"wide": 0.5})


def test_every_operation_of_a_graph_has_a_rule():
    assert _RULES.keys() == OPERATIONS.keys()


# ---------------------------------------------------------------------------------------------
# whole networks


NETWORKS = {
    "ResNet-8": (lambda: nncx.models.ResNet(8, width=4), 16),
    "bottleneck": (lambda: nncx.models.ResNet(11, width=4, block="bottleneck"), 16),
    "VGG9": (lambda: nncx.models.VGG9(width=4, hidden=8), 32),
    "LeNet5": (lambda: nncx.models.LeNet5(in_channels=3, image_size=20), 20),
    "NiN": (lambda: nncx.models.NiN(widths=[4] * 8), 16),
    "MobileNet": (lambda: nncx.models.MobileNet(3, 10, 0.1, True), 16),
    "ShuffleNet": (lambda: nncx.models.ShuffleNet(3, 10, 2, 0.25, True), 16),
    "ShuffleNetV2": (lambda: nncx.models.ShuffleNetV2(3, 10, 0.5, True), 16),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("tied", [False, True])
def test_networks_of_nncx(name, tied, tmp_path):
    build, size = NETWORKS[name]
    model, x = randomized(build()), torch.randn(2, 3, size, size).double()
    smaller = _pruned(model, x, tied=tied)
    assert sum(sizes(smaller).values()) < sum(sizes(model).values())
    check_smaller(model, smaller, x)
    nncx.save(smaller, tmp_path / "net")
    loaded = nncx.load(tmp_path / "net")
    with torch.no_grad():
        assert torch.equal(loaded(x), smaller(x)) and loaded.nodes == smaller.nodes


def test_a_shuffle_and_groups_that_tie_all_are_named():
    model = nncx.models.ShuffleNet(num_classes=10, groups=3, small_images=True)
    with pytest.raises(ValueError, match="got none .* and shuffles tie all its channels together"):
        prune_filters(model, torch.randn(1, 3, 8, 8), 0.5)


def test_a_maxout_network_is_refused_in_one_sentence():
    model = nncx.models.FitNet19()
    with pytest.raises(ValueError, match="trace: amax.default in .* is not an operation that a"):
        prune_filters(model, torch.randn(1, 3, 32, 32), 0.5)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "densenet121", "shufflenet_v2_x0_5"])
def test_networks_of_torchvision(name):
    assert name in TORCHVISION
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    model, shape = torchvision_model(models, name)
    model, x = randomized(model), torch.randn(1, *shape).double()
    smaller = _pruned(model, x, amount=0.25)
    assert sum(sizes(smaller).values()) < sum(sizes(model).values())
    check_smaller(model, smaller, x)


# ---------------------------------------------------------------------------------------------
# the life of the result


def test_neither_model_nor_graph_changes():
    model = randomized(_chain())
    model[0].requires_grad_(False)
    graph = trace(model, X)
    before, state = graph.nodes, copy.deepcopy(model.state_dict())
    smaller = _pruned(graph)
    assert graph.nodes == before and sizes(graph) == sizes(model)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    theirs = {id(tensor) for tensor in model.state_dict(keep_vars=True).values()}
    assert not any(id(t) in theirs for t in smaller.state_dict(keep_vars=True).values())
    assert not smaller.training and not smaller.get_submodule("0").weight.requires_grad
    assert _pruned(model.train()).training


def test_what_is_left_trains_and_becomes_int8_binary_or_ternary(tmp_path):
    model = with_statistics(nncx.models.ResNet(8, width=8))
    batches = [(torch.randn(8, 3, 16, 16), torch.randint(10, (8,))) for _ in range(3)]
    smaller = prune_filters(model, batches[0][0], 0.5)
    optimizer = torch.optim.SGD(smaller.parameters(), lr=0.01)
    before = smaller.conv.weight.detach().clone()
    history = nncx.train.fit(smaller, batches, epochs=1, optimizer=optimizer, progress=False)
    assert math.isfinite(history[0]["loss"]) and not torch.equal(smaller.conv.weight, before)
    int8 = nncx.quantize(smaller, batches)
    binary = nncx.convert(copy.deepcopy(smaller), nncx.BinaryConnect())
    ternary = nncx.convert(copy.deepcopy(smaller), nncx.TTQ())
    for compressed in (int8, binary, ternary):
        nncx.save(nncx.freeze(compressed), tmp_path / "net")
        with torch.no_grad():
            x = batches[0][0]
            assert torch.equal(nncx.load(tmp_path / "net")(x), compressed.eval()(x))


# ---------------------------------------------------------------------------------------------
# sensitivity


def test_each_layer_is_pruned_alone():
    model = randomized(_chain())

    def filters_left(graph):
        found = sizes(graph)
        return 100 * found["0"] + found["3"]

    scan = filter_sensitivity(model, X, filters_left, (0.25, 0.5))
    assert [(row.name, row.type, row.parts) for row in scan.rows] == [
        ("0", "Conv2d", 7),
        ("3", "Conv2d", 10),
    ]
    assert [row.metrics for row in scan.rows] == [(610, 410), (708, 705)] and scan.metric == 710
    lines = str(scan).splitlines()
    assert lines[0].split() == ["layer", "type", "filters", "-25%", "-50%"]
    assert lines[2].split() == ["0", "Conv2d", "7", "610", "410"]
    assert lines[-1] == "metric of the whole network: 710"
    assert scan.to_dict()["rows"][0]["metrics"] == [610, 410]
    assert isinstance(scan, Scan)


# ---------------------------------------------------------------------------------------------
# what is refused


@pytest.mark.parametrize(
    "arguments, match",
    [
        ({}, "one of amount and macs must be given, got both or none"),
        ({"amount": 0.5, "macs": 0.5}, "one of amount and macs must be given"),
        ({"amount": 1}, r"a fraction must be a number in \[0, 1\), got 1"),
        ({"amount": "half"}, r"a fraction must be a number in \[0, 1\), got 'half'"),
        ({"amount": {"0": -0.1}}, r"a fraction must be a number in \[0, 1\), got -0.1"),
        ({"amount": {"nowhere": 0.5}}, "amount names 'nowhere', which the model does not have"),
        ({"amount": {"10": 0.5}}, "'10' must stay whole: '10' is an output of the network"),
        ({"amount": 0.5, "skip": ["nowhere"]}, "skip names 'nowhere'"),
        ({"amount": 0.5, "skip": ["0", "3"]}, "must have a convolution that may lose filters"),
        ({"amount": 0.5, "criterion": "L3"}, "criterion must be one of L1, L2, got 'L3'"),
        ({"amount": 0.5, "scheme": "x"}, "scheme must be one of independent, greedy, got 'x'"),
        ({"amount": 0.5, "minimum": 0}, "minimum must be an integer of at least 1, got 0"),
        ({"amount": 0.5, "multiple": 1.5}, "multiple must be an integer of at least 1, got 1.5"),
        ({"macs": 0.0001}, "macs must be at least 0.0"),
    ],
)
def test_bad_arguments(arguments, match):
    with pytest.raises(ValueError, match=f"^prune_filters: .*{match}") as caught:
        prune_filters(_chain().double(), X, **arguments)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_bad_models():
    with pytest.raises(ValueError, match="got none .'0': '0' is an output of the network"):
        _pruned(nn.Sequential(nn.Conv2d(2, 2, 1)).double())
    with pytest.raises(ValueError, match="got none .no convolution at all"):
        _pruned(nn.Sequential(nn.ReLU()))
    with pytest.raises(TypeError, match="trace: example must be a tensor"):
        _pruned(trace(_chain().double(), X), None)
    model = _chain().double()
    prune.identity(model[0], "weight")
    with pytest.raises(ValueError, match="prune_filters: '0' must be a plain layer"):
        _pruned(model)


def test_a_tied_layer_that_is_named_is_refused_with_what_it_is_tied_to():
    model = randomized(_Net([("residual", 6)], False))
    with pytest.raises(
        ValueError, match="'stem' must stay whole: 'stem', 'blocks.0.back' are tied; pass tied=True"
    ):
        _pruned(model, amount={"stem": 0.5})
    with pytest.raises(ValueError, match=r"must lose the same fraction, being tied, got \[0.5, 0"):
        _pruned(model, amount={"stem": 0.25, "blocks.0.back": 0.5}, tied=True)


class _Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(2, 8, 1))
        self.longer = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU())
        self.head = nn.Sequential(nn.Conv2d(8, 3, 1))

    def forward(self, x):
        x = self.a(x)
        return self.head(x + self.longer(x))


def test_blocks_whose_layers_are_tied_must_agree():
    """Whichever has the longer name."""
    model, amounts = randomized(_Tied()), {"a": 0.25, "longer": 0.25}
    assert sizes(_pruned(model, amount=amounts, tied=True))["a.0"] == 6
    with pytest.raises(ValueError, match=r"'a', 'longer' must lose the same .* got \[0.25, 0.5\]"):
        _pruned(model, amount={"a": 0.25, "longer": 0.5}, tied=True)


@pytest.mark.parametrize("name", ["a", "head"])
def test_a_name_that_would_change_nothing_is_refused(name):
    with pytest.raises(ValueError, match=f"amount names '{name}', where no convolution may lose"):
        _pruned(randomized(_Tied()), amount={name: 0.5})
