"""TTQ and INQ: what convert makes of a network, steps, masks of pruned layers, files."""

import copy

import pytest
import torch
from torch import nn

import nncx
from nncx import train
from nncx.compress import INQ, TTQ, BinaryConnect, Pruning, convert, freeze
from nncx.compress.ttq import parameter_groups
from nncx.models import MLP, VGG9, LeNet5, MobileNet, NiN, ResNet
from nncx.nn import INQConv2d, INQLinear, TTQConv2d, TTQLinear
from nncx.nn.inq import FREE

LAYERS = {TTQ: (TTQConv2d, TTQLinear), INQ: (INQConv2d, INQLinear)}
METHODS = [TTQ(), INQ()]


@pytest.fixture(params=METHODS, ids=["TTQ", "INQ"])
def method(request):
    return request.param


def _network():
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(4, 6, (3, 5), 2, (1, 2), groups=2, bias=False), nn.BatchNorm2d(6), nn.ReLU()),
        *(nn.Conv2d(6, 8, 3, padding="same"), nn.Dropout(0.1), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(8 * 16, 12), nn.ReLU(), nn.Linear(12, 5)),
    )


def _run_steps(model, method):
    if isinstance(method, INQ):
        for _ in method.steps(model):
            pass
    return model


def _compressed(model, method):
    layers = LAYERS[type(method)]
    return [name for name, m in model.named_modules() if isinstance(m, layers)]


# ---------------------------------------------------------------------------------------------
# convert


def test_ttq_leaves_the_first_and_the_last_layer_float_and_inq_none():
    assert _compressed(convert(_network(), TTQ()), TTQ()) == ["3", "7"]
    assert _compressed(convert(_network(), TTQ(), skip=[]), TTQ()) == ["0", "3", "7", "9"]
    assert _compressed(convert(_network(), INQ()), INQ()) == ["0", "3", "7", "9"]


def test_parameters_modes_and_settings_are_handed_over(method):
    model, plain = _network().eval(), _network()
    weight, bias = model[3].weight, model[7].bias
    if isinstance(method, TTQ):
        method, shown = TTQ(threshold=0.2), "threshold=0.2"
    else:
        method, shown = INQ(bits=3), "bits=3"
    assert convert(model, method) is model
    assert model[3].weight is weight and model[7].bias is bias
    assert not model[3].training and model[3].mask is None
    assert repr(model[3]) == f"{type(method).__name__}{repr(plain[3])[:-1]}, {shown})"
    assert [type(m) for m in model if not isinstance(m, LAYERS[type(method)])] == [
        type(new) for new, old in zip(plain, model, strict=True) if type(new) is type(old)
    ]


def test_what_does_not_train_still_does_not(method):
    model = _network()
    model[3].requires_grad_(False)
    convert(model, method)
    assert not any(p.requires_grad for p in model[3].parameters())
    assert all(p.requires_grad for p in model[7].parameters())


def test_inq_changes_nothing_before_its_steps():
    model, x = _network().eval(), torch.randn(2, 4, 8, 8)
    expected = model(x)
    assert torch.equal(convert(model, INQ())(x), expected)


def test_ttq_begins_near_the_float_network_and_not_at_the_ones_of_the_papers_code():
    model, x = _network().eval(), torch.randn(200, 4, 8, 8)
    expected = model(x).detach()

    def error(method):
        with torch.no_grad():
            outputs = convert(copy.deepcopy(model), method)(x)
        return ((outputs - expected).norm() / expected.norm()).item()

    assert error(TTQ()) < 1 and error(TTQ(initial=1.0)) > 10


@pytest.mark.parametrize(
    "model, size",
    [
        *((MLP(width=16), 28), (VGG9(width=4, hidden=8), 32), (LeNet5(), 28)),
        *((NiN(), 32), (ResNet(8, width=4), 16)),
        (MobileNet(width=0.25, small_images=True), 16),
    ],
    ids=lambda value: type(value).__name__,
)
def test_models_of_nncx_convert_train_freeze_and_come_back(model, size, method, tmp_path):
    model = copy.deepcopy(model)
    plain = [name for name, m in model.named_modules() if type(m) in (nn.Conv2d, nn.Linear)]
    expected = plain[1:-1] if isinstance(method, TTQ) else plain
    assert _compressed(convert(model, method), method) == expected
    x = torch.randn(2, model.in_channels, size, size)
    _run_steps(model, method)
    model(x).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    nncx.save(freeze(model), tmp_path / "model.safetensors")
    loaded = nncx.load(tmp_path / "model.safetensors")
    assert torch.equal(loaded(x), model(x)) and repr(loaded) == repr(model)
    assert _compressed(loaded, method) == expected


class _Block(nn.Module):
    """As torchvision's BasicBlock."""

    def __init__(self, inplanes, planes, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = None
        if stride != 1 or inplanes != planes:
            self.downsample = nn.Sequential(
                nn.Conv2d(inplanes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes)
            )

    def forward(self, x):
        identity = x if self.downsample is None else self.downsample(x)
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += identity
        return self.relu(out)


class _TorchvisionResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(_Block(8, 8), _Block(8, 8))
        self.layer2 = nn.Sequential(_Block(8, 16, 2), _Block(16, 16))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(16, 10)

    def forward(self, x):
        x = self.layer2(self.layer1(self.maxpool(self.relu(self.bn1(self.conv1(x))))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def test_a_resnet_of_torchvisions_form(method, tmp_path):
    model, x = _TorchvisionResNet(), torch.randn(2, 3, 32, 32)
    convert(model, method)
    names = _compressed(model, method)
    assert ("conv1" in names, "fc" in names) == (isinstance(method, INQ),) * 2
    assert {"layer1.0.conv1", "layer2.0.downsample.0", "layer2.1.conv2"} <= set(names)
    model(x).square().sum().backward()
    freeze(_run_steps(model, method))
    path = tmp_path / "model.safetensors"
    with pytest.warns(UserWarning, match="into="):
        nncx.save(model, path)
    assert torch.equal(nncx.load(path, into=_TorchvisionResNet())(x), model(x))


def test_after_ttq_another_method_takes_the_layers_that_it_left_float():
    for other in (INQ(), BinaryConnect()):
        model = convert(convert(_network(), TTQ()), other)
        kinds = [type(m).__name__ for m in model if isinstance(m, nn.Conv2d | nn.Linear)]
        name = type(other).__name__
        assert kinds == [f"{name}Conv2d", "TTQConv2d", "TTQLinear", f"{name}Linear"]


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: TTQ(threshold=1), "TTQ: threshold must be at least 0 and less than 1, got 1;"),
        (lambda: TTQ(threshold="a"), "TTQ: threshold must be at least 0 and less than 1, got 'a'"),
        (lambda: TTQ(initial=0), "TTQ: initial must be a positive float32, got 0;"),
        (lambda: TTQ(initial=float("inf")), "TTQ: initial must be a positive float32, got inf"),
        (lambda: TTQ(initial=1e99), "TTQ: initial must be a positive float32, got 1e"),
        (lambda: TTQ(initial="1"), "TTQ: initial must be a positive float32, got '1'"),
        (lambda: INQ(bits=1), "INQ: bits must be 2 to 8, got 1;"),
        (lambda: INQ(bits="5"), "INQ: bits must be 2 to 8, got '5'"),
        *(
            (lambda bad=bad: INQ(fractions=bad), "INQ: fractions must increase from above 0 to 1")
            for bad in [(), (0.5,), (0.5, 0.5, 1), (0.5, 0.4, 1), (0, 1), (0.5, 1, 1.5), 1, None]
        ),
        (lambda: INQ(fractions=("a", 1)), "INQ: fractions must increase"),
        (lambda: INQ(fractions=(float("nan"), 1)), "INQ: fractions must increase"),
    ],
)
def test_settings_that_cannot_be_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_settings_as_json_has_them():
    assert INQ(fractions=[0.5, 1]) == INQ(fractions=(0.5, 1.0))
    assert hash(INQ(fractions=[0.5, 1])) == hash(INQ(fractions=(0.5, 1)))


# ---------------------------------------------------------------------------------------------
# learning rates


@pytest.mark.parametrize("squared", [False, True])
def test_learned_values_step_in_proportion_to_their_size(squared):
    model = convert(_network(), TTQ())
    with torch.no_grad():
        model[3].negative.neg_()  # its size counts
    values = {p: abs(p.item()) for m in (model[3], model[7]) for p in (m.positive, m.negative)}
    groups = parameter_groups(model, 0.5, squared)
    rates = {p: group["lr"] for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(rates)
    assert rates.keys() == set(model.parameters())
    for parameter, rate in rates.items():
        size = values.get(parameter, 1)
        assert rate == pytest.approx(0.5 * (size**2 if squared else size))


def test_without_learned_values_there_are_no_such_groups():
    for model in (_network(), freeze(convert(_network(), TTQ()))):
        with pytest.raises(ValueError, match="must have a TTQ layer with float weights, got none"):
            parameter_groups(model, 0.1)


# ---------------------------------------------------------------------------------------------
# pruned layers


@pytest.fixture
def pruned():
    """Trained by weight decay too, which moves the weights behind the masks."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(8 * 16, 12), nn.ReLU(), nn.Linear(12, 3)),
    )
    pruning = Pruning(sparsity=0.7)
    for _ in pruning.steps(convert(model, pruning)):
        _fit(model, *_BATCH)
    return model


_BATCH = torch.randn(64, 1, 8, 8), torch.randint(3, (64,))


def _fit(model, images, labels):
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, weight_decay=1e-2)
    train.fit(model, [(images, labels)], epochs=2, optimizer=optimizer, progress=False)


def test_masks_are_taken_over_and_hold(pruned, method, tmp_path):
    masks = {name: m.mask for name, m in pruned.named_modules() if hasattr(m, "mask")}
    weights = {name: pruned.get_submodule(name).weight for name in masks}
    model = convert(pruned, method, skip=[])
    assert _compressed(model, method) == list(masks)
    for name in masks:
        layer = model.get_submodule(name)
        assert layer.mask is masks[name] and layer.weight is weights[name]
        assert layer.weight[~layer.mask].ne(0).any(), "so it matters that the mask holds"

    for _ in method.steps(model) if isinstance(method, INQ) else range(2):
        _fit(model, *_BATCH)
        for name, mask in masks.items():
            assert model.get_submodule(name)._values()[~mask].eq(0).all()
    path, images = tmp_path / "model.safetensors", _BATCH[0]
    nncx.save(model, path)
    assert repr(nncx.load(path)) == repr(model.eval()) and "masked=True" in repr(model)
    with torch.no_grad():
        assert torch.equal(nncx.load(path)(images), model(images))
        evaluated = model(images)
    assert torch.equal(freeze(model)(images), evaluated) and "masked" not in repr(model)
    for entropy in (False, True):
        nncx.save(model, path, entropy=entropy)
        assert torch.equal(nncx.load(path)(images), evaluated)


def test_methods_without_a_zero_and_frozen_pruned_layers_are_not_for_masks(pruned):
    assert not BinaryConnect().replaces(pruned[0])
    pruned[0].register_parameter("weight", None)
    assert not TTQ().replaces(pruned[0]) and TTQ().replaces(pruned[2])


# ---------------------------------------------------------------------------------------------
# the steps of INQ


def test_steps_say_what_they_did():
    model, method = convert(_network(), INQ()), INQ(fractions=(0.25, 1))
    assert [str(step) for step in method.steps(model)] == [
        "step 1 of 2: 552 of 2,208 weights quantised (0.25 of each layer)",
        "step 2 of 2: 2,208 of 2,208 weights quantised (1 of each layer)",
    ]
    assert list(method.steps(model)) == [], "all is done"


@pytest.mark.parametrize("fractions", [(1,), (0.5, 0.75, 0.875, 1), (0.3, 0.6, 0.8, 1)])
def test_each_layer_reaches_each_fraction(fractions):
    model = convert(_network(), INQ())
    layers = [m for m in model if isinstance(m, INQConv2d | INQLinear)]
    seen = []
    for step in INQ(fractions=fractions).steps(model):
        seen.append(step.fraction)
        for layer in layers:
            assert abs(layer.quantized - step.fraction * layer.weights) <= 0.5
        assert step.weights == sum(layer.weight.numel() for layer in layers)
    assert tuple(seen) == fractions
    assert all(len(layer._values().unique()) <= 17 for layer in layers)


def test_a_model_that_was_stored_in_the_middle_goes_on(tmp_path):
    """Also of a state dict; with the codebooks of its first weights, and what was held stays so."""
    method, images, labels = INQ(), torch.randn(32, 4, 8, 8), torch.randint(5, (32,))
    model = convert(_network(), method)
    for step in method.steps(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        train.fit(model, [(images, labels)], epochs=3, optimizer=optimizer, progress=False)
        if step.number == 2:
            break
    path = tmp_path / "model.safetensors"
    nncx.save(model, path)
    other = convert(_network(), method)
    other.load_state_dict(model.state_dict())
    for copied in (nncx.load(path), other):
        codes = {n: b.clone() for n, b in copied.named_buffers() if n.endswith("codes")}
        assert [step.number for step in method.steps(copied)] == [3, 4]
        for name, before in codes.items():
            after = copied.get_buffer(name)
            assert torch.equal(after[before != FREE], before[before != FREE])
        freeze(copied)


def test_a_run_that_is_interrupted_and_called_again_ends_the_same(tmp_path):
    """Each step with its checkpoint: finished ones only load their state."""
    images, labels = torch.randn(32, 4, 8, 8), torch.randint(5, (32,))

    def run(folder, stop=None):
        folder.mkdir(exist_ok=True)
        torch.manual_seed(0)
        model, method = convert(_network(), INQ()), INQ()
        for step in method.steps(model):
            optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
            checkpoint = folder / f"{step.number}.checkpoint"
            epochs = 1 if step.number == stop else 3
            train.fit(
                model,
                [(images, labels)],
                epochs=epochs,
                optimizer=optimizer,
                checkpoint=checkpoint,
                progress=False,
            )
            if step.number == stop:
                return None
        return model.state_dict()

    expected = run(tmp_path / "whole")
    assert run(tmp_path / "cut", stop=2) is None
    for name, tensor in run(tmp_path / "cut").items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize(
    "build",
    [
        _network,
        lambda: freeze(_run_steps(convert(_network(), INQ()), INQ())),
        lambda: convert(_network(), TTQ()),
    ],
)
def test_steps_need_layers_to_quantise(build):
    with pytest.raises(
        ValueError, match="INQ.steps: Sequential must have an INQ layer with a float"
    ):
        INQ().steps(build())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_steps_refuse_a_weight_that_is_not_finite(value):
    model = convert(_network(), INQ())
    model[7].weight.data[0, 0] = value
    with pytest.raises(
        ValueError, match="INQ.steps: '7' must have a finite weight, got NaN or inf"
    ):
        next(INQ().steps(model))
    assert all(m.quantized == 0 for m in model if isinstance(m, INQConv2d | INQLinear))


def test_freeze_names_the_layer_that_has_free_weights():
    model = convert(_network(), INQ())
    next(INQ().steps(model))
    with pytest.raises(
        ValueError, match="freeze: '0' must have all its weights quantised, got 90 of"
    ):
        freeze(model)
    assert not any(getattr(m, "frozen", False) for m in model)


# ---------------------------------------------------------------------------------------------
# learning


def test_a_network_learns_in_few_values(method):
    """Two classes that only a hidden layer tells apart: the sign of a product of two pixels."""
    torch.manual_seed(0)
    images = torch.randn(512, 1, 2, 2)
    labels = (images[:, 0, 0, 0] * images[:, 0, 0, 1] > 0).long()
    batches = list(zip(images.split(64), labels.split(64), strict=True))
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
    model.append(nn.Linear(64, 2))

    def fit(epochs):
        optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
        train.fit(model, batches, epochs=epochs, optimizer=optimizer, progress=False)

    fit(15)
    convert(model, method, skip=[])
    for _ in method.steps(model) if isinstance(method, INQ) else range(1):
        fit(10)
    assert train.error_rate(freeze(model), batches) < 10
