"""HashedNets: few values, shared by the weights that hash to them."""

from dataclasses import dataclass
from numbers import Integral
from typing import ClassVar

import torch
from torch import Tensor, nn

from nncx import ops
from nncx.nn.hashed import HashedLinear

_LAYERS = 2**16  # seeds of one network


@dataclass(frozen=True)
class Hashed:
    """The method of HashedNets for `nncx.convert`: every `nn.Linear`, the first and last included.

    A layer's buckets begin as the least-squares fit of its weight, each the mean of the weights
    that hash to it, with the hash's signs; then all are multiplied by the number that gives the
    virtual weight the mean square of the old one, which sharing has made smaller. A new network
    thereby starts as wide as it was. Of a trained one little is left, at 1/8 one eighth of the
    variance: train on. Biases stay the same Parameters. The buckets are **new Parameters**, of
    another shape than the weights: make optimizers after converting.

    Args:
        compression: buckets for each weight, in (0, 1].
        seed: of the hashes: that of the n-th converted layer is `65536 * seed + n`.

    Raises:
        ValueError: for a compression or a seed out of range.

    Paper: Chen et al., "Compressing Neural Networks with the Hashing Trick", ICML 2015.
    """

    compression: float = 1 / 8
    seed: int = 0

    keeps_first_and_last: ClassVar[bool] = False
    binarizes_input: ClassVar[bool] = False
    folds: ClassVar[bool] = False
    numbers_layers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.compression <= 1:
            raise ValueError(f"Hashed: compression must be in (0, 1], got {self.compression}")
        if not isinstance(self.seed, Integral) or not -(2**47) <= self.seed < 2**47:
            raise ValueError(f"Hashed: seed must be an integer of 48 bits, got {self.seed}")

    def replaces(self, module: nn.Module) -> bool:
        """Whether the method has a layer for `module`; subclasses may mean something else."""
        return type(module) is nn.Linear

    def replace(self, module: nn.Module, number: int) -> nn.Module:
        """The hashed layer, the `number`-th of its network, fitted to `module`."""
        layer = HashedLinear(
            module.in_features,
            module.out_features,
            bias=module.bias is not None,
            device="meta",
            compression=self.compression,
            seed=_LAYERS * self.seed + number,
        )
        layer.weight = nn.Parameter(fit(module.weight, layer.seed, layer.buckets))
        layer.weight.requires_grad_(module.weight.requires_grad)
        layer.bias = module.bias
        return layer.train(module.training)


@torch.no_grad()
def fit(weight: Tensor, seed: int, buckets: int) -> Tensor:
    """The buckets of a hashed weight that is close to `weight`, and has its mean square.

    Args:
        weight: `[out_features, in_features]`, of any floating dtype.
        seed, buckets: of the hash.

    Returns:
        `[buckets]` in the dtype of `weight`. A bucket that no weight hashes to is 0.
    """
    out_features, in_features = weight.shape
    geometry = seed, in_features, out_features
    signs = ops.hashed_weight(weight.new_ones(buckets, dtype=torch.float32), *geometry)
    counts = ops.hashed_bucket_sums(signs, seed, buckets)
    means = ops.hashed_bucket_sums(weight.float(), seed, buckets) / counts.clamp_min(1)
    virtual = ops.hashed_weight(means, *geometry)
    scale = weight.float().norm() / virtual.norm().clamp_min(torch.finfo(torch.float32).tiny)
    return (means * scale).to(weight.dtype)
