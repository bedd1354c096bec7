"""The multilayer perceptron of BinaryConnect."""

from torch import Tensor, nn

from nncx.models._check import at_least, probability


class MLP(nn.Module):
    """Hidden layers of equal width, BatchNorm behind every layer: 2,910,208 weights by default.

    Three times fc, BatchNorm, ReLU; then fc, BatchNorm: the last normalises the logits, which suits
    a squared hinge loss. Layers have no bias, which BatchNorm would cancel. Made binary by
    `nncx.convert(MLP(), nncx.BinaryConnect())` it is the MNIST network of BinaryConnect.

    Images [N, in_channels, image_size, image_size] -> logits [N, num_classes].

    Args:
        width: size of a hidden layer.
        depth: number of hidden layers.
        input_dropout: the probability for pixels.
        dropout: the probability after each hidden layer.

    Raises:
        ValueError: for an argument below 1, or a probability out of range.

    Paper: Courbariaux et al., "BinaryConnect", NeurIPS 2015. BatchNorm's momentum is torch's.
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 10,
        image_size: int = 28,
        width: int = 1024,
        depth: int = 3,
        input_dropout: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        at_least(1, in_channels=in_channels, num_classes=num_classes, image_size=image_size)
        at_least(1, width=width, depth=depth)
        probability(input_dropout=input_dropout, dropout=dropout)
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.image_size = image_size
        self.width = width
        self.depth = depth
        self.input_dropout = input_dropout
        self.dropout = dropout
        self.flatten = nn.Flatten()
        self.input_drop = nn.Dropout(input_dropout)
        sizes = [in_channels * image_size**2, *[width] * depth]
        self.hidden = nn.Sequential(
            *(_hidden(*pair, dropout) for pair in zip(sizes, sizes[1:], strict=False))
        )
        self.fc = nn.Linear(width, num_classes, bias=False)
        self.bn = nn.BatchNorm1d(num_classes, eps=1e-4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.input_drop(self.flatten(x))
        return self.bn(self.fc(self.hidden(x)))


def _hidden(in_features: int, out_features: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(in_features, out_features, bias=False),
        nn.BatchNorm1d(out_features, eps=1e-4),
        nn.ReLU(),
        nn.Dropout(dropout),
    )
