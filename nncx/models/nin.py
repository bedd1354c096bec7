"""Network in Network."""

from collections.abc import Sequence

from torch import Tensor, nn

from nncx.models._check import at_least, probability


class NiN(nn.Module):
    """Network in Network in its CIFAR form: 966,986 parameters for 3 channels and 10 classes.

    Three blocks of one spatial convolution (5x5, 5x5, 3x3) and two 1x1 convolutions, between them
    a 3x3 pool of stride 2 (max, then average) and dropout; the last map has one channel per class
    and its mean is the logit. Two things are not the paper's: there is no ReLU after the last
    convolution, so that logits may be negative, and weights start as He's.

    Images [N, in_channels, H, W] of any size -> logits [N, num_classes].

    Args:
        dropout: the probability after each pool.
        widths: channels of all convolutions but the last, three of each block.
        kernels: sizes of the three spatial convolutions, odd. The form for MNIST,
            `models.by_name("ninmnist", in_channels=1)`, has (5, 5, 5) and the widths (96, 64, 48,
            128, 96, 48, 128, 96): 349,674 parameters.

    Raises:
        ValueError: for an argument out of range.

    Paper: Lin, Chen, Yan, Network in Network, ICLR 2014.
    """

    def __init__(
        self,
        in_channels: int = 3,
        num_classes: int = 10,
        dropout: float = 0.5,
        widths: Sequence[int] = (192, 160, 96, 192, 192, 192, 192, 192),
        kernels: Sequence[int] = (5, 5, 3),
    ) -> None:
        super().__init__()
        at_least(1, in_channels=in_channels, num_classes=num_classes)
        probability(dropout=dropout)
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.dropout = dropout
        self.widths = c1, c2, c3, c4, c5, c6, c7, c8 = _several(8, widths=widths)
        self.kernels = k1, k2, k3 = _several(3, kernels=kernels)
        for kernel in self.kernels:
            if kernel % 2 == 0:
                raise ValueError(f"kernels must be odd, got {kernel}")
        self.conv1 = nn.Conv2d(in_channels, c1, k1, padding=k1 // 2)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(c1, c2, 1)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(c2, c3, 1)
        self.relu3 = nn.ReLU()
        self.pool1 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.dropout1 = nn.Dropout(dropout)
        self.conv4 = nn.Conv2d(c3, c4, k2, padding=k2 // 2)
        self.relu4 = nn.ReLU()
        self.conv5 = nn.Conv2d(c4, c5, 1)
        self.relu5 = nn.ReLU()
        self.conv6 = nn.Conv2d(c5, c6, 1)
        self.relu6 = nn.ReLU()
        self.pool2 = nn.AvgPool2d(3, stride=2, ceil_mode=True)
        self.dropout2 = nn.Dropout(dropout)
        self.conv7 = nn.Conv2d(c6, c7, k3, padding=k3 // 2)
        self.relu7 = nn.ReLU()
        self.conv8 = nn.Conv2d(c7, c8, 1)
        self.relu8 = nn.ReLU()
        self.conv9 = nn.Conv2d(c8, num_classes, 1)
        self.pool3 = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.conv1(x))
        x = self.relu2(self.conv2(x))
        x = self.relu3(self.conv3(x))
        x = self.dropout1(self.pool1(x))
        x = self.relu4(self.conv4(x))
        x = self.relu5(self.conv5(x))
        x = self.relu6(self.conv6(x))
        x = self.dropout2(self.pool2(x))
        x = self.relu7(self.conv7(x))
        x = self.relu8(self.conv8(x))
        return self.flatten(self.pool3(self.conv9(x)))


def _several(count: int, **arguments: Sequence[int]) -> tuple[int, ...]:
    """The one argument, which must be `count` integers of at least 1."""
    ((name, values),) = arguments.items()
    if len(values) != count:
        raise ValueError(f"{name} must be {count} integers, got {values}")
    for value in values:
        at_least(1, **{name: value})
    return tuple(values)
