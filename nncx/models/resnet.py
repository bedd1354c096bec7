"""The residual networks of CIFAR: pre-activation basic blocks, shortcuts without parameters."""

import torch.nn.functional as F
from torch import Tensor, nn

from nncx.models._check import at_least


class ResNet(nn.Module):
    """CIFAR ResNet with 6n+2 layers: 269,722 parameters for depth 20 and 10 classes.

    A 3x3 convolution, three stages of n pre-activation basic blocks with `width`, 2 and 4 times
    `width` channels (the second and third begin with stride 2), then BatchNorm, ReLU, global
    average pool and one linear layer, whose input is the feature vector.

    Images [N, in_channels, H, W] of any size -> logits [N, num_classes].

    Raises:
        ValueError: if `depth` is not 6n+2 or another argument is below 1.

    Paper: He et al., Identity mappings in deep residual networks, ECCV 2016; the CIFAR layout and
        the shortcuts (option A) are those of Deep residual learning for image recognition, 2016.
    """

    def __init__(
        self, depth: int, in_channels: int = 3, num_classes: int = 10, width: int = 16
    ) -> None:
        super().__init__()
        at_least(8, depth=depth)
        if depth % 6 != 2:
            raise ValueError(f"depth must be 6n+2 (20, 32, 44, 56, 110, 164, ...), got {depth}")
        at_least(1, in_channels=in_channels, num_classes=num_classes, width=width)
        self.depth = depth
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.width = width
        blocks = (depth - 2) // 6
        self.conv = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.stage1 = _stage(width, width, blocks, stride=1)
        self.stage2 = _stage(width, 2 * width, blocks, stride=2)
        self.stage3 = _stage(2 * width, 4 * width, blocks, stride=2)
        self.bn = nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(4 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage3(self.stage2(self.stage1(self.conv(x))))
        return self.fc(self.flatten(self.pool(self.relu(self.bn(x)))))


class PreActivationBlock(nn.Module):
    """x [N, in, H, W] -> shortcut(x) + conv(relu(bn(conv(relu(bn(x)))))) [N, out, H', W'].

    The first convolution has the stride; the shortcut takes x itself.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        same = stride == 1 and in_channels == out_channels
        self.shortcut = nn.Identity() if same else PadShortcut(stride, out_channels - in_channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(self.relu1(self.bn1(x)))
        y = self.conv2(self.relu2(self.bn2(y)))
        return self.shortcut(x) + y


class PadShortcut(nn.Module):
    """Takes every `stride`-th pixel and adds `extra` channels of zeros, half of them in front."""

    def __init__(self, stride: int, extra: int) -> None:
        super().__init__()
        self.stride = stride
        self.extra = extra

    def forward(self, x: Tensor) -> Tensor:
        before = self.extra // 2
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, before, self.extra - before))

    def extra_repr(self) -> str:
        return f"stride={self.stride}, extra={self.extra}"


def _stage(in_channels: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = PreActivationBlock(in_channels, out_channels, stride)
    rest = (PreActivationBlock(out_channels, out_channels) for _ in range(blocks - 1))
    return nn.Sequential(first, *rest)
