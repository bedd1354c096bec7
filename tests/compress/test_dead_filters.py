"""remove_dead_filters: less network, the same function."""

import copy

import pytest
import torch
from pruned import randomized, sizes
from torch import nn

import nncx
from nncx.compress import remove_dead_filters, remove_masks
from nncx.graph import trace

X = torch.randn(3, 2, 8, 8, dtype=torch.float64)


class _Net(nn.Module):
    """Every place where a constant can be read."""

    def __init__(self, padding, bias):
        super().__init__()
        self.conv1 = nn.Conv2d(2, 6, 3, padding=padding, bias=bias)
        self.bn1 = nn.BatchNorm2d(6)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(6, 6, 3, padding=padding, bias=bias)
        self.depthwise = nn.Conv2d(6, 12, 3, padding=padding, groups=6, bias=bias)
        self.grouped = nn.Conv2d(12, 6, 1, groups=2)
        self.pool = nn.AvgPool2d(2)
        self.fc1 = nn.Linear(6 * (1 if padding == 0 else 16), 8)
        self.fc2 = nn.Linear(8, 3, bias=False)

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.grouped(self.depthwise(self.conv2(x).sigmoid()))
        return self.fc2(self.relu(self.fc1(self.pool(x).flatten(1))))


def _check_same(model, smaller, x=X):
    with torch.no_grad():
        torch.testing.assert_close(smaller(x), model(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("padding", [0, 1])
def test_the_function_stays_whatever_is_dead(padding, bias):
    model = randomized(_Net(padding, bias))
    graph, whole, fewest = trace(model, X), copy.deepcopy(model.state_dict()), 99
    for _ in range(20):
        model.load_state_dict(whole)  # into the layers of the graph, too
        for layer in model.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                layer.weight.data[torch.rand(layer.weight.shape[0]) < 0.5] = 0
                layer.weight.data[:, torch.rand(layer.weight.shape[1]) < 0.3] = 0
        smaller = remove_dead_filters(graph, X)
        fewest = min(fewest, sum(sizes(smaller).values()))
        _check_same(model, smaller)
    assert fewest < 30 < sum(sizes(model).values())


def test_filters_of_zeros_go_and_their_constant_moves_on():
    model = randomized(_Net(0, False))
    model.conv1.weight.data[[1, 4]] = 0  # what BatchNorm and ReLU make of it, conv2 reads
    model.fc1.weight.data[:5] = 0
    smaller = remove_dead_filters(model, X)
    assert sizes(smaller) == sizes(model) | {"conv1": 4, "fc1": 3}
    assert smaller.conv2.bias is not None and smaller.fc2.bias is not None
    assert smaller.bn1.num_features == 4 and smaller.conv1.bias is None
    _check_same(model, smaller)


def test_at_a_padded_border_only_zeros_go():
    model = randomized(_Net(1, True))
    model.conv1.weight.data[:4] = 0
    model.bn1.weight.data[:4] = 0
    model.bn1.bias.data[:4] = torch.tensor([-1.0, 0, 1, 2]).double()
    assert sizes(remove_dead_filters(model, X))["conv1"] == 4
    model.conv2.padding_mode = "replicate"
    smaller = remove_dead_filters(model, X)
    assert sizes(smaller)["conv1"] == 2
    _check_same(model, smaller)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.InstanceNorm2d])
def test_what_a_norm_multiplies_with_0_goes(norm):
    """Whatever the filter before it gives."""
    model = nn.Sequential(nn.Conv2d(2, 6, 3), norm(6, affine=True), nn.ReLU(), nn.Conv2d(6, 3, 3))
    model = randomized(model)
    model[1].weight.data[[0, 3, 4]] = 0
    smaller = remove_dead_filters(model, X)
    assert sizes(smaller)["0"] == 3
    _check_same(model, smaller)


def test_a_prelu_with_slope_0_is_no_constant():
    model = randomized(nn.Sequential(nn.Linear(4, 6), nn.PReLU(6), nn.Linear(6, 2)))
    model[1].weight.data[:3] = 0
    x = torch.randn(5, 4).double()
    assert sizes(remove_dead_filters(model, x)) == sizes(model)


def test_a_chain_of_constants_goes_at_once():
    model = randomized(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.Linear(6, 2)))
    model[0].weight.data[:3] = 0
    model[2].weight.data[:2, 3:] = 0  # which read nothing but constants
    x = torch.randn(5, 4).double()
    smaller = remove_dead_filters(model, x)
    assert sizes(smaller) == {"0": 3, "2": 4, "3": 2}
    _check_same(model, smaller, x)


def test_what_nobody_reads_goes():
    model = randomized(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)))
    model[2].weight.data[:, 2:5] = 0
    x = torch.randn(5, 4).double()
    smaller = remove_dead_filters(model, x)
    assert sizes(smaller)["0"] == 3
    assert torch.equal(smaller.get_submodule("2").bias, model[2].bias)
    _check_same(model, smaller, x)


def test_a_residual_channel_goes_when_all_that_is_added_is_constant():
    model = randomized(nncx.models.ResNet(8, in_channels=2, width=4))
    model.stage1.get_submodule("0").conv2.weight.data[1] = 0
    assert sizes(remove_dead_filters(model, X)) == sizes(model)
    model.conv.weight.data[1] = 0
    model.stage2.get_submodule("0").conv2.weight.data[3] = 0
    model.stage3.get_submodule("0").conv2.weight.data[7] = 0
    _check_same(model, remove_dead_filters(model, X))


def test_pruned_neurons_go():
    model = randomized(_chain())
    pruned = nncx.convert(copy.deepcopy(model), nncx.Pruning(0.5, structure="neuron"))
    for _ in nncx.Pruning(0.5, structure="neuron").steps(pruned):
        pass
    smaller = remove_dead_filters(remove_masks(pruned.eval()), X)
    assert sizes(smaller) == {"0": 2, "3": 2, "5": 2} or sizes(smaller) == {"0": 2, "3": 3, "5": 2}
    _check_same(pruned, smaller)


def test_every_layer_keeps_a_channel():
    model = randomized(_chain())
    for layer in (model[0], model[3]):
        nn.init.zeros_(layer.weight)
    smaller = remove_dead_filters(model, X)
    assert sizes(smaller) == {"0": 1, "3": 1, "5": 2}
    _check_same(model, smaller)


def _chain():
    return nn.Sequential(
        *(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.Flatten()),
        nn.Linear(80, 2),
    )


def test_the_model_stays_and_a_living_one_is_copied():
    model = randomized(_chain())
    state = copy.deepcopy(model.state_dict())
    smaller = remove_dead_filters(model, X)
    assert sizes(smaller) == sizes(model)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert smaller.get_submodule("0").weight is not model[0].weight
    _check_same(model, smaller)


def test_inputs_must_be_floats():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2))
    with pytest.raises(ValueError, match="inputs must be of floats, .* got torch.int64"):
        remove_dead_filters(model, torch.zeros(1, 3, dtype=torch.int64))
