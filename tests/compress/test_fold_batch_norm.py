"""BatchNorm folded into the layer before it: the same function, or left as it is."""

import copy

import pytest
import torch
from graphs import torchvision_model, with_statistics
from torch import nn

import nncx
from nncx.compress import fold_batch_norm
from nncx.graph import trace


class Chain(nn.Sequential):
    """A class of a user, so that layers and norms stand in a graph as they come."""


def _folded(model, x):
    """The graph of a model in float64 before and after folding, and its norms that are left."""
    graph = trace(with_statistics(model).double().eval(), x)
    folded = fold_batch_norm(copy.deepcopy(graph), x)
    with torch.no_grad():
        torch.testing.assert_close(folded(x), graph(x), rtol=1e-10, atol=1e-10)
    norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    return folded, [p for p, layer in folded.named_layers().items() if isinstance(layer, norms)]


@pytest.mark.parametrize(
    "layers, shape",
    [
        ((nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)), (3, 5, 5)),
        ((nn.Conv2d(4, 6, 3, 2, "valid", 1, 2), nn.BatchNorm2d(6, eps=0.1)), (4, 5, 5)),
        ((nn.Conv2d(3, 6, 3, 1, "same", 1, 1, True, "reflect"), nn.BatchNorm2d(6)), (3, 5, 5)),
        ((nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6)), (3, 5)),
        ((nn.Conv3d(3, 2, 3), nn.BatchNorm3d(2)), (3, 4, 4, 4)),
        ((nn.Linear(3, 6), nn.BatchNorm1d(6)), (3,)),
        ((nn.Linear(3, 6, bias=False), nn.BatchNorm1d(6), nn.ReLU()), (3,)),
    ],
)
def test_a_norm_goes_into_the_layer_before_it(layers, shape):
    graph, left = _folded(Chain(*layers), torch.randn(4, *shape).double())
    assert not left and graph.named_layers()["0"].bias is not None


def test_a_norm_without_weights_is_folded():
    norm = nn.BatchNorm2d(4, affine=False)
    norm.running_mean.normal_()
    x = torch.randn(2, 3, 5, 5)
    graph = trace(Chain(nn.Conv2d(3, 4, 3), norm).eval(), x)
    wanted = graph(x)
    assert len(fold_batch_norm(graph, x).nodes) == 1
    torch.testing.assert_close(graph(x), wanted)


def test_the_model_and_what_shares_a_layer_stay_as_they_were():
    model = with_statistics(Chain(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).eval()
    state, x = copy.deepcopy(model.state_dict()), torch.randn(2, 3, 5, 5)
    graph = fold_batch_norm(trace(model, x), x)
    assert graph.named_layers()["0"] is not model[0]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


class Fork(nn.Module):
    """A norm between other layers, `how` says in which way."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.conv, self.bn, self.other = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)

    def forward(self, x):
        y = self.conv(x)
        if self.how == "other reader":
            return self.bn(y) + y
        if self.how == "layer before has another reader":
            return torch.cat([self.bn(self.other(y)), y])
        if self.how == "layer called twice":
            return self.conv(self.bn(y))
        if self.how == "norm called twice":
            return self.bn(self.other(self.bn(y)))
        if self.how == "of the input":
            return self.bn(x)
        return self.bn(y.relu())


@pytest.mark.parametrize(
    "how, left",
    [
        ("other reader", 1),
        ("layer before has another reader", 0),
        ("layer called twice", 1),
        ("norm called twice", 1),
        ("of the input", 1),
        ("behind a ReLU", 1),
    ],
)
def test_a_norm_is_folded_or_stays_where_that_would_be_wrong(how, left):
    assert len(_folded(Fork(how), torch.randn(2, 3, 4, 4).double())[1]) == left


def test_a_graph_in_training_mode_is_refused():
    graph = trace(nn.Sequential(nn.Linear(3, 3)), torch.ones(1, 3))
    with pytest.raises(ValueError, match="fold_batch_norm: the graph must be in eval mode"):
        fold_batch_norm(graph, torch.ones(1, 3))


def test_a_norm_over_the_rows_of_a_linear_layer_stays():
    """Of [N, L, C] a BatchNorm1d takes L for the channels, of which there may be as many."""
    assert _folded(Chain(nn.Linear(3, 5), nn.BatchNorm1d(5)), torch.randn(2, 5, 3).double())[1]


def test_what_was_folded_and_what_not_in_a_resnet():
    graph, left = _folded(nncx.models.ResNet(8, width=4), torch.randn(2, 3, 8, 8).double())
    assert left == ["stage1.0.bn1", "stage2.0.bn1", "stage3.0.bn1", "bn"]  # pre-activation


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "shufflenet_v2_x0_5"])
def test_no_norm_is_left_in_networks_of_torchvision(name):
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    model, _ = torchvision_model(models, name)
    assert not _folded(model, torch.randn(1, 3, 64, 64).double())[1]
