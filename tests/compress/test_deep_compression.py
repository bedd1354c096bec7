"""The method Deep Compression: which weights share which value, in which layers."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from nncx import load, save
from nncx.compress import XNOR, DeepCompression, Pruning, convert, freeze
from nncx.models import LeNet5, LeNet300100, ResNet
from nncx.nn import SharedConv2d, SharedLinear


def _network():
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(4, 6, (3, 5), 2, (1, 2), groups=2, bias=False), nn.BatchNorm2d(6), nn.ReLU()),
        *(nn.Dropout(0.1), nn.Flatten(), nn.Linear(6 * 16, 5)),
    )


def _images():
    return torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))


def _shared(model):
    return [m for m in model.modules() if isinstance(m, SharedConv2d | SharedLinear)]


def test_convolutions_and_linear_layers_get_their_widths_and_nothing_else_changes():
    model, plain = _network(), _network()
    bias = model[5].bias
    assert convert(model, DeepCompression()) is model
    assert repr(model[0]) == f"Shared{repr(plain[0])[:-1]}, bits=8)"
    assert repr(model[5]) == f"Shared{repr(plain[5])[:-1]}, bits=5)"
    assert model[5].bias is bias and model[0].bias is None
    assert [type(m) for m in model[1:5]] == [type(m) for m in plain[1:5]]
    assert [len(layer.centroids) for layer in _shared(model)] == [256, 32]


@pytest.mark.parametrize("init", ["linear", "density", "random"])
def test_each_weight_becomes_the_mean_of_those_it_is_with(init):
    plain, model = _network(), convert(_network(), DeepCompression(3, 2, init=init))
    for before, layer in [(plain[0], model[0]), (plain[5], model[5])]:
        weights = before.weight.detach().double().numpy().ravel()
        codes = layer.codes.numpy().ravel()
        assert set(codes) == set(range(2**layer.bits))
        for k, centroid in enumerate(layer.centroids.tolist()):
            np.testing.assert_allclose(centroid, weights[codes == k].mean(), rtol=1e-5)
        distances = np.abs(weights[:, None] - layer.centroids.detach().double().numpy())
        assert np.array_equal(distances.argmin(1), codes)


def test_with_a_value_for_each_weight_nothing_changes():
    model, x = _network().eval(), _images()
    with torch.no_grad():
        model[5].weight.copy_(torch.randn(5, 96).round())
        expected = model(x)
        convert(model, DeepCompression())
        assert model[0].codes.numel() == 180 and len(model[0].centroids) == 256
        assert model[0].centroids[180:].eq(0).all(), "there was nothing for them"
        torch.testing.assert_close(model(x), expected)


def test_the_random_clusters_depend_on_the_seed_alone():
    first, again, other = (
        convert(_network(), DeepCompression(init="random", seed=seed)) for seed in (1, 1, 2)
    )
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    assert not torch.equal(first[5].centroids, other[5].centroids)


@pytest.mark.parametrize("model", [LeNet300100(), LeNet5(norm=True), ResNet(8, width=4)])
def test_models_of_nncx_convert_train_and_freeze(model):
    count = sum(type(m) in (nn.Conv2d, nn.Linear) for m in model.modules())
    convert(model, DeepCompression(4, 3))
    assert len(_shared(model)) == count
    size = getattr(model, "image_size", 16)
    x = torch.randn(2, model.in_channels, size, size)
    model(x).square().sum().backward()
    assert all(layer.centroids.grad.isfinite().all() for layer in _shared(model))
    trained = copy.deepcopy(model).eval()(x).detach()
    torch.testing.assert_close(freeze(model)(x), trained, rtol=1e-4, atol=1e-4)


def test_after_xnor_it_takes_the_layers_that_xnor_left_float():
    model = convert(convert(LeNet5(norm=True), XNOR()), DeepCompression())
    kinds = [type(m).__name__ for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert kinds == ["SharedConv2d", "XNORConv2d", "XNORLinear", "SharedLinear"]


def test_a_layer_may_have_a_width_of_its_own():
    method = DeepCompression(linear_bits=4, bits={"fc3": 6})
    for _ in range(2):  # the method is of no model
        model = convert(LeNet300100(), method)
        assert [layer.bits for layer in _shared(model)] == [4, 4, 6]
    assert method.bits == {"fc3": 6}


@pytest.mark.parametrize("name", ["fc4", "relu1", "", "fc3.weight"])
def test_a_name_of_no_layer_is_refused_and_the_model_stays(name):
    model = LeNet300100()
    with pytest.raises(ValueError, match=f"^DeepCompression: bits must name .*, got '{name}'; tak"):
        convert(model, DeepCompression(bits={name: 4}))
    assert not _shared(model)


# ---------------------------------------------------------------------------------------------
# after pruning


def _pruned(**settings):
    """Pruned to `settings`, without training."""
    method = Pruning(**settings)
    model = convert(_network(), method)
    list(method.steps(model))
    return model


def test_a_pruned_layer_is_taken_with_its_mask_and_its_survivors_are_clustered():
    model = _pruned(sparsity=0.75)
    masks = [model[i].mask.clone() for i in (0, 5)]
    weights = [model[i].masked_weight().detach() for i in (0, 5)]
    convert(model, DeepCompression(conv_bits=4, linear_bits=3))
    for layer, mask, weight in zip(_shared(model), masks, weights, strict=True):
        assert torch.equal(layer.mask, mask) and layer.masked
        assert len(layer.centroids) == 2**layer.bits - 1
        values = layer._values()
        assert values[~mask].eq(0).all() and len(values.unique()) == 2**layer.bits
        for centroid in layer.centroids:
            torch.testing.assert_close(weight[values == centroid].mean(), centroid.detach())


def test_a_layer_with_one_weight_left_has_one_value():
    model = _pruned(sparsity=0.999)
    convert(model, DeepCompression())
    for layer in _shared(model):
        assert layer.mask.sum() == 1
        assert layer._values().count_nonzero() == 1 and layer.centroids[1:].eq(0).all()


def test_prune_share_train_and_store_near_the_entropy(tmp_path):
    x, file = _images(), tmp_path / "model.safetensors"
    model = convert(_pruned(sparsity={"5": 0.9}), DeepCompression(4, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    assert model[5]._values().count_nonzero() == 48
    freeze(model)
    with torch.no_grad():
        expected = model(x)
    save(model, file, entropy=True)
    compact = file.stat().st_size
    assert torch.equal(load(file)(x), expected)
    save(model, file)
    assert compact < file.stat().st_size


# ---------------------------------------------------------------------------------------------
# what stays, and what is refused


def test_modes_gradients_and_devices_stay():
    model = _network()
    model[5].eval().requires_grad_(False)
    convert(model, DeepCompression())
    assert model[0].training and model[0].centroids.requires_grad
    assert not model[5].training and not model[5].centroids.requires_grad
    with torch.no_grad():
        model.eval()(_images())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_and_the_model_stays(bad):
    model = _network()
    with torch.no_grad():
        model[5].weight[2, 3] = bad
    before = list(model)
    with pytest.raises(ValueError, match="^k-means: the values must be finite, got NaN or infin"):
        convert(model, DeepCompression())
    assert list(model) == before and before[0].weight is not None


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"conv_bits": 0}, "bits must be an integer from 1 to 8, got 0"),
        ({"linear_bits": 9}, "bits must be an integer from 1 to 8, got 9"),
        ({"linear_bits": 4.0}, "bits must be an integer from 1 to 8, got 4.0"),
        ({"bits": {"fc1": 0}}, "bits must be an integer from 1 to 8, got 0"),
        ({"bits": 4}, "bits must be widths by the names of layers, got 4; conv_bits and linear"),
        ({"init": "kmeans++"}, "init must be one of linear, density, random, got 'kmeans\\+\\+'"),
        ({"init": ["linear"]}, "init must be one of linear, density, random, got \\['linear'\\]"),
    ],
)
def test_bad_settings_are_refused_in_one_sentence(settings, message):
    with pytest.raises(ValueError, match=f"^DeepCompression: {message}"):
        DeepCompression(**settings)
