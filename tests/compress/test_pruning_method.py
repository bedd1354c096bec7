"""The method Pruning: which weights go, step by step, and what stays when a network trains on."""

import copy
import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import nncx
from nncx.compress import (
    Pruning,
    adjust_dropout,
    convert,
    freeze,
    pruning_sensitivity,
    remove_masks,
)
from nncx.nn import PrunedConv2d, PrunedLinear


def _network():
    """For images [N, 3, 6, 6]."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1, groups=1), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(288, 20), nn.ReLU(), nn.Linear(20, 5)),
    )


def _images(batch=4):
    return torch.randn(batch, 3, 6, 6, generator=torch.Generator().manual_seed(batch))


def _pruned(model, method):
    """After all steps, without any training."""
    return list(method.steps(convert(model, method)))


def _masks(model):
    return {name: m.mask.numpy() for name, m in model.named_modules() if hasattr(m, "mask")}


def _weights(model):
    kinds = (nn.Conv2d, nn.Linear)
    return {n: m.weight.detach().numpy() for n, m in model.named_modules() if isinstance(m, kinds)}


# ---------------------------------------------------------------------------------------------
# which weights go, by NumPy


def _kept_by_share(weight, share):
    """Not those that sort first by magnitude."""
    flat = np.abs(weight).ravel()
    keep = np.ones(flat.size, dtype=bool)
    keep[np.argsort(flat, kind="stable")[: round(share * flat.size)]] = False
    return keep.reshape(weight.shape)


def test_convert_swaps_every_layer_and_prunes_nothing():
    model, plain = _network(), _network()
    weight, x = model[4].weight, _images()
    assert convert(model, Pruning(sparsity=0.9, gap_bits=3)) is model
    assert type(model[0]) is PrunedConv2d and type(model[6]) is PrunedLinear
    assert model[4].weight is weight and model[4].gap_bits == 3
    assert torch.equal(model(x), plain(x))


def test_sparsity_of_each_layer():
    model = _network()
    wanted = {name: _kept_by_share(weight, 0.7) for name, weight in _weights(model).items()}
    (step,) = _pruned(model, Pruning(sparsity=0.7))
    assert all(np.array_equal(mask, wanted[name]) for name, mask in _masks(model).items())
    assert wanted.keys() == _masks(model).keys() == {row.name for row in step.layers}
    for row in step.layers:
        assert row.survivors == wanted[row.name].sum() and row.weights == wanted[row.name].size


def test_sparsity_by_name_leaves_the_others():
    model = _network()
    weight = _weights(model)["4"]
    _pruned(model, Pruning(sparsity={"4": 0.9}))
    masks = _masks(model)
    assert np.array_equal(masks["4"], _kept_by_share(weight, 0.9))
    assert masks["0"].all() and masks["6"].all()


def test_sparsity_of_all_together():
    model = _network()
    weights = _weights(model)
    flat = np.concatenate([np.abs(weight).ravel() for weight in weights.values()])
    bound = np.sort(flat)[round(0.8 * flat.size)]
    (step,) = _pruned(model, Pruning(sparsity=0.8, scope="global"))
    for name, mask in _masks(model).items():
        assert np.array_equal(mask, np.abs(weights[name]) >= bound)
    assert step.sparsity == pytest.approx(0.8, abs=1 / flat.size)


@pytest.mark.parametrize("q", [0.5, {"0": 0.25, "6": 1.0}])
def test_deviations(q):
    model = _network()
    weights = {name: weight.astype(np.float64) for name, weight in _weights(model).items()}
    _pruned(model, Pruning(deviations=q))
    for name, mask in _masks(model).items():
        bound = (q.get(name, 0.0) if isinstance(q, dict) else q) * weights[name].std()
        assert np.array_equal(mask, np.abs(weights[name]) >= bound)


def test_deviations_again_are_of_the_survivors():
    model = _network()
    weight = _weights(model)["4"].astype(np.float64)
    _pruned(model, Pruning(deviations=0.5, rounds=2))
    first = np.abs(weight) >= 0.5 * weight.std()
    second = first & (np.abs(weight) >= 0.5 * weight[first].std())
    assert np.array_equal(_masks(model)["4"], second) and second.sum() < first.sum()


def test_neurons_go_as_a_whole_but_outputs():
    model = _network()
    weights = _weights(model)
    (step,) = _pruned(model, Pruning(sparsity=0.5, structure="neuron"))
    masks = _masks(model)
    for name in ("0", "4"):
        rows = weights[name].reshape(len(weights[name]), -1)
        keep = _kept_by_share(np.sqrt(np.square(rows).mean(1)), 0.5)
        assert np.array_equal(masks[name].reshape(rows.shape), np.tile(keep, (rows.shape[1], 1)).T)
    assert masks["6"].all(), "the outputs of the network"
    assert step.sparsity == pytest.approx((27 * 4 + 288 * 10) / (27 * 8 + 288 * 20 + 100))


def test_neurons_of_all_layers_compete_by_their_mean():
    model = _network()
    with torch.no_grad():
        model[0].weight.mul_(100)
    _pruned(model, Pruning(sparsity=8 / 28, scope="global", structure="neuron"))
    assert _masks(model)["0"].all() and _masks(model)["4"].any(1).sum() == 12


def test_outputs_that_are_named_lose_neurons():
    model = _network()
    _pruned(model, Pruning(sparsity={"6": 0.4}, structure="neuron"))
    assert _masks(model)["6"].any(1).sum() == 3 and _masks(model)["4"].all()


@given(st.floats(0, 1, exclude_max=True), st.integers(1, 40), st.integers(0, 3))
def test_one_weight_stays_always_and_equals_go_in_order(share, count, distinct):
    model = nn.Sequential(nn.Linear(count, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.arange(count) % (distinct + 1))
    wanted = _kept_by_share(_weights(model)["0"], min(share, (count - 1) / count))
    _pruned(model, Pruning(sparsity=share))
    assert np.array_equal(_masks(model)["0"], wanted) and wanted.any()


# ---------------------------------------------------------------------------------------------
# steps


@pytest.mark.parametrize("sparsity", [0.9, {"0": 0.4, "4": 0.95}])
def test_rounds_keep_the_same_share_each(sparsity):
    model, method = _network(), Pruning(sparsity=sparsity, rounds=3)
    steps = _pruned(model, method)
    assert [(step.number, step.count) for step in steps] == [(1, 3), (2, 3), (3, 3)]
    for i, step in enumerate(steps, 1):
        for row in step.layers:
            target = sparsity.get(row.name, 0.0) if isinstance(sparsity, dict) else sparsity
            kept = (1 - target) ** (i / 3)
            assert row.survivors == pytest.approx(kept * row.weights, abs=0.51)


def test_a_list_is_a_schedule():
    steps = _pruned(_network(), Pruning(sparsity=[0.2, {"4": 0.5}, 0.6]))
    kept = [{row.name: round(row.survivors / row.weights, 1) for row in s.layers} for s in steps]
    assert kept == [
        {"0": 0.8, "4": 0.8, "6": 0.8},
        {"0": 0.8, "4": 0.5, "6": 0.8},
        {"0": 0.4, "4": 0.4, "6": 0.4},
    ]


def _train(model, seed, optimizer=None):
    """A few steps towards random targets."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = optimizer or torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        output = model(torch.randn(4, 3, 6, 6, generator=generator))
        (output - torch.randn(4, 5, generator=generator)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("structure", ["connection", "neuron"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_what_is_pruned_stays_pruned(scope, structure):
    method = Pruning(sparsity=[0.5, 0.3, 0.6], scope=scope, structure=structure)
    model = convert(_network(), method)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=1e-2)
    before, sparsities = None, []
    for step in method.steps(model):
        masks = {name: mask.copy() for name, mask in _masks(model).items()}
        if before is not None:
            assert not any((masks[name] & ~before[name]).any() for name in masks)
        before = masks
        sparsities.append(step.sparsity)
        _train(model, step.number, optimizer)
    assert sparsities[0] == sparsities[1] < sparsities[2], "less than before changes nothing"


def test_regrow_brings_weights_back():
    method = Pruning(sparsity=0.5, rounds=1, regrow=True)
    model = nn.Sequential(nn.Linear(4, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    _pruned(model, method)
    assert _masks(model)["0"].tolist() == [[False, False, True, True]]
    with torch.no_grad():
        model[0].weight[0, 3] = 0.5
    list(method.steps(model))
    assert _masks(model)["0"].tolist() == [[False, True, True, False]]
    list(Pruning(sparsity=0.5).steps(model))
    assert _masks(model)["0"].tolist() == [[False, True, True, False]]


@pytest.mark.parametrize("settings", [{"sparsity": 0.9}, {"deviations": 0.4}])
def test_resumed_in_mid_schedule_it_ends_in_the_same_bits(settings, tmp_path):
    method = Pruning(**settings, rounds=4)
    model = convert(_network(), method)
    for step in method.steps(model):
        if step.number == 3:
            nncx.save(model, tmp_path / "middle")  # pruned, and not yet trained
        _train(model, step.number)
    resumed = nncx.load(tmp_path / "middle").train()
    _train(resumed, 3)
    for step in method.steps(resumed, done=3):
        assert step.number == 4
        _train(resumed, step.number)
    for name, tensor in model.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


def test_fits_with_checkpoints_resume_to_the_same_bits(tmp_path):
    """An interrupted run, started anew: what was finished is loaded, mask and all."""
    data = [(_images(), torch.tensor([0, 1, 2, 3]))]

    def run(fits):
        method = Pruning(sparsity=0.9, rounds=3)
        model = convert(_network(), method)
        for step in itertools.islice(method.steps(model), fits):
            optimizer = torch.optim.Adam(model.parameters(), weight_decay=1e-3)
            checkpoint = tmp_path / f"step-{step.number}"
            nncx.train.fit(
                *(model, data), epochs=2, optimizer=optimizer, checkpoint=checkpoint, progress=False
            )
        return model.state_dict()

    run(2)
    with_checkpoints = run(3)
    for file in tmp_path.iterdir():
        file.unlink()
    for name, tensor in run(3).items():
        assert torch.equal(with_checkpoints[name], tensor), name


@pytest.mark.parametrize("training", [True, False])
def test_pruned_trained_frozen_saved_and_loaded_give_the_same_bits(training, tmp_path):
    method, x = Pruning(sparsity=0.8), _images()
    model = convert(_network(), method).train(training)
    for _ in method.steps(model):
        pass
    if training:
        _train(model, 1)
    with torch.no_grad():
        expected = model.eval()(x)
    nncx.save(freeze(model), tmp_path / "file")
    assert torch.equal(model(x), expected) and torch.equal(
        nncx.load(tmp_path / "file")(x), expected
    )


class _Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.b.weight = self.a.weight
        self.again = self.c

    def forward(self, x):
        return self.again(self.c(self.b(self.a(x))))


@pytest.mark.parametrize("sparsity", [0.5, {"b": 0.5, "again": 0.5}])
def test_layers_that_share_a_weight_share_what_is_pruned(sparsity, tmp_path):
    model = convert(_Tied(), Pruning(sparsity=sparsity), rewire=False)
    (step,) = Pruning(sparsity=sparsity).steps(model)
    assert [(row.name, row.survivors) for row in step.layers] == [("a", 18), ("c", 18)]
    assert model.a.weight is model.b.weight and torch.equal(model.a.mask, model.b.mask)
    assert model.c is model.again
    before, x = model.a.weight.detach().clone(), torch.randn(2, 6)
    model(x).square().sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert torch.equal((before != model.a.weight), model.a.mask)
    with torch.no_grad():
        expected = model.eval()(x)
    assert torch.equal(freeze(model)(x), expected)


def test_layers_that_share_a_weight_must_agree():
    method = Pruning(sparsity={"a": 0.5, "b": 0.25})
    model = convert(_Tied(), method, rewire=False)
    with pytest.raises(ValueError, match=r"share a weight must lose the same, got \[0.25, 0.5\]"):
        method.steps(model)


def test_a_step_is_printed_and_is_json():
    *_, step = _pruned(_network(), Pruning(sparsity=0.9, rounds=2))
    lines = str(step).splitlines()
    assert lines[0].split() == ["step", "2/2", "weights", "left", "%"]
    assert lines[2].split() == ["0", "216", "22", "10.19"]
    assert lines[-1].split() == ["all", "6,076", "608", "10.01"]
    assert json.loads(json.dumps(step.to_dict()))["layers"][0] == {
        "name": "0",
        "weights": 216,
        "survivors": 22,
    }


# ---------------------------------------------------------------------------------------------
# around it


@pytest.mark.parametrize("frozen", [True, False])
def test_without_masks_it_is_a_plain_network_with_zeros(frozen):
    model, x = _network(), _images()
    _pruned(model, Pruning(sparsity=0.8))
    weight, bias = model[4].weight, model[4].bias
    with torch.no_grad():
        expected = model.eval()(x)
    zeros = {name: ~mask.copy() for name, mask in _masks(model).items()}
    if frozen:
        freeze(model)
    assert remove_masks(model) is model and not model.training
    assert type(model[0]) is nn.Conv2d and type(model[4]) is nn.Linear
    assert frozen or (model[4].weight is weight and model[4].bias is bias)
    with torch.no_grad():
        assert torch.equal(model(x), expected)
    for name, array in _weights(model).items():
        assert np.array_equal(array == 0, zeros[name])
    model(x).sum().backward()
    assert model[4].weight.grad is not None and model[4].bias.grad is not None
    assert repr(model) == repr(_network())


def test_without_masks_shared_layers_stay_shared():
    model = convert(_Tied(), Pruning(sparsity=0.5), rewire=False)
    list(Pruning(sparsity=0.5).steps(model))
    remove_masks(model)
    assert model.c is model.again and model.a.weight is model.b.weight
    assert (model.a.weight == 0).sum() == 18


def test_remove_masks_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="Sequential must have a pruned layer, got none"):
        remove_masks(_network())
    with pytest.raises(ValueError, match="got a bare PrunedLinear; wrap it in nn.Sequential"):
        remove_masks(PrunedLinear(3, 4))
    model = convert(_network(), Pruning(sparsity=0.5))
    model[4].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="remove_masks: '4' must be a plain layer, got one with"):
        remove_masks(model)
    assert type(model[0]) is PrunedConv2d


def _with_dropouts():
    return nn.Sequential(
        *(nn.Dropout(0.2), nn.Linear(10, 20), nn.ReLU(), nn.Dropout(0.5), nn.Unflatten(1, (5, 4))),
        *(nn.Flatten(), nn.Linear(20, 8), nn.Dropout(0.5), nn.ReLU()),
    )


def test_dropouts_follow_what_is_left():
    model, method = _with_dropouts(), Pruning(sparsity={"1": 0.75, "6": 0.64}, rounds=2)
    convert(model, method)
    for step in method.steps(model):
        left = [row.survivors / row.weights for row in step.layers]
        rates = adjust_dropout(model, {"0": 0.2, "3": 0.5})
        assert rates == {"0": model[0].p, "3": model[3].p}
        assert model[0].p == pytest.approx(0.2 * left[0] ** 0.5)
        assert model[3].p == pytest.approx(0.5 * left[1] ** 0.5)
    assert left == [0.25, pytest.approx(0.36, abs=0.01)] and model[7].p == 0.5
    assert adjust_dropout(model, 0.4) == adjust_dropout(freeze(model), 0.4)
    assert model[0].p == pytest.approx(0.2)


def test_adjust_dropout_refuses_what_it_cannot_do():
    model = convert(_with_dropouts(), Pruning(sparsity=0.5))
    with pytest.raises(ValueError, match="got '7'; the model has 0, 3"):
        adjust_dropout(model, {"7": 0.5})
    with pytest.raises(ValueError, match="a rate must be at least 0 and at most 1, got 1.5"):
        adjust_dropout(model, 1.5)
    with pytest.raises(ValueError, match="must have an nn.Dropout before a pruned layer, got none"):
        adjust_dropout(convert(_network(), Pruning(sparsity=0.5)), 0.5)

    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(ValueError, match="adjust_dropout: torch.fx must be able to trace Branch"):
        adjust_dropout(Branching(), 0.5)


@pytest.mark.parametrize("before", ["float", "pruned", "pruned, in eval mode"])
def test_the_scan_prunes_each_layer_alone_and_changes_nothing(before):
    model = _network()
    if before != "float":
        _pruned(model, Pruning(sparsity=0.3))
        model.train(before == "pruned")
    whole = copy.deepcopy(model.state_dict())
    seen = []

    def metric(network):
        with torch.no_grad():
            network(_images())  # refused if it is stale
        layers = [network[i] for i in (0, 4, 6)]
        seen.append([1 - layer.survivors / layer.weight.numel() for layer in layers])
        return len(seen)

    scan = pruning_sensitivity(model, metric, [0.5, 0.9])
    base = 0.0 if before == "float" else 0.3
    wanted = [[base] * 3 for _ in range(7)]
    for i, share in enumerate([0.5, 0.9] * 3):
        wanted[i][i // 2] = share
    assert np.allclose(seen, wanted, atol=0.01)
    kinds = [type(model[i]).__name__ for i in (0, 4, 6)]
    assert [(row.name, row.type) for row in scan.rows] == [*zip("046", kinds, strict=True)]
    assert [row.metrics for row in scan.rows] == [(1.0, 2.0), (3.0, 4.0), (5.0, 6.0)]
    assert scan.metric == 7.0 and scan.amounts == (0.5, 0.9) and "-90%" in str(scan)
    assert all(torch.equal(whole[name], tensor) for name, tensor in model.state_dict().items())


def test_the_scan_of_neurons_leaves_out_the_outputs():
    scan = pruning_sensitivity(_network(), lambda model: 0.0, [0.5], structure="neuron")
    assert [(row.name, row.parts) for row in scan.rows] == [("0", 8), ("4", 20)]
    assert scan.unit == "neurons"


# ---------------------------------------------------------------------------------------------
# bad input


@pytest.mark.parametrize(
    "settings, message",
    [
        ({}, "sparsity or deviations must be given, one of them, got 0 of them"),
        ({"sparsity": 0.5, "deviations": 1.0}, "one of them, got 2 of them"),
        ({"sparsity": 1.0}, "a share of at least 0 and below 1, got 1.0"),
        ({"sparsity": -0.1}, "a share of at least 0 and below 1, got -0.1"),
        ({"sparsity": "0.5"}, "a share of at least 0 and below 1, got '0.5'"),
        ({"sparsity": True}, "a share of at least 0 and below 1, got True"),
        ({"sparsity": {"fc1": 90}}, "a share of at least 0 and below 1, got 90"),
        ({"sparsity": [0.5, 1.5]}, "a share of at least 0 and below 1, got 1.5"),
        ({"sparsity": []}, "sparsity must be a number, by layer or a list, got an empty list"),
        ({"deviations": -1}, "deviations must be at least 0 and finite, got -1"),
        ({"deviations": float("nan")}, "deviations must be at least 0 and finite, got nan"),
        ({"sparsity": 0.5, "rounds": 0}, "rounds must be an integer of at least 1, got 0"),
        ({"sparsity": 0.5, "rounds": 2.5}, "rounds must be an integer of at least 1, got 2.5"),
        ({"sparsity": [0.5], "rounds": 2}, "a list has a step for each of its items, got rounds=2"),
        ({"sparsity": 0.5, "scope": "all"}, "scope must be 'layer' or 'global', got 'all'"),
        ({"deviations": 0.5, "scope": "global"}, "must have one sparsity for all layers, got dev"),
        ({"sparsity": [{"a": 0.5}], "scope": "global"}, "one sparsity for all layers, got spars"),
        ({"sparsity": 0.5, "structure": "row"}, "'connection' or 'neuron', got 'row'"),
        ({"sparsity": 0.5, "gap_bits": 9}, "the width of a gap must be 1 to 8 bits, got 9"),
        ({"sparsity": 0.5, "gap_bits": 1.5}, "the width of a gap must be 1 to 8 bits, got 1.5"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Pruning(**settings)


def test_steps_refuse_at_once_what_they_cannot_prune():
    method = Pruning(sparsity=0.5)
    with pytest.raises(ValueError, match="Sequential must have pruned layers with float weights"):
        method.steps(_network())
    model = convert(_network(), method)
    with pytest.raises(ValueError, match="must be of a pruned layer, got '5'; the model has 0, 4"):
        Pruning(sparsity=[0.5, {"5": 0.5}]).steps(model)
    for done in (-1, 2):
        with pytest.raises(ValueError, match=f"done must be 0 to 1 steps, got {done}"):
            method.steps(model, done)
    with pytest.raises(ValueError, match="must have pruned layers with float weights, got none"):
        method.steps(freeze(model))
    with pytest.raises(ValueError, match="must have a layer before the outputs, got only '0'"):
        single = convert(nn.Sequential(nn.Linear(4, 2)), method)
        Pruning(sparsity=0.5, scope="global", structure="neuron").steps(single)


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize("structure", ["connection", "neuron"])
def test_a_layer_without_weights_is_nothing_to_prune(structure):
    model = nn.Sequential(nn.Linear(0, 3), nn.ReLU(), nn.Linear(3, 2))
    (step,) = _pruned(model, Pruning(sparsity={"0": 0.5, "2": 0.5}, structure=structure))
    assert [row.survivors for row in step.layers] == [0, 3]


def test_a_step_that_cannot_be_changes_nothing():
    model = convert(_network(), Pruning(sparsity=0.5))
    with torch.no_grad():
        model[6].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="must be finite, got NaN or infinity in '6'"):
        next(Pruning(sparsity=0.5).steps(model))
    assert all(mask.all() for mask in _masks(model).values())
    with torch.no_grad():
        model[6].weight.fill_(1e-9)
        model[6].weight[0, 0] = -1e-9
    for hopeless in (Pruning(deviations=5.0), Pruning(sparsity=0.99, scope="global")):
        with pytest.raises(ValueError, match="must keep a weight, got none left of '"):
            next(hopeless.steps(model))
        assert all(mask.all() for mask in _masks(model).values())


# ---------------------------------------------------------------------------------------------
# what follows


@pytest.mark.parametrize("method", [nncx.TTQ(), nncx.INQ(), nncx.DeepCompression()])
def test_methods_of_few_values_keep_what_is_pruned(method, tmp_path):
    model, x = _network(), _images()
    _pruned(model, Pruning(sparsity=0.8))
    zeros = {name: torch.from_numpy(~mask.copy()) for name, mask in _masks(model).items()}
    convert(model, method, skip=[])
    for _ in getattr(method, "steps", lambda model: ())(model):
        pass
    model(x).square().sum().backward()
    torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=1e-2).step()
    with torch.no_grad():
        expected = model.eval()(x)
    for name, zero in zeros.items():
        assert not model.get_submodule(name)._values()[zero].any()
    nncx.save(freeze(model), tmp_path / "file", entropy=True)
    torch.testing.assert_close(nncx.load(tmp_path / "file")(x), expected)
