"""LowRank: what the expansions compute and cost, which layers they replace, and their files."""

import copy
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import nncx
from nncx import LowRank, convert
from nncx.compress._factors import SEPARABLE, Moments
from nncx.compress.low_rank import expand, kernel_of
from nncx.models import LeNet5

SCHEMES = (1, 2)


def full_rank(layer: nn.Module, scheme: int) -> int:
    if isinstance(layer, nn.Linear):
        return min(layer.weight.shape)
    height, width = layer.kernel_size
    if scheme == 1:
        return height * width
    channels, outputs = layer.in_channels // layer.groups, layer.out_channels // layer.groups
    return min(channels * height, outputs * width)


def expanded_kernel(expansion: nn.Sequential, layer: nn.Module) -> np.ndarray:
    """The one kernel that an expansion stands for, by plain sums."""
    factors = [factor.weight.detach().double().numpy() for factor in expansion]
    if isinstance(layer, nn.Linear):
        return factors[1] @ factors[0]
    kernel = np.zeros(layer.weight.shape)
    groups = layer.groups
    for n, c in itertools.product(*map(range, layer.weight.shape[:2])):
        group = n // (layer.out_channels // groups)
        if len(factors) == 2:
            rank = len(factors[0]) // groups
            for k in range(rank):
                column, row = factors[0][group * rank + k, c, :, 0], factors[1][n, k, 0]
                kernel[n, c] += np.outer(column, row)
        else:
            channel = group * layer.weight.shape[1] + c
            rank = len(factors[0]) // layer.in_channels
            for m in range(rank):
                at = channel * rank + m
                basis = np.outer(factors[0][at, 0, :, 0], factors[1][at, 0, 0])
                kernel[n, c] += factors[2][n, c * rank + m, 0, 0] * basis
    return kernel


@st.composite
def convolutions(draw):
    """A convolution of any geometry, and an input that it takes."""
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    same = draw(st.booleans())
    kernel = draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    dilation = draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    padding = "same" if same else draw(st.tuples(st.integers(0, 2), st.integers(0, 2)))
    layer = nn.Conv2d(
        groups * draw(st.integers(1, 3)),
        groups * draw(st.integers(1, 4)),
        kernel,
        stride=1 if same else draw(st.tuples(st.integers(1, 3), st.integers(1, 3))),
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=mode,
        dtype=torch.float64,
    )
    size = draw(st.tuples(st.integers(9, 12), st.integers(9, 12)))
    return layer, torch.randn(2, layer.in_channels, *size, dtype=torch.float64)


@settings(max_examples=60, deadline=None)
@given(convolutions(), st.sampled_from(SCHEMES))
def test_full_rank_is_the_layer(case, scheme):
    layer, x = case
    expansion = expand(layer, full_rank(layer, scheme), scheme)
    torch.testing.assert_close(expansion(x), layer(x), rtol=1e-9, atol=1e-9)
    assert expansion[-1].bias is layer.bias and all(f.bias is None for f in expansion[:-1])


@settings(max_examples=40, deadline=None)
@given(convolutions(), st.sampled_from(SCHEMES))
def test_an_expansion_of_any_rank_is_the_convolution_with_its_kernel(case, scheme):
    layer, x = case
    expansion = expand(layer, (full_rank(layer, scheme) + 1) // 2, scheme)
    same = copy.deepcopy(layer)
    with torch.no_grad():
        same.weight.copy_(torch.from_numpy(expanded_kernel(expansion, layer)))
    torch.testing.assert_close(expansion(x), same(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rank", [1, 3, 7])
@pytest.mark.parametrize("shape", [(7, 6, 3, 5), (4, 9, 5, 2), (9, 11, 1, 1)])
def test_the_error_of_scheme_2_is_the_tail_of_the_singular_values(shape, rank):
    torch.manual_seed(0)
    layer = nn.Conv2d(shape[1], shape[0], shape[2:], dtype=torch.float64)
    weight = layer.weight.detach().numpy()
    matrix = weight.transpose(1, 2, 0, 3).reshape(shape[1] * shape[2], shape[0] * shape[3])
    tail = np.linalg.svd(matrix, compute_uv=False)[rank:]
    error = expanded_kernel(expand(layer, rank), layer) - weight
    np.testing.assert_allclose(np.square(error).sum(), np.square(tail).sum(), rtol=1e-9)


def test_the_error_of_a_linear_layer_is_the_tail_of_the_singular_values():
    torch.manual_seed(0)
    layer = nn.Linear(13, 9, dtype=torch.float64)
    weight = layer.weight.detach().numpy()
    tail = np.linalg.svd(weight, compute_uv=False)[4:]
    for scheme in SCHEMES:
        error = expanded_kernel(expand(layer, 4, scheme), layer) - weight
        np.testing.assert_allclose(np.square(error).sum(), np.square(tail).sum(), rtol=1e-9)


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("groups", [1, 3])
def test_alternating_least_squares_come_closer_than_the_principal_filters(groups, rank):
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 9, (3, 4), groups=groups, dtype=torch.float64)
    kernel = kernel_of(layer)
    energies = SEPARABLE.energies(kernel)
    assert energies.sum().item() == pytest.approx(kernel.square().sum().item())
    begin = energies[rank:].sum().item()  # what the best principal filters leave
    weight = layer.weight.detach().numpy()
    error = np.square(expanded_kernel(expand(layer, rank, 1), layer) - weight).sum()
    assert 0 < error < 0.98 * begin
    factors = SEPARABLE.start(kernel, rank)
    assert Moments.of_kernel(kernel).error(SEPARABLE.product(factors)) == pytest.approx(error)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_macs_are_those_of_the_paper(scheme):
    channels, outputs, d, rank, size = 8, 12, 5, 3, 10
    model = nn.Sequential(nn.Conv2d(channels, outputs, d, padding=2))
    convert(model, LowRank(scheme, rank={"0": rank}))
    macs = nncx.report(model, torch.randn(1, channels, size, size), repeats=1).total.macs
    if scheme == 1:
        assert macs == channels * rank * (2 * d + outputs) * size * size
    else:
        assert macs == rank * (channels + outputs) * d * size * size


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_speedup_is_met_by_the_largest_rank(scheme, groups, stride):
    layer = nn.Conv2d(16, 24, 5, stride, padding=2, groups=groups)
    x = torch.randn(1, 16, 24, 24)

    def macs(module: nn.Module) -> int:
        return nncx.report(nn.Sequential(module), x, repeats=1).total.macs

    expansion = convert(nn.Sequential(layer), LowRank(scheme, speedup=2.5))[0]
    rank = len(expansion[0].weight) // (groups if scheme == 2 else 16)
    assert macs(expansion) <= macs(layer) / 2.5 < macs(expand(layer, rank + 1, scheme))


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_energy_is_kept_with_the_least_rank(scheme, energy):
    torch.manual_seed(0)
    layer = nn.Conv2d(8, 16, 5)
    with torch.no_grad():  # singular values that fall, as of a trained layer
        smooth = torch.randn(16, 8, 2, 2) + 0.1 * torch.randn(16, 1, 2, 2)
        layer.weight.copy_(nn.functional.interpolate(smooth, (5, 5), mode="bilinear"))
    model = convert(nn.Sequential(copy.deepcopy(layer)), LowRank(scheme, energy=energy))
    rank = len(model[0][0].weight) // (1 if scheme == 2 else 8)
    weight = layer.weight.detach().numpy()

    def kept(expansion: nn.Sequential) -> float:
        error = expanded_kernel(expansion, layer) - weight
        return 1 - np.square(error).sum() / np.square(weight).sum()

    assert kept(model[0]) >= energy - 1e-9
    if scheme == 2:
        assert rank == 1 or kept(expand(layer, rank - 1)) < energy


def test_what_would_not_be_faster_stays():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, bias=False), nn.Linear(6, 4))
    before = list(model)
    convert(model, LowRank(rank=6))
    assert [a is b for a, b in zip(before, model, strict=True)] == [True, False, True]
    with pytest.raises(ValueError, match="has no layer for LowRank.*that is not skipped"):
        convert(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Linear(2, 2)), LowRank(1, speedup=4))


@pytest.mark.parametrize("setting", [{"rank": 1}, {"energy": 0.5}, {"speedup": 2}])
def test_layers_without_weights_stay(setting):
    model = nn.Sequential(nn.Linear(6, 0), nn.Linear(0, 8), nn.Linear(8, 8))
    before = list(model)
    convert(model, LowRank(**setting))
    assert [a is b for a, b in zip(before, model, strict=True)] == [True, True, False]


class MyConv(nn.Conv2d):
    pass


def test_which_layers_it_replaces():
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3), MyConv(8, 8, 3), nn.Conv1d(8, 8, 3), nn.ConvTranspose2d(8, 8, 3)
    )
    convert(model, LowRank(rank=1))
    kinds = [nn.Sequential, MyConv, nn.Conv1d, nn.ConvTranspose2d]
    assert [type(layer) for layer in model] == kinds
    named = convert(LeNet5(), LowRank(rank={"conv2": 3, "fc1": 9}))
    expanded = {name for name, m in named.named_children() if isinstance(m, nn.Sequential)}
    assert expanded == {"conv2", "fc1"}
    assert named.conv2[0].out_channels == 3 and named.fc1[0].out_features == 9


def test_mode_dtype_and_frozen_parameters_are_kept():
    layer = nn.Conv2d(4, 8, 3, dtype=torch.bfloat16).eval().requires_grad_(False)
    expansion = convert(nn.Sequential(layer), LowRank(rank=2))[0]
    assert not expansion.training
    for factor in expansion:
        assert factor.weight.dtype == torch.bfloat16 and not factor.weight.requires_grad
        assert not factor.training


def test_a_shared_layer_is_expanded_once_and_hooks_are_refused():
    shared = nn.Conv2d(4, 4, 3, padding=1)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    convert(model, LowRank(rank=2))
    assert model[0] is model[2] and isinstance(model[0], nn.Sequential)
    model = nn.Sequential(nn.Conv2d(4, 4, 3))
    model[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="'0' must be a plain layer, got one with hooks"):
        convert(model, LowRank(rank=2))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"scheme": 3, "rank": 1}, "scheme must be 1 or 2, got 3"),
        ({}, "exactly one of rank, energy and speedup must be given, got none"),
        ({"rank": 1, "energy": 0.5}, "must be given, got rank, energy"),
        ({"rank": 0}, "a rank must be an integer of at least 1, got 0"),
        ({"rank": True}, "a rank must be an integer of at least 1, got True"),
        ({"rank": {"conv1": 1.5}}, "a rank must be an integer of at least 1, got 1.5"),
        ({"energy": 1}, "energy must lie between 0 and 1, got 1"),
        ({"energy": float("nan")}, "energy must lie between 0 and 1, got nan"),
        ({"speedup": 1}, "speedup must be above 1, got 1"),
        ({"speedup": float("inf")}, "speedup must be above 1, got inf"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        LowRank(**settings)


@pytest.mark.parametrize(
    "rank, message",
    [
        ({"conv3": 2}, "got 'conv3', which is not there; take names"),
        ({"relu1": 2}, "got 'relu1', which is ReLU; take names"),
        ({"conv2": 72}, "the rank of 'conv2' must be at most 71, beyond which nothing is saved"),
    ],
)
def test_names_that_do_not_fit(rank, message):
    model = LeNet5()
    with pytest.raises(ValueError, match=message):
        convert(model, LowRank(rank=rank))
    assert isinstance(model.conv2, nn.Conv2d)


def test_weights_that_are_not_finite():
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3))
    with torch.no_grad():
        model[1].weight[0, 0, 0, 0] = torch.nan
    for method in (LowRank(rank=2), LowRank(energy=0.5), LowRank(1, energy=0.5)):
        with pytest.raises(ValueError, match="weights must be finite, got NaN or infinity in Conv"):
            convert(model, method)
        assert isinstance(model[0], nn.Conv2d)
    with pytest.raises(ValueError, match="the rank of Conv2d.* must be from 1 to 12, got 13"):
        expand(nn.Conv2d(4, 8, 3), 13)


# ---------------------------------------------------------------------------------------------
# files and other methods


class Foreign(nn.Module):
    def __init__(self, channels: int = 6, groups: int = 2):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, channels, 5, padding=2), nn.ReLU())
        self.body = nn.Conv2d(channels, 8, 3, padding=1, groups=groups)
        self.alias = self.body
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        return self.head(self.alias(self.stem(x)).mean((2, 3)))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_network_of_nncx_is_stored_and_loaded_to_the_bit(scheme, tmp_path):
    torch.manual_seed(0)
    model = convert(LeNet5(), LowRank(scheme, speedup=3)).eval()
    x = torch.randn(3, 1, 28, 28)
    nncx.save(model, tmp_path / "net.safetensors")
    for loaded in (
        nncx.load(tmp_path / "net.safetensors"),
        nncx.load(tmp_path / "net.safetensors", into=LeNet5()),
    ):
        assert repr(loaded) == repr(model) and torch.equal(loaded(x), model(x))


@pytest.mark.filterwarnings("ignore:nncx.save. load will not do without into=")
@pytest.mark.parametrize("after", [None, nncx.Int8(), nncx.Mobile()], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_network_of_another_class_is_filled_into_a_new_one(scheme, after, tmp_path):
    torch.manual_seed(0)
    model = convert(Foreign(), LowRank(scheme, rank=1))
    assert isinstance(model.stem[0], nn.Sequential) and model.alias is model.body
    x = torch.randn(2, 3, 8, 8)
    if after is not None:
        convert(model, after)
        model(x)  # ranges of int8
    if isinstance(after, nncx.Int8):
        nncx.freeze(model)
    model.eval()
    nncx.save(model, tmp_path / "net.safetensors")
    loaded = nncx.load(tmp_path / "net.safetensors", into=Foreign())
    assert repr(loaded) == repr(model) and torch.equal(loaded(x), model(x))
    assert loaded.alias is loaded.body
    for other in (Foreign(channels=8), Foreign(groups=1)):
        with pytest.raises(ValueError, match="in the file and .* in into=|differ in modules"):
            nncx.load(tmp_path / "net.safetensors", into=other)
        assert isinstance(other.stem[0], nn.Conv2d)


@pytest.mark.parametrize("build", [Foreign, LeNet5])
def test_low_rank_then_int8(build, tmp_path):
    torch.manual_seed(0)
    model = convert(build(), LowRank(speedup=2)).eval()
    shape = (1, 28, 28) if build is LeNet5 else (3, 9, 9)
    batches = [torch.randn(8, *shape) for _ in range(3)]
    graph = nncx.freeze(nncx.quantize(model, batches))
    kinds = [type(layer) for layer in graph.named_layers().values()]
    assert len(kinds) > 5 and set(kinds) <= {nncx.Int8Conv2d, nncx.Int8Linear}
    nncx.save(graph, tmp_path / "net.safetensors")
    loaded, x = nncx.load(tmp_path / "net.safetensors"), torch.randn(4, *shape)
    assert torch.equal(loaded(x), graph(x))
    error = (graph(x) - model(x)).norm() / model(x).norm()
    assert error < 0.1


def test_an_expanded_graph_is_quantized_within_its_expansions():
    torch.manual_seed(0)
    model, x = LeNet5(), torch.randn(4, 1, 28, 28)
    graph = nncx.graph.trace(model.eval(), x)
    convert(graph, LowRank(rank={"conv2": 8, "fc1": 9}), rewire=False)
    quantized = nncx.quantize(graph, [x])
    kinds = {path: type(layer) for path, layer in quantized.named_layers().items()}
    conv, linear = nncx.Int8Conv2d, nncx.Int8Linear
    assert kinds == {
        **{"conv1": conv, "conv2.0": conv, "conv2.1": conv},
        **{"fc1.0": linear, "fc1.1": linear, "fc2": linear},
    }
    assert isinstance(graph.conv2[0], nn.Conv2d)


def test_it_trains():
    torch.manual_seed(0)
    model = convert(LeNet5(), LowRank(speedup=2))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    x, y = torch.randn(16, 1, 28, 28), torch.arange(16) % 10
    losses = []
    for _ in range(15):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
