"""MobileNet: depthwise convolutions that see space, pointwise ones that see channels."""

from torch import Tensor, nn

from nncx.models._check import at_least, positive
from nncx.models._init import he_by_filter

# Output channels and stride of each depthwise separable block.
_BLOCKS = (
    *((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)),
    *((512, 1), (512, 1), (512, 1), (512, 1), (512, 1), (1024, 2), (1024, 1)),
)


class MobileNet(nn.Module):
    """MobileNet v1: 4,231,976 parameters and 568.7 million MACs at 224x224 for 1000 classes.

    A 3x3 convolution of stride 2, thirteen blocks of a 3x3 depthwise and a 1x1 convolution, global
    average pool and one linear layer. BatchNorm and ReLU stand behind every convolution, which
    therefore has no bias. Weights start as He's.

    Images [N, in_channels, H, W] of any size -> logits [N, num_classes].

    Args:
        width: the multiplier alpha of all channels, which are rounded and at least 8; the paper
            has 1, 0.75, 0.5 and 0.25.
        small_images: the form for images such as CIFAR's: the first convolution and the first
            block of stride 2 have stride 1, so that 32x32 end as 4x4.

    Raises:
        ValueError: for an argument out of range.

    Paper: Howard et al., "MobileNets: Efficient Convolutional Neural Networks for Mobile Vision
        Applications", 2017. It asks for little or no weight decay on depthwise filters.
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
        positive(width=width)
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.width = width
        self.small_images = small_images
        channels = _scaled(32, width)
        stride = 1 if small_images else 2
        self.conv = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        blocks = []
        for index, (wanted, stride) in enumerate(_BLOCKS):
            outputs = _scaled(wanted, width)
            stride = 1 if small_images and index == 1 else stride
            blocks.append(SeparableBlock(channels, outputs, stride))
            channels = outputs
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(channels, num_classes)
        he_by_filter(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.relu(self.bn(self.conv(x))))
        return self.fc(self.flatten(self.pool(x)))


class SeparableBlock(nn.Module):
    """x [N, in, H, W] -> relu(bn(pointwise(relu(bn(depthwise(x)))))) [N, out, H', W']."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(
            in_channels, in_channels, 3, stride, padding=1, groups=in_channels, bias=False
        )
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU()
        self.pointwise = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.depthwise(x)))
        return self.relu2(self.bn2(self.pointwise(x)))


def _scaled(channels: int, width: float) -> int:
    return max(8, round(channels * width))
