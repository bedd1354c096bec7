"""ShuffleNet: pointwise convolutions in groups, between which channels are shuffled."""

import math

import torch
from torch import Tensor, nn

from nncx.models._check import at_least, one_of, positive
from nncx.models._init import he_by_filter

_STAGE2 = {1: 144, 2: 200, 3: 240, 4: 272, 8: 384}  # channels by groups; later stages double them
_UNITS = (4, 8, 4)


class ShuffleNet(nn.Module):
    """ShuffleNet v1: 1,865,728 parameters and 137.5 million MACs at 224x224 with 3 groups.

    A 3x3 convolution and a max pool, both of stride 2, three stages of 4, 8 and 4 units, global
    average pool and one linear layer. Weights start as He's.

    Images [N, in_channels, H, W] of any size -> logits [N, num_classes].

    Args:
        groups: 1, 2, 3, 4 or 8, of the pointwise convolutions; the more, the more channels the
            network has at about the same cost.
        width: scales all channels; the paper has 0.25, 0.5, 1, 1.5 and 2. Counts are rounded to
            what the groups divide. The first convolution has 24 channels times a width below 1 or
            the whole part of one above, as in the authors' code.
        small_images: the form for images such as CIFAR's: the first convolution has stride 1 and
            there is no max pool, so that 32x32 end as 4x4.

    Raises:
        ValueError: for an argument out of range.

    Paper: Zhang et al., "ShuffleNet: An Extremely Efficient Convolutional Neural Network for Mobile
        Devices", CVPR 2018.
    """

    def __init__(
        self,
        in_channels: int = 3,
        num_classes: int = 1000,
        groups: int = 3,
        width: float = 1.0,
        small_images: bool = False,
    ) -> None:
        super().__init__()
        at_least(1, in_channels=in_channels, num_classes=num_classes)
        one_of(_STAGE2, groups=groups)
        positive(width=width)
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.groups = groups
        self.width = width
        self.small_images = small_images
        first = _multiple(24 * (math.floor(width) or width), groups)
        stride = 1 if small_images else 2
        self.conv = nn.Conv2d(in_channels, first, 3, stride, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(first)
        self.relu = nn.ReLU()
        self.pool1 = nn.Identity() if small_images else nn.MaxPool2d(3, 2, padding=1)
        second = max(_multiple(_STAGE2[groups] * width, groups), first + groups)
        self.stage2 = _stage(first, second, _UNITS[0], groups, first_groups=1)
        self.stage3 = _stage(second, 2 * second, _UNITS[1], groups)
        self.stage4 = _stage(2 * second, 4 * second, _UNITS[2], groups)
        self.pool2 = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(4 * second, num_classes)
        he_by_filter(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool1(self.relu(self.bn(self.conv(x))))
        x = self.stage4(self.stage3(self.stage2(x)))
        return self.fc(self.flatten(self.pool2(x)))


class ShuffleUnit(nn.Module):
    """x [N, in, H, W] -> relu(x + branch(x)), or a concatenation where the stride is 2.

    The branch is a 1x1 convolution in groups, BatchNorm, ReLU, shuffle, 3x3 depthwise convolution,
    BatchNorm, 1x1 convolution in groups, BatchNorm; its bottleneck has a quarter of the outputs.
    With stride 2 the shortcut is a 3x3 average pool, whose channels come first in the output. Its
    input is what a ReLU gave, so the paper's ReLU of both is one of the branch alone.
    """

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, groups: int, first_groups: int
    ) -> None:
        super().__init__()
        middle = _multiple(out_channels / 4, groups)
        outputs = out_channels - in_channels if stride == 2 else out_channels
        self.stride = stride
        self.conv1 = nn.Conv2d(in_channels, middle, 1, groups=first_groups, bias=False)
        self.bn1 = nn.BatchNorm2d(middle)
        self.relu1 = nn.ReLU()
        self.shuffle = nn.ChannelShuffle(groups)
        self.conv2 = nn.Conv2d(middle, middle, 3, stride, padding=1, groups=middle, bias=False)
        self.bn2 = nn.BatchNorm2d(middle)
        self.conv3 = nn.Conv2d(middle, outputs, 1, groups=groups, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.relu3 = nn.ReLU()
        self.shortcut = nn.AvgPool2d(3, 2, padding=1) if stride == 2 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.shuffle(self.relu1(self.bn1(self.conv1(x))))
        y = self.bn3(self.conv3(self.bn2(self.conv2(y))))
        if self.stride == 2:
            return torch.cat([self.shortcut(x), self.relu3(y)], 1)
        return self.relu3(self.shortcut(x) + y)


def _stage(
    in_channels: int, out_channels: int, units: int, groups: int, first_groups: int | None = None
) -> nn.Sequential:
    """`first_groups`: of the first pointwise convolution; stage 2 has too few inputs to group."""
    first = ShuffleUnit(in_channels, out_channels, 2, groups, first_groups or groups)
    rest = (ShuffleUnit(out_channels, out_channels, 1, groups, groups) for _ in range(units - 1))
    return nn.Sequential(first, *rest)


def _multiple(channels: float, groups: int) -> int:
    """The number next to `channels` that `groups` divides, up from half way between two."""
    return max(1, math.floor(channels / groups + 0.5)) * groups
