"""MobileNet and ShuffleNet: the counts of their papers, their forms, torchvision's weights."""

import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from nncx import models
from nncx.models import MobileNet, ShuffleNet, ShuffleNetV2
from nncx.models.shufflenet import ShuffleUnit


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def macs(model: nn.Module, size: int = 224, *, fc: bool = True) -> float:
    """Millions of multiply-accumulates of convolutions, and of the linear layer, for an image."""
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        model.to("meta").eval()(torch.zeros(1, 3, size, size))
    return counter.get_total_flops() / 2e6 - (0 if fc else model.fc.weight.numel() / 1e6)


# MobileNet's paper counts mult-adds of all layers with weights, and parameters with those of the
# BatchNorms, both rounded.
@pytest.mark.parametrize(
    "width, millions, mult_adds",
    [(1.0, 4.2, 569), (0.75, 2.6, 325), (0.5, 1.3, 149), (0.25, 0.5, 41)],
)
def test_mobilenet_is_as_large_as_in_its_paper(width, millions, mult_adds):
    model = MobileNet(width=width)
    assert round(parameters(model) / 1e6, 1) == millions
    assert round(macs(model)) == mult_adds


@pytest.mark.parametrize("size, mult_adds", [(192, 418), (160, 290), (128, 186)])
def test_mobilenet_takes_the_resolutions_of_its_paper(size, mult_adds):
    assert macs(MobileNet(), size) == pytest.approx(mult_adds, abs=1)


# The last row of Table 1 of ShuffleNet's paper (arXiv 1707.01083v2): FLOPs are multiply-adds, and
# of convolutions only.
@pytest.mark.parametrize("groups, mult_adds", [(1, 143), (2, 140), (3, 137), (4, 133), (8, 137)])
def test_shufflenet_is_as_large_as_in_its_paper(groups, mult_adds):
    assert macs(ShuffleNet(groups=groups), fc=False) == pytest.approx(mult_adds, abs=0.51)


# The table of github.com/megvii-model/ShuffleNet-Series, ShuffleNetV1/README.md (group=3), which
# counts the linear layer too and is rounded.
@pytest.mark.parametrize(
    "width, millions, mult_adds",
    [(0.5, 0.7, 38), (1.0, 1.9, 138), (1.5, 3.4, 292), (2.0, 5.4, 524)],
)
def test_shufflenet_is_as_large_as_in_the_authors_code(width, millions, mult_adds):
    model = ShuffleNet(groups=3, width=width)
    assert parameters(model) / 1e6 == pytest.approx(millions, abs=0.06)
    assert macs(model) == pytest.approx(mult_adds, abs=0.6)


# `num_params` and `_ops` (rounded) of torchvision's shufflenet_v2_x*, then the table of
# github.com/megvii-model/ShuffleNet-Series, ShuffleNetV2/README.md, which also counts what torch's
# count of convolutions misses, 1 to 2 %.
@pytest.mark.parametrize(
    "width, exactly, giga_ops, millions, mult_adds",
    [
        (0.5, 1_366_792, 0.04, 1.4, 41),
        (1.0, 2_278_604, 0.145, 2.3, 146),
        (1.5, 3_503_624, 0.296, 3.5, 299),
        (2.0, 7_393_996, 0.583, 7.4, 591),
    ],
)
def test_shufflenet_v2_is_as_large_as_published(width, exactly, giga_ops, millions, mult_adds):
    model = ShuffleNetV2(width=width)
    assert parameters(model) == exactly and round(exactly / 1e6, 1) == millions
    assert round(macs(model) / 1e3, 2 if width == 0.5 else 3) == giga_ops
    assert 0.98 * mult_adds < macs(model) <= mult_adds


@pytest.mark.parametrize("width", [0.5, 1.0, 1.5, 2.0])
def test_shufflenet_v2_takes_the_weights_of_torchvisions(width):
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    name = f"shufflenet_v2_x{width}".replace(".", "_")
    theirs = torchvision.models.get_model(name, weights=None, num_classes=7).eval()
    ours = ShuffleNetV2(num_classes=7, width=width).eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images))


@pytest.mark.parametrize(
    "small, size, spatial", [(True, 32, 4), (True, 28, 4), (False, 224, 7), (False, 128, 4)]
)
@pytest.mark.parametrize("name", ["mobilenet", "shufflenet", "shufflenetv2"])
def test_forms_for_small_and_large_images(name, small, size, spatial):
    model = models.by_name(name, num_classes=3, image_size=size, width=0.5)
    assert model.small_images is small
    sizes = []
    pool = next(m for m in model.modules() if isinstance(m, nn.AdaptiveAvgPool2d))
    pool.register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape[2:]))
    model.to("meta").eval()(torch.zeros(1, 3, size, size, device="meta"))
    assert sizes == [(spatial, spatial)]


def test_by_name_leaves_the_form_to_who_asks_for_one():
    assert not models.by_name("mobilenet", image_size=32, small_images=False).small_images


@pytest.mark.parametrize("groups", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("width", [0.05, 0.25, 0.33, 0.5, 1.0, 1.5, 2.0])
def test_every_width_of_shufflenet_can_be_grouped(groups, width):
    with torch.device("meta"):
        model = ShuffleNet(groups=groups, width=width)
        assert model(torch.empty(2, 3, 32, 32)).shape == (2, 1000)
    stage2 = {1: 144, 2: 200, 3: 240, 4: 272, 8: 384}[groups]
    scaled = model.stage3[0].conv1.in_channels
    assert scaled % groups == 0
    assert width < 0.25 or abs(scaled - stage2 * width) <= groups / 2


@pytest.mark.parametrize("groups", [1, 3])
def test_the_first_pointwise_convolution_is_not_grouped_all_others_are(groups):
    units = [m for m in ShuffleNet(groups=groups).modules() if isinstance(m, ShuffleUnit)]
    assert [unit.conv1.groups for unit in units] == [1] + 15 * [groups]
    assert {unit.conv3.groups for unit in units} == {groups}


def test_a_unit_of_stride_2_puts_the_pooled_input_first():
    torch.manual_seed(0)
    unit = ShuffleUnit(6, 18, 2, groups=3, first_groups=3).eval()
    x = torch.rand(2, 6, 8, 8)
    with torch.no_grad():
        y = unit(x)
    assert torch.equal(y[:, :6], nn.functional.avg_pool2d(x, 3, 2, 1))
    assert y.shape == (2, 18, 4, 4) and y.min() == 0


def test_depthwise_filters_start_by_their_own_inputs():
    torch.manual_seed(0)
    weight = MobileNet().blocks[-1].depthwise.weight
    assert weight.std().item() == pytest.approx(math.sqrt(2 / 9), rel=0.03)
