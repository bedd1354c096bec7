"""FitNet-19, the thin and deep student of the hints: maxout instead of ReLU."""

from torch import Tensor, nn

from nncx.models._check import at_least

_PIECES, _FC_PIECES = 2, 5
_STAGES = ((32, 32, 32, 48, 48), (80,) * 6, (128,) * 6)
_HIDDEN = 500


class FitNet19(nn.Module):
    """Seventeen 3x3 convolutions and two fc layers: 2,742,102 parameters for 10 classes.

    Five convolutions of 32 and 48 channels, six of 80, six of 128; each is a maxout of two pieces.
    A 2x2 max pool stands behind the first two stages, a global one behind the third, then an fc
    layer of 500 units, a maxout of five pieces, and the last. There is no BatchNorm: it is the
    network that hints were made to train. The paper counts about 2.5 million parameters; it trains
    from what the hints found, here weights start as normal ones that keep the scale of maxout.

    Images [N, in_channels, H, W] of at least 4x4 -> logits [N, num_classes].

    Raises:
        ValueError: for an argument below 1.

    Paper: Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015; Goodfellow et al., "Maxout
        Networks", ICML 2013.
    """

    def __init__(self, in_channels: int = 3, num_classes: int = 10) -> None:
        super().__init__()
        at_least(1, in_channels=in_channels, num_classes=num_classes)
        self.in_channels = in_channels
        self.num_classes = num_classes
        first, second, third = _STAGES
        self.stage1 = _stage(in_channels, first)
        self.pool1 = nn.MaxPool2d(2)
        self.stage2 = _stage(first[-1], second)
        self.pool2 = nn.MaxPool2d(2)
        self.stage3 = _stage(second[-1], third)
        self.pool3 = nn.AdaptiveMaxPool2d(1)
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(third[-1], _FC_PIECES * _HIDDEN)
        self.maxout = Maxout(_FC_PIECES)
        self.fc2 = nn.Linear(_HIDDEN, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                # The square of the larger of two normal numbers has the mean of either's square.
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool2(self.stage2(self.pool1(self.stage1(x))))
        x = self.flatten(self.pool3(self.stage3(x)))
        return self.fc2(self.maxout(self.fc1(x)))


class Maxout(nn.Module):
    """x [N, pieces * C, ...] -> [N, C, ...]: the largest of each `pieces` neighbouring channels.

    Raises:
        ValueError: for `pieces` below 1.

    Paper: Goodfellow et al., "Maxout Networks", ICML 2013.
    """

    def __init__(self, pieces: int) -> None:
        super().__init__()
        at_least(1, pieces=pieces)
        self.pieces = pieces

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, self.pieces)).amax(2)

    def extra_repr(self) -> str:
        return f"pieces={self.pieces}"


def _stage(in_channels: int, widths: tuple[int, ...]) -> nn.Sequential:
    modules: list[nn.Module] = []
    for width in widths:
        modules += [nn.Conv2d(in_channels, _PIECES * width, 3, padding=1), Maxout(_PIECES)]
        in_channels = width
    return nn.Sequential(*modules)
