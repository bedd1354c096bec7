"""Deep Compression: what pruning has left of the weights shares a few values."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
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
        bits: widths of other layers, `{name: width}`, in place of the two above.
        init: where the clusters begin. "linear": evenly spaced from the least to the largest
            weight, so that the few large ones, which matter most, get centroids of their own.
            "density": at quantiles, as many weights to each. "random": at weights drawn at random.
        seed: of "random".

    Raises:
        ValueError: for another width or init; from `convert`, for a name that is none of a layer.

    Paper: Han et al., "Deep Compression: Compressing Deep Neural Networks with Pruning, Trained
    Quantization and Huffman Coding", ICLR 2016.
    """

    conv_bits: int = 8
    linear_bits: int = 5
    bits: Mapping[str, int] | None = None
    init: str = "linear"
    seed: int = 0

    keeps_first_and_last: ClassVar[bool] = False
    binarizes_input: ClassVar[bool] = False
    folds: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not isinstance(self.bits, Mapping | None):
            raise ValueError(
                f"DeepCompression: bits must be widths by the names of layers, got {self.bits!r};"
                " conv_bits and linear_bits are for all"
            )
        for bits in (self.conv_bits, self.linear_bits, *(self.bits or {}).values()):
            check_width("DeepCompression", bits)
        if self.init not in INITS:
            raise ValueError(
                f"DeepCompression: init must be one of {', '.join(INITS)}, got {self.init!r}"
            )

    def for_layers(self, names: Mapping[nn.Module, list[str]]) -> "DeepCompression":
        """The method for a model with these modules: what `bits` names is found.

        Raises:
            ValueError: if `bits` names what is no layer of the method.
        """
        modules = {name: module for module, its in names.items() for name in its}
        for name in self.bits or ():
            if name not in modules or not self.replaces(modules[name]):
                raise ValueError(
                    "DeepCompression: bits must name nn.Conv2d, nn.Linear and pruned layers, got"
                    f" {name!r}; take names from model.named_modules()"
                )
        return replace(self, bits={modules[name]: bits for name, bits in (self.bits or {}).items()})

    def replaces(self, module: nn.Module) -> bool:
        """Whether the method has a layer for `module`: of torch exactly, or a pruned one."""
        return torch_type(module) is not None

    def replace(self, module: nn.Module) -> nn.Module:
        """The layer of the clustered weights, with the very bias of `module` and its mask."""
        kind = torch_type(module)
        bits = self.conv_bits if kind is nn.Conv2d else self.linear_bits
        bits = (self.bits or {}).get(module, bits)
        layer = counterpart(module, _LAYERS[kind], bits=bits)
        weight, mask = module.weight.detach(), layer.mask
        survivors = weight if mask is None else weight[mask]
        centroids = k_means(survivors, 2**bits - layer.masked, self.init, self.seed)
        layer.share(nearest(weight, centroids), centroids)
        return layer
