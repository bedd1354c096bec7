"""Network in Network."""

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

    Raises:
        ValueError: for an argument out of range.

    Paper: Lin, Chen, Yan, Network in Network, ICLR 2014.
    """

    def __init__(self, in_channels: int = 3, num_classes: int = 10, dropout: float = 0.5) -> None:
        super().__init__()
        at_least(1, in_channels=in_channels, num_classes=num_classes)
        probability(dropout=dropout)
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.dropout = dropout
        self.conv1 = nn.Conv2d(in_channels, 192, 5, padding=2)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(192, 160, 1)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(160, 96, 1)
        self.relu3 = nn.ReLU()
        self.pool1 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.dropout1 = nn.Dropout(dropout)
        self.conv4 = nn.Conv2d(96, 192, 5, padding=2)
        self.relu4 = nn.ReLU()
        self.conv5 = nn.Conv2d(192, 192, 1)
        self.relu5 = nn.ReLU()
        self.conv6 = nn.Conv2d(192, 192, 1)
        self.relu6 = nn.ReLU()
        self.pool2 = nn.AvgPool2d(3, stride=2, ceil_mode=True)
        self.dropout2 = nn.Dropout(dropout)
        self.conv7 = nn.Conv2d(192, 192, 3, padding=1)
        self.relu7 = nn.ReLU()
        self.conv8 = nn.Conv2d(192, 192, 1)
        self.relu8 = nn.ReLU()
        self.conv9 = nn.Conv2d(192, num_classes, 1)
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
