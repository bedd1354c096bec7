"""The LeNets of the compression papers, each for square images of a stated size."""

from collections.abc import Sequence

from torch import Tensor, nn

from nncx.models._check import at_least


class LeNet300100(nn.Module):
    """Two hidden layers of 300 and 100: 266,610 parameters for 28x28x1 and 10 classes.

    Images [N, in_channels, image_size, image_size] -> logits [N, num_classes].

    Raises:
        ValueError: for an argument below 1.

    Paper: LeCun et al., Gradient-based learning applied to document recognition, 1998.
    """

    def __init__(self, in_channels: int = 1, num_classes: int = 10, image_size: int = 28) -> None:
        super().__init__()
        at_least(1, in_channels=in_channels, num_classes=num_classes, image_size=image_size)
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.image_size = image_size
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(in_channels * image_size**2, 300)
        self.relu1 = nn.ReLU()
        self.fc2 = nn.Linear(300, 100)
        self.relu2 = nn.ReLU()
        self.fc3 = nn.Linear(100, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.fc1(self.flatten(x)))
        return self.fc3(self.relu2(self.fc2(x)))


class LeNet5(nn.Module):
    """LeNet-5 in the form of Caffe's example: 431,080 parameters for 28x28x1 and 10 classes.

    conv 5x5x20, pool, conv 5x5x50, pool, fc 500, ReLU, fc: the only ReLU is the hidden layer's.
    This is the LeNet-5 that the pruning papers count. With `norm` it is in the form of binary
    networks, conv, pool, BatchNorm, ReLU, conv, pool, BatchNorm, ReLU, fc, BatchNorm, ReLU, fc, and
    has 431,650 parameters: BatchNorm cancels the biases before it, so there are none.

    Images [N, in_channels, image_size, image_size] -> logits [N, num_classes].

    Args:
        padding: of both convolutions. 0 is Caffe's and asks for images of at least 16x16;
            2 keeps the size and takes images from 4x4 on.
        norm: a BatchNorm and a ReLU before every layer but the first. `nncx.XNOR` needs the one
            (signs of what is not centred say little) and `nncx.convert` removes the other.

    Raises:
        ValueError: for an argument below 1, or an image too small for the padding.

    Paper: LeCun et al., Gradient-based learning applied to document recognition, 1998.
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 10,
        image_size: int = 28,
        padding: int = 0,
        norm: bool = False,
    ) -> None:
        super().__init__()
        at_least(1, in_channels=in_channels, num_classes=num_classes, image_size=image_size)
        at_least(0, padding=padding)
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.image_size = image_size
        self.padding = padding
        self.norm = norm
        size = _pooled_size(image_size, padding)
        self.conv1 = nn.Conv2d(in_channels, 20, 5, padding=padding, bias=not norm)
        self.pool1 = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(20, 50, 5, padding=padding, bias=not norm)
        self.pool2 = nn.MaxPool2d(2)
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(50 * size**2, 500, bias=not norm)
        self.relu1 = nn.ReLU()
        self.fc2 = nn.Linear(500, num_classes)
        if norm:
            self.norm1 = nn.Sequential(nn.BatchNorm2d(20), nn.ReLU())
            self.norm2 = nn.Sequential(nn.BatchNorm2d(50), nn.ReLU())
            self.norm3 = nn.BatchNorm1d(500)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool1(self.conv1(x))
        if self.norm:
            x = self.norm1(x)
        x = self.pool2(self.conv2(x))
        if self.norm:
            x = self.norm2(x)
        x = self.fc1(self.flatten(x))
        if self.norm:
            x = self.norm3(x)
        return self.fc2(self.relu1(x))


class LeNet4(nn.Module):
    """A four-layer LeNet: two padded 5x5 convolutions, two fully connected layers.

    conv, ReLU, pool, conv, ReLU, pool, fc, ReLU, fc. With the default widths it has 3,274,634
    parameters for 28x28x1 and 10 classes.

    Images [N, in_channels, image_size, image_size] -> logits [N, num_classes].

    Args:
        widths: channels of the two convolutions and size of the hidden layer.

    Raises:
        ValueError: for an argument below 1, an image below 4x4, or not three widths.

    Paper: LeCun et al., Comparison of learning algorithms for handwritten digit recognition,
        1995, for the four layers; the widths are those of today's MNIST examples.
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 10,
        image_size: int = 28,
        widths: Sequence[int] = (32, 64, 1024),
    ) -> None:
        super().__init__()
        at_least(1, in_channels=in_channels, num_classes=num_classes, image_size=image_size)
        if len(widths) != 3:
            raise ValueError(f"widths must be those of two convolutions and one fc, got {widths}")
        first, second, hidden = self.widths = tuple(widths)
        at_least(1, first_width=first, second_width=second, hidden_width=hidden)
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.image_size = image_size
        size = _pooled_size(image_size, padding=2)
        self.conv1 = nn.Conv2d(in_channels, first, 5, padding=2)
        self.relu1 = nn.ReLU()
        self.pool1 = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(first, second, 5, padding=2)
        self.relu2 = nn.ReLU()
        self.pool2 = nn.MaxPool2d(2)
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(second * size**2, hidden)
        self.relu3 = nn.ReLU()
        self.fc2 = nn.Linear(hidden, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool1(self.relu1(self.conv1(x)))
        x = self.pool2(self.relu2(self.conv2(x)))
        return self.fc2(self.relu3(self.fc1(self.flatten(x))))


def _pooled_size(image_size: int, padding: int) -> int:
    """Height of the map after twice (5x5 convolution, 2x2 pool)."""
    size = image_size
    for _ in range(2):
        size = (size + 2 * padding - 4) // 2
    if size < 1:
        raise ValueError(
            f"image_size must leave something after two 5x5 convolutions and pools, got "
            f"{image_size} with padding {padding}; use padding=2 or larger images"
        )
    return size
