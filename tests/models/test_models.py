"""What holds for every network: counts, shapes, rebuilding, tracing, exporting."""

import inspect

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from nncx import models
from nncx.models import (
    MLP,
    VGG9,
    FitNet19,
    LeNet4,
    LeNet5,
    LeNet300100,
    MobileNet,
    NiN,
    ResNet,
    ShuffleNet,
    ShuffleNetV2,
)

SMALL = [
    FitNet19(2, 5),
    LeNet300100(1, 10, 8),
    LeNet4(1, 10, 8, widths=(4, 8, 16)),
    LeNet5(1, 10, 8, padding=2),
    LeNet5(3, 7, 32),
    LeNet5(1, 10, 8, padding=2, norm=True),
    MLP(1, 10, 8, width=12, depth=2, input_dropout=0.1, dropout=0.2),
    MLP(2, 3, 8, width=12, depth=1),
    MobileNet(1, 5, width=0.1, small_images=True),
    MobileNet(2, 10, width=0.25),
    NiN(1, widths=(9, 8, 7, 6, 5, 4, 3, 2), kernels=(1, 3, 5)),
    ResNet(8, 1, width=4),
    ResNet(14, 3, num_classes=5, width=5),  # an odd number of channels to pad
    ResNet(20, 1, width=3, block="bottleneck"),
    ShuffleNet(1, 5, groups=2, width=0.2, small_images=True),
    ShuffleNet(3, 10, groups=3, width=0.25),
    ShuffleNetV2(1, 5, width=0.5, small_images=True),
    ShuffleNetV2(3, 10, width=0.5),
    VGG9(3, 10, 11, width=4, hidden=12),
]


def name_of(model: nn.Module) -> str:
    return type(model).__name__ + "-".join(str(v) for v in arguments_of(model).values())


def arguments_of(model: nn.Module) -> dict[str, object]:
    return {name: getattr(model, name) for name in inspect.signature(type(model)).parameters}


def images_for(model: nn.Module, count: int = 2, size: int = 8) -> torch.Tensor:
    size = getattr(model, "image_size", size)
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, model.in_channels, size, size, generator=generator)


every_model = pytest.mark.parametrize("model", SMALL, ids=name_of)


@pytest.mark.parametrize(
    "model, parameters",
    [
        (FitNet19(), 2_742_102),
        (LeNet300100(), 266_610),
        (LeNet5(), 431_080),
        (LeNet5(norm=True), 431_080 - (20 + 50 + 500) + 2 * (20 + 50 + 500)),
        (LeNet4(), 3_274_634),
        (MLP(), 2_910_208 + 2 * (3 * 1024 + 10)),
        (NiN(), 966_986),
        (NiN(1), 957_386),
        (models.by_name("ninmnist", in_channels=1), 349_674),
        (ResNet(20), 269_722),
        (ResNet(20, num_classes=100), 275_572),
        (ResNet(164), 2_602_906),
        (models.by_name("resnet164", block="bottleneck"), 1_703_258),
        (VGG9(), 14_022_016 + 2 * (2 * (128 + 256 + 512) + 2 * 1024 + 10)),
    ],
    ids=lambda value: name_of(value) if isinstance(value, nn.Module) else None,
)
def test_parameters_are_the_published_count(model, parameters):
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_vgg9_has_the_weights_of_the_paper():
    weights = [m.weight for m in VGG9().modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(weights) == 9 and sum(w.numel() for w in weights) == 14_022_016


def test_every_layer_of_binary_connects_networks_has_a_batchnorm_behind_it():
    for model in (MLP(width=8), VGG9(width=2, hidden=8)):
        kinds = [m for m in model.modules() if isinstance(m, _NORMED)]
        for layer, norm in zip(kinds[::2], kinds[1::2], strict=True):
            assert isinstance(layer, nn.Conv2d | nn.Linear) and layer.bias is None
            assert isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.eps == 1e-4


_NORMED = (nn.Conv2d, nn.Linear, nn.modules.batchnorm._BatchNorm)


@pytest.mark.parametrize(
    "model, size, macs",
    [
        (LeNet300100(), 28, 784 * 300 + 300 * 100 + 100 * 10),
        (LeNet5(), 28, 24 * 24 * 20 * 25 + 8 * 8 * 50 * 20 * 25 + 800 * 500 + 500 * 10),
        (LeNet4(), 28, 28**2 * 32 * 25 + 14**2 * 64 * 32 * 25 + 3136 * 1024 + 1024 * 10),
        (MLP(), 28, 784 * 1024 + 2 * 1024**2 + 1024 * 10),
        (
            VGG9(),
            32,
            9 * 32**2 * (3 * 128 + 128 * 128)
            + 9 * 16**2 * (128 * 256 + 256 * 256)
            + 9 * 8**2 * (256 * 512 + 512 * 512)
            + 8192 * 1024
            + 1024 * 1024
            + 1024 * 10,
        ),
        (
            NiN(),
            32,
            32**2 * (75 * 192 + 192 * 160 + 160 * 96)
            + 16**2 * (25 * 96 * 192 + 2 * 192 * 192)
            + 8**2 * (9 * 192 * 192 + 192 * 192 + 192 * 10),
        ),
        (
            ResNet(20),
            32,
            32**2 * 9 * (3 * 16 + 6 * 16 * 16)
            + 16**2 * 9 * (16 * 32 + 5 * 32 * 32)
            + 8**2 * 9 * (32 * 64 + 5 * 64 * 64)
            + 64 * 10,
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_macs(model, size, macs):
    with FlopCounterMode(display=False) as counter:
        model.to("meta").eval()(images_for(model, 1, size).to("meta"))
    assert counter.get_total_flops() == 2 * macs


@pytest.mark.parametrize(
    "depth, block, millions",
    [(20, "basic", 40.55), (164, "basic", 380.29), (164, "bottleneck", 244.50)],
)
def test_resnets_have_the_published_macs(depth, block, millions):
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        ResNet(depth, block=block).eval()(torch.zeros(1, 3, 32, 32))
    assert round(counter.get_total_flops() / 2e6, 2) == millions


def test_the_depths_of_the_talk_exist():
    with torch.device("meta"):
        for depth in (8, 14, 20, 26, 32, 44, 56, 110, 164):
            layers = [m for m in ResNet(depth).modules() if isinstance(m, nn.Conv2d | nn.Linear)]
            assert len(layers) == depth


@pytest.mark.parametrize("size", [8, 28, 32])
@pytest.mark.parametrize(
    "name",
    [
        *("fitnet19", "lenet300100", "lenet4", "lenet5", "lenet5 norm", "mlp", "mobilenet", "nin"),
        *("ninmnist", "resnet8", "resnet14", "shufflenet", "shufflenetv2", "vgg9"),
    ],
)
def test_image_sizes(name, size):
    name, _, norm = name.partition(" ")
    options = {"padding": 2, "norm": bool(norm)} if name == "lenet5" else {}
    model = models.by_name(name, in_channels=2, num_classes=3, image_size=size, **options)
    images = torch.randn(4, 2, size, size)
    logits = model.train()(images)
    logits.sum().backward()
    assert logits.shape == (4, 3)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@every_model
def test_arguments_rebuild_the_model(model):
    rebuilt = type(model)(**arguments_of(model))
    rebuilt.load_state_dict(model.state_dict())
    images = images_for(model)
    assert torch.equal(rebuilt.eval()(images), model.eval()(images))


@every_model
def test_no_non_linearity_is_shared_or_hidden(model):
    calls = []
    relus = [m for m in model.modules() if isinstance(m, nn.ReLU)]
    hooks = [m.register_forward_hook(lambda m, *_: calls.append(m)) for m in relus]
    graph = torch.fx.symbolic_trace(model).graph
    model(images_for(model))
    for hook in hooks:
        hook.remove()
    assert calls == list(dict.fromkeys(calls)) and len(calls) == len(relus)
    targets = {str(node.target) for node in graph.nodes if node.op != "call_module"}
    assert not any("relu" in target for target in targets)


@every_model
def test_logits_do_not_depend_on_the_rest_of_the_batch(model):
    images = images_for(model, 5)
    with torch.no_grad():
        together = model.eval()(images)
        alone = torch.cat([model(image[None]) for image in images])
    torch.testing.assert_close(together, alone)


@every_model
def test_symbolic_trace(model):
    images = images_for(model)
    traced = torch.fx.symbolic_trace(model.eval())
    assert torch.equal(traced(images), model(images))


@every_model
def test_export_with_dynamic_batch(model):
    batch = torch.export.Dim("batch")
    program = torch.export.export(
        model.eval(), (images_for(model),), dynamic_shapes={"x": {0: batch}}
    )
    images = images_for(model, 5)
    torch.testing.assert_close(program.module()(images), model(images))


@every_model
def test_same_seed_same_weights(model):
    def weights():
        torch.manual_seed(3)
        return type(model)(**arguments_of(model)).state_dict()

    first, second = weights(), weights()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("fitnet19", FitNet19),
        ("lenet300100", LeNet300100),
        ("lenet4", LeNet4),
        ("lenet5", LeNet5),
        ("mlp", MLP),
        ("mobilenet", MobileNet),
        ("nin", NiN),
        ("ninmnist", NiN),
        ("shufflenet", ShuffleNet),
        ("shufflenetv2", ShuffleNetV2),
        ("vgg9", VGG9),
        ("resnet20", ResNet),
    ],
)
def test_by_name(name, expected):
    model = models.by_name(name, in_channels=1, num_classes=4, image_size=20)
    assert type(model) is expected
    assert model.num_classes == 4 and model.in_channels == 1
    assert getattr(model, "image_size", 20) == 20
    assert type(model) is not ResNet or model.depth == 20


@pytest.mark.parametrize("name", ["resnet", "ResNet20", "resnet20x", "alexnet", ""])
def test_by_name_lists_the_valid_names(name):
    with pytest.raises(
        ValueError,
        match="one of fitnet19, lenet300100, lenet4, .*shufflenetv2, vgg9, resnet<depth>",
    ):
        models.by_name(name)


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: ResNet(21), r"depth must be 6n\+2 .* got 21"),
        (lambda: ResNet(32, block="bottleneck"), r"depth must be 9n\+2 \(11, 20, .* got 32"),
        (lambda: ResNet(20, block="wide"), "block must be one of basic, bottleneck, got 'wide'"),
        (lambda: ResNet(2), "depth must be an integer of at least 8, got 2"),
        (lambda: ResNet(20.0), "depth must be an integer of at least 8, got 20.0"),
        (lambda: ResNet(20, width=0), "width must be an integer of at least 1, got 0"),
        (lambda: models.by_name("resnet21"), "depth must be"),
        (lambda: NiN(0), "in_channels must be an integer of at least 1, got 0"),
        (lambda: NiN(dropout=1.0), r"dropout must be a probability in \[0, 1\), got 1.0"),
        (lambda: NiN(widths=(1, 2)), r"widths must be 8 integers, got \(1, 2\)"),
        (lambda: NiN(kernels=(5, 0, 3)), "kernels must be an integer of at least 1, got 0"),
        (lambda: NiN(kernels=(5, 4, 3)), "kernels must be odd, got 4"),
        (lambda: FitNet19(num_classes=0), "num_classes must be"),
        (lambda: MLP(depth=0), "depth must be an integer of at least 1, got 0"),
        (lambda: MLP(input_dropout=-0.1), r"input_dropout must be a probability .* got -0.1"),
        (lambda: VGG9(image_size=7), "image_size must be an integer of at least 8, got 7"),
        (lambda: VGG9(hidden=0), "hidden must be"),
        (lambda: MobileNet(width=0), "width must be a number above 0, got 0"),
        (lambda: MobileNet(width=float("inf")), "width must be a number above 0, got inf"),
        (lambda: MobileNet(num_classes=0), "num_classes must be"),
        (lambda: ShuffleNet(groups=5), "groups must be one of 1, 2, 3, 4, 8, got 5"),
        (lambda: ShuffleNet(width=-1), "width must be a number above 0, got -1"),
        (lambda: ShuffleNet(in_channels=0), "in_channels must be"),
        (lambda: ShuffleNetV2(width=0.75), "width must be one of 0.5, 1.0, 1.5, 2.0, got 0.75"),
        (lambda: ShuffleNetV2(in_channels=0), "in_channels must be"),
        (lambda: LeNet4(num_classes=-1), "num_classes must be"),
        (lambda: LeNet4(image_size=3), "image_size must leave something .* got 3"),
        (lambda: LeNet4(widths=(1, 2)), r"widths must be .* got \(1, 2\)"),
        (lambda: LeNet4(widths=(1, 0, 2)), "second_width must be"),
        (lambda: LeNet5(image_size=15), "got 15 with padding 0; use padding=2"),
        (lambda: LeNet5(padding=-1), "padding must be"),
        (lambda: LeNet300100(image_size=0), "image_size must be"),
    ],
)
def test_bad_arguments(build, message):
    with pytest.raises(ValueError, match=message):
        build()
