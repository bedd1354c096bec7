"""The methods Int8 and Half: what convert makes of a network, files, reports, training on."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import nncx
from nncx.compress import Half, Int8, convert, freeze
from nncx.compress.int8 import observe
from nncx.models import MLP, VGG9, ResNet
from nncx.nn import HalfConv2d, HalfLinear, Int8Conv2d, Int8Linear


def _network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding="same", padding_mode="circular", groups=2),
        nn.Flatten(),
        nn.Linear(8 * 36, 4),
    )


def _images(batch=16, channels=3, size=6):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(batch, channels, size, size, generator=generator)


@pytest.mark.parametrize(
    "method, shown, layers",
    [
        (Int8(), "", {"0": Int8Conv2d, "3": Int8Conv2d, "5": Int8Linear}),
        (
            Int8(per_channel=False, symmetric=True),
            ", per_channel=False, symmetric=True",
            {"0": Int8Conv2d, "3": Int8Conv2d, "5": Int8Linear},
        ),
        (Half(), ", storage=float16", {"0": HalfConv2d, "3": HalfConv2d, "5": HalfLinear}),
        (
            Half(torch.bfloat16),
            ", storage=bfloat16",
            {"0": HalfConv2d, "3": HalfConv2d, "5": HalfLinear},
        ),
    ],
)
def test_every_layer_is_swapped_and_keeps_its_parameters(method, shown, layers):
    model = _network().eval()
    plain, before = copy.deepcopy(model), dict(model.named_parameters())
    assert convert(model, method) is model
    assert {n: type(m) for n, m in model.named_children() if n in layers} == layers
    for name in layers:
        expected = repr(plain[int(name)])
        arguments = expected.partition("(")[2][:-1]
        assert repr(model[int(name)]) == f"{layers[name].__name__}({arguments}{shown})"
        assert not model[int(name)].training
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in after)
    assert isinstance(model[1], nn.BatchNorm2d) and isinstance(model[2], nn.ReLU)


def test_converting_draws_no_random_numbers():
    model = _network()
    before = torch.get_rng_state()
    convert(model, Int8())
    assert torch.equal(torch.get_rng_state(), before)


def test_ranges_come_from_batches_in_training_mode():
    model, x = _network(), _images()
    expected = copy.deepcopy(model).train()(x)
    convert(model, Int8())
    trained = model.train()(x)
    assert F.mse_loss(trained, expected) < 1e-3 * expected.var()
    for layer, seen in ((model[0], x), (model[3], None), (model[5], None)):
        low, high = layer.input_range.tolist()
        assert low <= 0 < high
        if seen is not None:
            assert (low, high) == (seen.min(), seen.max())


def test_observe_is_a_switch_for_all_layers():
    model, x = convert(_network(), Int8()), _images()
    model(x)
    assert observe(model, False) is model
    before = [layer.input_range.clone() for layer in (model[0], model[3], model[5])]
    model(10 * x)
    assert all(map(torch.equal, before, (model[i].input_range for i in (0, 3, 5))))
    observe(model)(10 * x)
    assert not torch.equal(before[0], model[0].input_range)
    with pytest.raises(ValueError, match="observe: Sequential must have an int8 layer, got none"):
        observe(_network())


@pytest.mark.parametrize(
    "build, x",
    [
        (lambda: ResNet(8, width=8), _images(8, 3, 16)),
        (lambda: VGG9(width=8, hidden=32), _images(8, 3, 32)),
        (lambda: MLP(width=128, depth=2), _images(8, 1, 28)),
    ],
)
def test_evaluation_is_training_and_close_to_float(build, x, tmp_path):
    """And so are the frozen network and that of the file."""
    torch.manual_seed(0)
    model = build()
    with torch.no_grad():
        model.train()(x)
        expected = copy.deepcopy(model).eval()(x)
        convert(model.eval(), Int8())
        for layer in model.modules():
            layer.training = isinstance(layer, Int8Conv2d | Int8Linear)  # BatchNorms stay
        model(x)
        simulated = observe(model, False)(x)
        evaluated = model.eval()(x)
        torch.testing.assert_close(evaluated, simulated, rtol=1e-3, atol=1e-3)
        signal, noise = expected.var(), F.mse_loss(evaluated, expected)
        assert noise < 0.02 * signal
        assert torch.equal(freeze(model)(x), evaluated)
        nncx.save(model, tmp_path / "model.safetensors")
        assert torch.equal(nncx.load(tmp_path / "model.safetensors")(x), evaluated)


def test_training_on_recovers_what_training_reached():
    """Quantization-aware training, on a problem that the float network solves."""
    torch.manual_seed(0)
    x = _images(128)
    target = (x.mean((1, 2)) > 0).long().sum(1) % 4
    model = _network()

    def train(steps):
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(model.train()(x), target).backward()
            optimizer.step()
        with torch.no_grad():
            return (model.eval()(x).argmax(1) == target).double().mean().item()

    reached = train(60)
    assert reached > 0.9
    convert(model, Int8(per_channel=False))
    assert train(20) >= reached - 0.02


@pytest.mark.parametrize(
    "method, bar", [(Int8(), 0.27), (Half(), 0.51), (Half(torch.bfloat16), 0.51)]
)
@pytest.mark.parametrize("build", [lambda: MLP(width=512, depth=3), lambda: VGG9(width=32)])
def test_files_are_as_small_as_claimed(build, method, bar, tmp_path):
    model = build()
    nncx.save(model, tmp_path / "float.safetensors")
    convert(model, method)
    if isinstance(method, Int8):
        for layer in model.modules():
            if isinstance(layer, Int8Conv2d | Int8Linear):
                layer.set_input_range(-1, 1)
    nncx.save(freeze(model), tmp_path / "small.safetensors")
    sizes = [(tmp_path / f"{name}.safetensors").stat().st_size for name in ("small", "float")]
    assert sizes[0] <= bar * sizes[1]


@pytest.mark.parametrize(
    "method, precision, bytes_each", [(Int8(), "int8", 1), (Half(), "float16 weights", 2)]
)
def test_report_counts_bytes_and_macs(method, precision, bytes_each):
    model, x = _network(), _images(2)
    before = nncx.report(model, x, repeats=1)
    convert(model, method).train()(x)
    unfrozen = nncx.report(model, x, repeats=1)
    assert unfrozen.macs == {f"{precision} (unfrozen)": before.total.macs}
    after = nncx.report(freeze(model), x, repeats=1)
    assert after.macs == {precision: before.total.macs}
    assert after.total.parameters == before.total.parameters
    row = next(row for row in after.layers if row.name == "3")
    scales = 4 * 8 + 4 + 1 if method == Int8() else 0
    assert row.bytes == 8 * 4 * 9 * bytes_each + 4 * 8 + scales


def test_freezing_before_any_batch_says_which_layer():
    with pytest.raises(ValueError, match="freeze: '0' must know the range of its input, got none"):
        freeze(convert(_network(), Int8()))


def test_other_dtypes_are_refused():
    with pytest.raises(ValueError, match="Half: dtype must be torch.float16 or torch.bfloat16, go"):
        Half(torch.float32)
