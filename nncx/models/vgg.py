"""The VGG-like network of BinaryConnect."""

from torch import Tensor, nn

from nncx.models._check import at_least


class VGG9(nn.Module):
    """Six 3x3 convolutions and three fc layers: 14,022,016 weights for 32x32x3 and 10 classes.

    Two convolutions of `width` channels, two of twice and two of four times as many; every second
    is followed by a 2x2 max pool; then two hidden fc layers and the last. BatchNorm stands behind
    every layer, ReLU behind every BatchNorm but the last, which normalises the logits: convolution,
    (pool), BatchNorm, ReLU. Layers have no bias, which BatchNorm would cancel. Made binary by
    `nncx.convert(VGG9(), nncx.BinaryConnect())` it is the CIFAR-10 network of BinaryConnect.

    Images [N, in_channels, image_size, image_size] -> logits [N, num_classes].

    Args:
        image_size: at least 8.
        width: channels of the first convolution.
        hidden: size of a hidden fc layer.

    Raises:
        ValueError: for an argument that is too small.

    Paper: Courbariaux et al., "BinaryConnect", NeurIPS 2015, after Simonyan and Zisserman, "Very
        Deep Convolutional Networks", ICLR 2015. BatchNorm's momentum is torch's.
    """

    def __init__(
        self,
        in_channels: int = 3,
        num_classes: int = 10,
        image_size: int = 32,
        width: int = 128,
        hidden: int = 1024,
    ) -> None:
        super().__init__()
        at_least(1, in_channels=in_channels, num_classes=num_classes, width=width, hidden=hidden)
        at_least(8, image_size=image_size)
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.image_size = image_size
        self.width = width
        self.hidden = hidden
        self.stage1 = _stage(in_channels, width)
        self.stage2 = _stage(width, 2 * width)
        self.stage3 = _stage(2 * width, 4 * width)
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(4 * width * (image_size // 8) ** 2, hidden, bias=False)
        self.bn1 = nn.BatchNorm1d(hidden, eps=1e-4)
        self.relu1 = nn.ReLU()
        self.fc2 = nn.Linear(hidden, hidden, bias=False)
        self.bn2 = nn.BatchNorm1d(hidden, eps=1e-4)
        self.relu2 = nn.ReLU()
        self.fc3 = nn.Linear(hidden, num_classes, bias=False)
        self.bn3 = nn.BatchNorm1d(num_classes, eps=1e-4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.flatten(self.stage3(self.stage2(self.stage1(x))))
        x = self.relu1(self.bn1(self.fc1(x)))
        x = self.relu2(self.bn2(self.fc2(x)))
        return self.bn3(self.fc3(x))


def _stage(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels, eps=1e-4),
        nn.ReLU(),
        nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
        nn.MaxPool2d(2),
        nn.BatchNorm2d(out_channels, eps=1e-4),
        nn.ReLU(),
    )
