"""Pruned layers: what layers with zeros in compute, whatever trains them, in little room."""

import copy
import math

import numpy as np
import pytest
import torch
from layer_families import FAMILIES, GEOMETRIES, evaluate, images
from torch import nn

import nncx
from nncx import _files
from nncx.nn import PrunedConv2d, PrunedLinear
from nncx.nn.codes import packed_size


def _twin(layer: nn.Module) -> nn.Module:
    """torch's layer, with zeros where the mask says so."""
    plain = nn.Conv2d if isinstance(layer, nn.Conv2d) else nn.Linear
    twin = copy.deepcopy(layer).train()
    twin.weight.data *= layer.mask
    return lambda x: plain.forward(twin.to(x.dtype), x)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_conv_is_torchs_with_zeros(geometry):
    layer, x = FAMILIES["pruned"].conv(**GEOMETRIES[geometry]), images()
    expected = _twin(layer)(x)
    assert not torch.equal(nn.Conv2d.forward(layer, x), expected)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(evaluate(layer, x), expected)
    torch.testing.assert_close(evaluate(layer.freeze(), x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 70), (70,), (2, 3, 4, 70), (0, 70)])
def test_linear_is_torchs_with_zeros(shape, dtype):
    layer, x = FAMILIES["pruned"].linear(70, 5), images(*shape, dtype=dtype)
    expected = _twin(layer)(x)
    assert expected.dtype == dtype
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(evaluate(layer, x), expected)
    torch.testing.assert_close(evaluate(layer.freeze(), x), expected)


def test_gradients_reach_survivors_only():
    layer, x = FAMILIES["pruned"].conv(), images()
    layer(x).square().sum().backward()
    twin = nn.Conv2d(6, 9, 3)
    twin.load_state_dict({"weight": layer.masked_weight().detach(), "bias": layer.bias.detach()})
    twin(x).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, twin.weight.grad * layer.mask)
    assert twin.weight.grad[~layer.mask].all() and not layer.weight.grad[~layer.mask].any()
    torch.testing.assert_close(layer.bias.grad, twin.bias.grad)


def test_what_is_pruned_counts_as_zero_even_if_it_is_not_finite():
    layer, x = FAMILIES["pruned"].linear(70, 5), images(3, 70)
    expected = layer(x)
    layer.weight.data[~layer.mask] = math.inf
    assert torch.equal(layer(x), expected)
    layer(x).sum().backward()
    assert layer.weight.grad.isfinite().all()
    assert torch.equal(evaluate(layer, x), expected)
    assert torch.equal(evaluate(layer.freeze(), x), expected)


OPTIMIZERS = {
    "SGD, momentum, weight decay": lambda p: torch.optim.SGD(
        p, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True
    ),
    "Adam, weight decay": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_optimizer_revives_a_weight(name):
    """Neither by what it remembers of the time before the pruning, nor by decay."""
    layer, x = PrunedLinear(20, 6), images(8, 20)
    optimizer = OPTIMIZERS[name](layer.parameters())
    for step in range(12):
        if step == 4:
            layer.mask.copy_(layer.weight.abs() > layer.weight.abs().median())
            before = layer.weight.detach().clone()
        optimizer.zero_grad()
        (layer(x) - images(8, 6)).square().sum().backward()
        optimizer.step()
    mask = layer.mask
    assert 0 < layer.survivors == mask.sum() < mask.numel()
    assert not layer.masked_weight()[~mask].any() and layer.masked_weight()[mask].all()
    assert not torch.equal(layer.weight[mask], before[mask]), "the survivors train"
    assert not torch.equal(layer.weight[~mask], before[~mask]), "it did try to change the others"
    zeroed = nn.Linear(20, 6)
    zeroed.load_state_dict({"weight": layer.weight * mask, "bias": layer.bias})
    assert torch.equal(evaluate(layer, x), evaluate(zeroed, x))


@pytest.mark.filterwarnings("ignore:an nncx layer in eval mode was called with gradients")
def test_another_mask_in_eval_mode_is_refused_until_repack():
    layer, x = FAMILIES["pruned"].conv().eval(), images()
    layer.mask[0, 0, 0, 0] ^= True
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"call nncx.repack\(model\)"):
        layer(x)
    layer.repack()
    assert torch.equal(evaluate(layer, x), _twin(layer)(x).detach())


# ---------------------------------------------------------------------------------------------
# frozen


@pytest.mark.parametrize("gap_bits", [1, 3, 5, 8])
def test_frozen_are_survivors_and_gaps(gap_bits):
    """The layout, read by NumPy alone."""
    layer = PrunedConv2d(6, 9, 3, gap_bits=gap_bits)
    layer.mask.copy_(torch.rand_like(layer.weight) < 0.1)
    expected = (layer.weight * layer.mask).detach().numpy()
    layer.freeze()
    assert layer.weight is None and layer.mask is None
    stream = np.unpackbits(layer.gaps.numpy(), bitorder="little")
    entries = len(layer.packed_weight)
    codes = stream[: entries * gap_bits].reshape(entries, gap_bits) @ (1 << np.arange(gap_bits))
    weight = np.zeros(expected.size, dtype=np.float32)
    weight[np.cumsum(codes + 1) - 1] = layer.packed_weight.numpy()
    assert np.array_equal(weight.reshape(expected.shape), expected)
    assert layer.survivors == np.count_nonzero(expected)
    assert len(layer.gaps) == -(-entries * gap_bits // 8)


def test_a_survivor_of_zero_is_not_stored_and_nan_is():
    layer = PrunedLinear(4, 2)
    layer.weight.data = torch.tensor([[0.0, -0.0, 3.0, 4.0], [math.nan, 6.0, 7.0, 8.0]])
    layer.mask.copy_(torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]))
    assert layer.freeze().survivors == 5
    expected = [[0.0, 0.0, 3.0, 0.0], [math.nan, 6.0, 7.0, 8.0]]
    torch.testing.assert_close(
        layer.masked_weight(), torch.tensor(expected), equal_nan=True, rtol=0, atol=0
    )


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_nothing_and_everything_pruned(density, tmp_path):
    layer, x = PrunedLinear(70, 50), images(3, 70)
    layer.mask.fill_(density)
    expected = layer(x)
    nncx.save(nn.Sequential(layer.freeze()), tmp_path / "file")
    assert torch.equal(nncx.load(tmp_path / "file")(x), expected)


def test_a_frozen_layer_loads_another_number_of_survivors():
    source, layer = PrunedLinear(70, 50), PrunedLinear(70, 50).freeze()
    source.mask.copy_(torch.rand_like(source.weight) < 0.1)
    source.freeze()
    for assign in (False, True):
        layer.load_state_dict(source.state_dict(), assign=assign)
        assert torch.equal(layer(images(3, 70)), source(images(3, 70)))


def test_the_file_is_small_and_the_report_says_how_much(tmp_path):
    model, x = nn.Sequential(nn.Flatten(), PrunedLinear(784, 300, gap_bits=5)), images(2, 784)
    model[1].mask.copy_(torch.rand_like(model[1].weight) < 0.08)
    survivors = model[1].survivors
    with torch.no_grad():
        expected = model(x)
    nncx.save(nncx.freeze(model), tmp_path / "file")
    loaded = nncx.load(tmp_path / "file")
    assert torch.equal(loaded(x), expected)
    entries = len(loaded[1].packed_weight)
    assert survivors <= entries < 1.1 * survivors
    stored = 4 * entries + packed_size(entries, 5) + 4 * 300
    assert nncx.report(loaded, x, repeats=1).total.bytes == stored
    assert nncx.report(loaded, x, repeats=1).total.parameters == 784 * 300 + 300
    assert stored < (tmp_path / "file").stat().st_size < stored + 2000
    assert stored < 4 * 784 * 300 / 9
    nncx.save(model, tmp_path / "coded", entropy=True)
    assert (tmp_path / "coded").stat().st_size < (tmp_path / "file").stat().st_size - 500
    assert torch.equal(nncx.load(tmp_path / "coded")(x), expected)


def _save_frozen(file, gap_bits=5):
    layer = PrunedLinear(70, 50, gap_bits=gap_bits)
    layer.mask.copy_(torch.rand_like(layer.weight) < 0.1)
    nncx.save(nn.Sequential(layer.freeze()), file)


def _huge(tensors, config):
    config["in_features"] = 10**8


def _huge_and_empty(tensors, config):
    config["in_features"] = 10**11
    tensors["0.packed_weight"] = torch.zeros(0)
    tensors["0.gaps"] = torch.zeros(0, dtype=torch.uint8)


def _too_many(tensors, config):
    tensors["0.packed_weight"] = torch.ones(3501)
    tensors["0.gaps"] = torch.zeros(packed_size(3501, 5), dtype=torch.uint8)


def _beyond_the_end(tensors, config):
    tensors["0.gaps"].fill_(255)


def _one_gap_more(tensors, config):
    tensors["0.gaps"] = torch.cat([tensors["0.gaps"], torch.zeros(1, dtype=torch.uint8)])


def _other_bits(tensors, config):
    config["gap_bits"] = 4


def _no_such_bits(tensors, config):
    config["gap_bits"] = 9


def _a_matrix(tensors, config):
    tensors["0.packed_weight"] = tensors["0.packed_weight"][None]


def _integers(tensors, config):
    tensors["0.packed_weight"] = tensors["0.packed_weight"].int()


def _no_gaps(tensors, config):
    del tensors["0.gaps"]


_SIZE = r"'0\.(packed_weight|gaps)' must be torch\.\w+ \[{}\], got"  # whichever comes first

HOSTILE = {
    _huge: _SIZE.format("(5000000000|3125000000)"),
    _huge_and_empty: _SIZE.format("(5000000000000|3125000000000)"),
    _too_many: _SIZE.format("(3500|2188)"),
    _beyond_the_end: "do not suit its layers .*entries must stand among 3500 weights, got one at",
    _one_gap_more: "'0.gaps' must be torch.uint8",
    _other_bits: "'0.gaps' must be torch.uint8",
    _no_such_bits: "cannot be built from its arguments .*a gap must be 1 to 8 bits, got 9",
    _a_matrix: _SIZE.format("(3500|2188)"),
    _integers: "'0.packed_weight' must be torch.float32 .* got torch.int32",
    _no_gaps: "it lacks the tensor '0.gaps'",
}


@pytest.mark.parametrize("forge", HOSTILE, ids=lambda forge: forge.__name__.strip("_"))
def test_hostile_files_are_refused(forge, tmp_path):
    file = tmp_path / "file"
    _save_frozen(file)
    nncx.load(file)
    tensors, metadata = _files.read(file)
    forge(tensors, metadata["architecture"]["children"]["0"]["config"])
    _files.write(file, tensors, metadata)
    with pytest.raises(ValueError, match=f"cannot be loaded: .*{HOSTILE[forge]}"):
        nncx.load(file)


def test_a_file_goes_into_a_frozen_model_of_other_survivors(tmp_path):
    class Net(nn.Sequential):
        pass

    def net():
        layer = PrunedLinear(70, 50)
        layer.mask.copy_(torch.rand_like(layer.weight) < 0.1)
        return Net(layer.freeze())

    first, second = net(), net()
    assert first[0].packed_weight.shape != second[0].packed_weight.shape
    with pytest.warns(UserWarning, match="load will not do without into="):
        nncx.save(first, tmp_path / "file")
    x = images(3, 70)
    assert torch.equal(nncx.load(tmp_path / "file", into=second)(x), first(x))


@pytest.mark.parametrize("cls, geometry", [(PrunedConv2d, (1, 1, 1)), (PrunedLinear, (1, 1))])
def test_other_widths_are_refused(cls, geometry):
    with pytest.raises(ValueError, match="the width of a gap must be 1 to 8 bits, got 0"):
        cls(*geometry, gap_bits=0)
