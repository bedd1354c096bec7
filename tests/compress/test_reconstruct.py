"""reconstruct: what it minimises, against plain least squares, and what it refuses."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import nncx
from nncx import LowRank, convert
from nncx.compress import reconstruct
from nncx.compress.reconstruction import _windows


def correlated(count: int, channels: int, size: int) -> torch.Tensor:
    """Images as nature has them: neighbours are alike, and so are channels."""
    noise = torch.randn(count, channels, size, size)
    smooth = nn.functional.avg_pool2d(noise, 3, 1, 1)
    return smooth + 0.5 * smooth.roll(1, 1)


class Net(nn.Module):
    def __init__(self, **geometry):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 5, padding=2)
        self.relu = nn.ReLU(inplace=True)
        self.second = nn.Conv2d(8, 12, 3, **{"padding": 1, "bias": False, **geometry})
        self.norm = nn.BatchNorm2d(12)
        self.head = nn.Linear(12, 10)

    def forward(self, x):
        x = self.norm(self.second(self.relu(self.first(x)))).relu_()
        return self.head(x.mean((2, 3)))


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("geometry", [{}, {"stride": 2, "groups": 2, "padding": 0}], ids=str)
@pytest.mark.parametrize("inputs", ["compressed", "original"])
@pytest.mark.parametrize("scheme", [1, 2])
def test_outputs_come_closer_on_these_data_and_on_others(scheme, inputs, geometry):
    torch.manual_seed(0)
    original = Net(**geometry)
    model = convert(copy.deepcopy(original), LowRank(scheme, speedup=2))
    batches = [correlated(32, 3, 10) for _ in range(4)]
    unseen = correlated(128, 3, 10)
    before = copy.deepcopy(model).eval()
    parameters = list(model.parameters())
    state = copy.deepcopy(original.state_dict())
    result = reconstruct(model, original, batches, inputs=inputs)

    assert [row.name for row in result.layers] == ["first", "second", "head"]
    for row in result.layers:
        assert row.after < 0.9 * row.before, row
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert model.training and original.training
    assert all(torch.equal(state[name], value) for name, value in original.state_dict().items())
    with torch.no_grad():
        wanted = original.eval()(unseen)
        assert relative(model.eval()(unseen), wanted) < 0.7 * relative(before(unseen), wanted)
        head = relative(model(torch.cat(batches)), original(torch.cat(batches)))
    assert result.layers[-1].after == pytest.approx(head, rel=1e-4)
    lines = str(result).splitlines()
    assert lines[0].split() == ["layer", "rank", "error", "before", "after"]
    assert lines[4].split()[0] == "head" and lines[4].endswith(f"{head:.2%}")


def test_a_linear_layer_reaches_the_closed_form():
    """Reduced-rank regression: of W S^(1/2) the truncated singular value decomposition."""
    torch.manual_seed(0)
    layer = nn.Linear(12, 9, bias=False)
    original = nn.Sequential(layer)
    x = torch.randn(400, 12) @ torch.randn(12, 12)
    model = convert(copy.deepcopy(original), LowRank(rank=3))
    (row,) = reconstruct(model, original, x.split(100)).layers
    x, weight = x.double().numpy(), layer.weight.detach().double().numpy()
    values = np.linalg.svd(x @ weight.T, compute_uv=False)
    best = np.sqrt(np.square(values[3:]).sum() / np.square(values).sum())
    assert best <= row.after + 1e-6 < 1.02 * best < 0.9 * row.before


def test_a_bias_takes_over_the_mean():
    torch.manual_seed(0)
    original = nn.Sequential(nn.Conv2d(4, 6, 3))
    x = correlated(64, 4, 8) + 3
    model = convert(copy.deepcopy(original), LowRank(rank=2))
    reconstruct(model, original, [x], positions=1000)
    with torch.no_grad():
        difference = (model(x) - original(x)).mean((0, 2, 3))
    assert difference.abs().max() < 1e-4


def test_exact_factors_stay_exact():
    torch.manual_seed(0)
    original = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3))
    with torch.no_grad():  # of rank 1
        for layer in (original[0], original[2]):
            column, row = torch.randn(1, layer.in_channels, 3, 1), torch.randn(6, 1, 1, 3)
            layer.weight.copy_(column * row)
    model = convert(copy.deepcopy(original), LowRank(rank=1))
    for row in reconstruct(model, original, [correlated(16, 4, 9)]).layers:
        assert row.rank == 1 and row.before < 1e-5 and row.after < 1e-5


def test_without_data_of_a_direction_the_weight_decides():
    """A channel that is always 0 in the batches keeps its filters."""
    torch.manual_seed(0)
    original = nn.Sequential(nn.Linear(8, 6, bias=False))
    x = torch.randn(100, 8)
    x[:, 3] = 0
    with torch.no_grad():
        original[0].weight[:, 4:] = 0  # 5 columns are left
    model = convert(copy.deepcopy(original), LowRank(rank=3))
    reconstruct(model, original, [x])
    with torch.no_grad():
        kept = (model[0][1].weight @ model[0][0].weight)[:, 3]
    assert relative(kept, original[0].weight[:, 3]) < 0.9 and kept.norm() > 0


@settings(max_examples=30, deadline=None)
@given(
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(1, 2), st.integers(1, 2)),
    st.sampled_from(["same", (0, 0), (2, 1)]),
    st.sampled_from(["zeros", "reflect", "circular"]),
)
def test_windows_are_what_a_convolution_sees(kernel, stride, dilation, padding, mode):
    stride = 1 if padding == "same" else stride
    layer = nn.Conv2d(2, 3, kernel, stride, padding, dilation, padding_mode=mode)
    x = torch.randn(2, 2, 9, 10)
    found = torch.einsum("ncyxij,ocij->noyx", _windows(layer, x), layer.weight)
    torch.testing.assert_close(found + layer.bias.view(-1, 1, 1), layer(x), rtol=1e-4, atol=1e-5)


def test_a_shared_layer_sees_the_data_of_all_its_calls():
    torch.manual_seed(0)
    shared = nn.Conv2d(4, 4, 3, padding=1)
    original = nn.Sequential(shared, nn.ReLU(), shared)
    model = convert(copy.deepcopy(original), LowRank(rank=2))
    (row,) = reconstruct(model, original, [correlated(32, 4, 8)]).layers
    assert row.name == "0" and row.after < row.before


def test_what_it_refuses():
    original = Net()
    model = convert(copy.deepcopy(original), LowRank(speedup=2))
    x = [torch.randn(4, 3, 10, 10)]
    with pytest.raises(ValueError, match="inputs must be 'compressed' or 'original', got 'both'"):
        reconstruct(model, original, x, inputs="both")
    with pytest.raises(ValueError, match="positions must be at least 1, got 0"):
        reconstruct(model, original, x, positions=0)
    with pytest.raises(ValueError, match="batches must be at least one, got none"):
        reconstruct(model, original, [])
    with pytest.raises(TypeError, match="a batch must be a tensor"):
        reconstruct(model, original, ["images"])
    with pytest.raises(ValueError, match="outputs of 'first' must be finite, got NaN"):
        reconstruct(model, original, [x[0] * torch.nan])
    for compressed, other in ((original, original), (model, nn.Linear(2, 2))):
        with pytest.raises(ValueError, match="must have expansions in the place of layers of"):
            reconstruct(compressed, other, x)
    with pytest.raises(ValueError, match="must have expansions in the place of layers of"):
        reconstruct(convert(model, nncx.Int8()), original, x)


def test_of_a_layer_that_gives_nothing_every_error_is_infinite():
    original = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8, bias=False))
    nn.init.constant_(original[0].bias, -100.0)  # no neuron fires
    model = convert(copy.deepcopy(original), LowRank(rank={"2": 2}))
    assert reconstruct(model, original, [torch.randn(20, 6)]).layers[0].before == 0
    model[0].bias.data.neg_()
    assert reconstruct(model, original, [torch.randn(20, 6)]).layers[0].before == math.inf


def test_networks_that_call_a_layer_differently():
    class Twice(nn.Module):
        def __init__(self, calls):
            super().__init__()
            self.layer, self.calls = nn.Linear(6, 6), calls

        def forward(self, x):
            for _ in range(self.calls):
                x = self.layer(x)
            return x

    model = convert(Twice(2), LowRank(rank=2))
    with pytest.raises(ValueError, match="'layer' must be called as often in both networks, got 1"):
        reconstruct(model, Twice(1), [torch.randn(4, 6)])
