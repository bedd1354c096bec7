"""Deep Compression: what pruning has left of the weights shares a few values."""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from nncx.compress._counterpart import counterpart, torch_type
from nncx.compress._k_means import INITS, k_means, nearest
from nncx.nn.shared import SharedConv2d, SharedLinear, check_width

_LAYERS = {nn.Conv2d: SharedConv2d, nn.Linear: SharedLinear}


@dataclass(frozen=True)
class DeepCompression:
    """The method of Deep Compression for `nncx.convert`: every convolution and linear layer.

    In each layer the weights are clustered by k-means, and those of a cluster share its mean, the
    centroid, which further training moves. The layer's float weight is gone at once: make the
    optimizer after `convert`. A pruned layer is taken with its mask, and one of its values is 0.
    Biases and BatchNorms stay float.

        pruning = nncx.Pruning(sparsity=0.92, rounds=4)
        for step in pruning.steps(nncx.convert(model, pruning)):
            nncx.train.fit(model, loader, epochs=4, optimizer=new_optimizer(model))
        nncx.convert(model, nncx.DeepCompression())
        nncx.train.fit(model, loader, epochs=4, optimizer=new_optimizer(model))  # the centroids
        nncx.save(nncx.freeze(model), path, entropy=True)  # relative indices, Huffman codes

    Args:
        conv_bits: width of a code in convolutions, 1 to 8: `2**bits` values, 0 included if there is
            a mask.
        linear_bits: width in linear layers.
        init: where the clusters begin. "linear": evenly spaced from the least to the largest
            weight, so that the few large ones, which matter most, get centroids of their own.
            "density": at quantiles, as many weights to each. "random": at weights drawn at random.
        seed: of "random".

    Raises:
        ValueError: for another width or init.

    Paper: Han et al., "Deep Compression: Compressing Deep Neural Networks with Pruning, Trained
    Quantization and Huffman Coding", ICLR 2016.
    """

    conv_bits: int = 8
    linear_bits: int = 5
    init: str = "linear"
    seed: int = 0

    keeps_first_and_last: ClassVar[bool] = False
    binarizes_input: ClassVar[bool] = False
    folds: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for bits in (self.conv_bits, self.linear_bits):
            check_width("DeepCompression", bits)
        if self.init not in INITS:
            raise ValueError(
                f"DeepCompression: init must be one of {', '.join(INITS)}, got {self.init!r}"
            )

    def replaces(self, module: nn.Module) -> bool:
        """Whether the method has a layer for `module`: of torch exactly, or a pruned one."""
        return torch_type(module) is not None

    def replace(self, module: nn.Module) -> nn.Module:
        """The layer of the clustered weights, with the very bias of `module` and its mask."""
        kind = torch_type(module)
        bits = self.conv_bits if kind is nn.Conv2d else self.linear_bits
        layer = counterpart(module, _LAYERS[kind], bits=bits)
        weight, mask = module.weight.detach(), layer.mask
        survivors = weight if mask is None else weight[mask]
        centroids = k_means(survivors, 2**bits - layer.masked, self.init, self.seed)
        layer.share(nearest(weight, centroids), centroids)
        return layer
