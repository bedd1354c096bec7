"""The residual block against its formula."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nncx.models import ResNet
from nncx.models.resnet import BottleneckBlock, PadShortcut, PreActivationBlock


@pytest.mark.parametrize("size", [7, 8])
def test_shortcut_subsamples_and_pads_with_zeros(size):
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    y = PadShortcut(2, 3)(x)
    half = (size + 1) // 2
    assert y.shape == (2, 6, half, half)
    assert torch.equal(y[:, 1:4], F.avg_pool2d(x, 1, stride=2))
    assert y[:, :1].eq(0).all() and y[:, 4:].eq(0).all()


def normalize(x, bn):
    return F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias)


def with_statistics(block):
    for bn in block.modules():
        if isinstance(bn, nn.BatchNorm2d):
            nn.init.normal_(bn.running_mean)
            nn.init.uniform_(bn.running_var, 0.5, 2)
            nn.init.normal_(bn.weight)
            nn.init.normal_(bn.bias)
    return block.eval().requires_grad_(False)


def test_block_is_its_formula():
    torch.manual_seed(0)
    block = with_statistics(PreActivationBlock(4, 8, stride=2))
    x = torch.randn(2, 4, 9, 9)
    y = F.conv2d(normalize(x, block.bn1).clamp_min(0), block.conv1.weight, stride=2, padding=1)
    y = F.conv2d(normalize(y, block.bn2).clamp_min(0), block.conv2.weight, padding=1)
    y[:, 2:6] += x[:, :, ::2, ::2]
    torch.testing.assert_close(block(x), y)


@pytest.mark.parametrize("in_channels, stride", [(8, 1), (8, 2), (3, 1)])
def test_bottleneck_is_its_formula(in_channels, stride):
    torch.manual_seed(0)
    block = with_statistics(BottleneckBlock(in_channels, 8, stride))
    x = torch.randn(2, in_channels, 9, 9)
    first = normalize(x, block.bn1).clamp_min(0)
    y = F.conv2d(first, block.conv1.weight, stride=stride)
    y = F.conv2d(normalize(y, block.bn2).clamp_min(0), block.conv2.weight, padding=1)
    y = F.conv2d(normalize(y, block.bn3).clamp_min(0), block.conv3.weight)
    if (in_channels, stride) == (8, 1):
        y += x
    else:
        y += F.conv2d(first, block.shortcut.weight, stride=stride)
    torch.testing.assert_close(block(x), y)


def test_shortcuts_hold_no_parameters_and_only_stages_need_one():
    model = ResNet(20)
    shortcuts = [m.shortcut for m in model.modules() if isinstance(m, PreActivationBlock)]
    assert len(shortcuts) == 9
    assert sum(isinstance(s, PadShortcut) for s in shortcuts) == 2
    assert not any(list(s.parameters()) for s in shortcuts)


def test_he_initialization():
    torch.manual_seed(0)
    weight = ResNet(8).stage3[0].conv2.weight
    assert weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)


def test_signal_neither_vanishes_nor_explodes_in_a_deep_network():
    torch.manual_seed(0)
    logits = ResNet(164).train()(torch.randn(8, 3, 16, 16))
    assert 0.05 < logits.std().item() < 20
