"""ShuffleNet v2: half of the channels pass each unit untouched, then all are shuffled."""

import torch
from torch import Tensor, nn

from nncx.models._check import at_least, one_of
from nncx.models._init import he_by_filter

# Channels of the stages, and of the last convolution, by width.
_CHANNELS = {
    0.5: (48, 96, 192, 1024),
    1.0: (116, 232, 464, 1024),
    1.5: (176, 352, 704, 1024),
    2.0: (244, 488, 976, 2048),
}
_UNITS = (4, 8, 4)
_FIRST = 24


class ShuffleNetV2(nn.Module):
    """ShuffleNet v2: 2,278,604 parameters and 144.9 million MACs at 224x224 for width 1.

    A 3x3 convolution and a max pool, both of stride 2, three stages of 4, 8 and 4 units, a 1x1
    convolution, global average pool and one linear layer. Tensors have the names that they have in
    torchvision's `shufflenet_v2_x*`, whose state dicts therefore load. Weights start as He's.

    Images [N, in_channels, H, W] of any size -> logits [N, num_classes].

    Args:
        width: 0.5, 1, 1.5 or 2.
        small_images: the form for images such as CIFAR's: the first convolution has stride 1 and
            there is no max pool, so that 32x32 end as 4x4.

    Raises:
        ValueError: for an argument out of range.

    Paper: Ma et al., "ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design",
        ECCV 2018.
    """

    def __init__(
        self,
        in_channels: int = 3,
        num_classes: int = 1000,
        width: float = 1.0,
        small_images: bool = False,
    ) -> None:
        super().__init__()
        at_least(1, in_channels=in_channels, num_classes=num_classes)
        one_of(_CHANNELS, width=width)
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.width = width
        self.small_images = small_images
        second, third, fourth, last = _CHANNELS[width]
        stride = 1 if small_images else 2
        self.conv1 = nn.Sequential(
            nn.Conv2d(in_channels, _FIRST, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(_FIRST),
            nn.ReLU(),
        )
        self.maxpool = nn.Identity() if small_images else nn.MaxPool2d(3, 2, padding=1)
        self.stage2 = _stage(_FIRST, second, _UNITS[0])
        self.stage3 = _stage(second, third, _UNITS[1])
        self.stage4 = _stage(third, fourth, _UNITS[2])
        self.conv5 = nn.Sequential(*_pointwise(fourth, last))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(last, num_classes)
        he_by_filter(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.conv1(x))
        x = self.conv5(self.stage4(self.stage3(self.stage2(x))))
        return self.fc(self.flatten(self.pool(x)))


class SplitUnit(nn.Module):
    """x [N, in, H, W] -> shuffle(concatenation of branch1 and branch2).

    With stride 1, branch1 passes the first half of the channels as they are, and branch2 (1x1, 3x3
    depthwise, 1x1 convolution) sees the second. With stride 2 both see all, and both convolve.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        half = out_channels // 2
        inputs = half if stride == 1 else in_channels
        self.stride = stride
        self.branch1 = nn.Sequential()
        if stride == 2:
            self.branch1 = nn.Sequential(
                *_depthwise(in_channels, stride), *_pointwise(in_channels, half)
            )
        self.branch2 = nn.Sequential(
            *_pointwise(inputs, half), *_depthwise(half, stride), *_pointwise(half, half)
        )
        self.shuffle = nn.ChannelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, 1) if self.stride == 1 else (x, x)
        return self.shuffle(torch.cat([self.branch1(first), self.branch2(second)], 1))


def _stage(in_channels: int, out_channels: int, units: int) -> nn.Sequential:
    rest = (SplitUnit(out_channels, out_channels, 1) for _ in range(units - 1))
    return nn.Sequential(SplitUnit(in_channels, out_channels, 2), *rest)


def _pointwise(in_channels: int, out_channels: int) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(in_channels, out_channels, 1, bias=False)
    return convolution, nn.BatchNorm2d(out_channels), nn.ReLU()


def _depthwise(channels: int, stride: int) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(channels, channels, 3, stride, padding=1, groups=channels, bias=False)
    return convolution, nn.BatchNorm2d(channels)
