"""The residual networks of CIFAR: pre-activation blocks of two or of three convolutions."""

import torch.nn.functional as F
from torch import Tensor, nn

from nncx.models._check import at_least, one_of


class ResNet(nn.Module):
    """CIFAR ResNet with 6n+2 layers: 269,722 parameters for depth 20 and 10 classes.

    A 3x3 convolution, three stages of n pre-activation blocks with `width`, 2 and 4 times `width`
    channels (the second and third begin with stride 2), then BatchNorm, ReLU, global average pool
    and one linear layer, whose input is the feature vector.

    Images [N, in_channels, H, W] of any size -> logits [N, num_classes].

    Args:
        block: "basic": two 3x3 convolutions, shortcuts without parameters; or "bottleneck": three
            convolutions, whose outputs have 4 times as many channels. It makes 9n+2 layers, and of
            the talk's ResNet-164 1,703,258 parameters with 256 features instead of 2,602,906 with
            64.

    Raises:
        ValueError: if `depth` is not 6n+2 (with bottlenecks 9n+2), there is no such block, or
            another argument is below 1.

    Paper: He et al., Identity mappings in deep residual networks, ECCV 2016; the CIFAR layout and
        the shortcuts of basic blocks (option A) are those of Deep residual learning for image
        recognition, 2016.
    """

    def __init__(
        self,
        depth: int,
        in_channels: int = 3,
        num_classes: int = 10,
        width: int = 16,
        block: str = "basic",
    ) -> None:
        super().__init__()
        one_of(_BLOCKS, block=block)
        kind, convolutions, widening = _BLOCKS[block]
        layers = 3 * convolutions  # of a block in each stage
        at_least(layers + 2, depth=depth)
        if depth % layers != 2:
            some = ", ".join(str(layers * n + 2) for n in (1, 2, 3, 18))
            raise ValueError(f"depth must be {layers}n+2 ({some}, ...), got {depth}")
        at_least(1, in_channels=in_channels, num_classes=num_classes, width=width)
        self.depth = depth
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.width = width
        self.block = block
        blocks = (depth - 2) // layers
        first, second, third = (widening * width * scale for scale in (1, 2, 4))
        self.conv = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.stage1 = _stage(kind, width, first, blocks, stride=1)
        self.stage2 = _stage(kind, first, second, blocks, stride=2)
        self.stage3 = _stage(kind, second, third, blocks, stride=2)
        self.bn = nn.BatchNorm2d(third)
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(third, num_classes)
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


class BottleneckBlock(nn.Module):
    """x [N, in, H, W] -> shortcut(x) + branch(relu(bn(x))) [N, out, H', W'].

    The branch is a 1x1 convolution to a quarter of `out_channels`, which has the stride, a 3x3
    convolution, and a 1x1 convolution to `out_channels`, with BatchNorm and ReLU between them.
    Where the shape changes, the shortcut is a 1x1 convolution of the same relu(bn(x)).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        middle = out_channels // 4
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(in_channels, middle, 1, stride, bias=False)
        self.bn2 = nn.BatchNorm2d(middle)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(middle, middle, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(middle)
        self.relu3 = nn.ReLU()
        self.conv3 = nn.Conv2d(middle, out_channels, 1, bias=False)
        self.same = stride == 1 and in_channels == out_channels
        self.shortcut = (
            nn.Identity()
            if self.same
            else nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.bn1(x))
        shortcut = self.shortcut(x if self.same else y)
        y = self.conv2(self.relu2(self.bn2(self.conv1(y))))
        return shortcut + self.conv3(self.relu3(self.bn3(y)))


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


# What a block is, how many of its convolutions are layers, and its outputs by the width.
_BLOCKS = {"basic": (PreActivationBlock, 2, 1), "bottleneck": (BottleneckBlock, 3, 4)}


def _stage(
    block: type[nn.Module], in_channels: int, out_channels: int, blocks: int, stride: int
) -> nn.Sequential:
    first = block(in_channels, out_channels, stride)
    rest = (block(out_channels, out_channels) for _ in range(blocks - 1))
    return nn.Sequential(first, *rest)
