"""Incremental Network Quantization: powers of two, a share of the weights at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Real
from typing import ClassVar

from torch import nn

from nncx.compress._counterpart import counterpart, torch_type
from nncx.nn.inq import INQConv2d, INQLinear, check_bits

_LAYERS = {nn.Conv2d: INQConv2d, nn.Linear: INQLinear}


@dataclass(frozen=True)
class INQStep:
    """What a step of `INQ.steps` has done; the model is to be trained now.

    Attributes:
        number, count: which step it is, from 1, of how many.
        fraction: the share of the weights of each layer that is quantised now.
        quantized, weights: how many that are, and how many there are, of all layers together
            (without those that a mask makes 0).
    """

    number: int
    count: int
    fraction: float
    quantized: int
    weights: int

    def __str__(self) -> str:
        return (
            f"step {self.number} of {self.count}: {self.quantized:,} of {self.weights:,} weights"
            f" quantised ({self.fraction:.4g} of each layer)"
        )


@dataclass(frozen=True)
class INQ:
    """The method of Incremental Network Quantization: every `nn.Conv2d` and `nn.Linear`.

        method = nncx.INQ(bits=5)
        nncx.convert(model, method)
        for step in method.steps(model):
            train(model)  # with a new optimizer

    It is meant for a trained float network, whose weights become 0 and powers of two; biases and
    BatchNorms stay float. `convert` changes nothing that the network computes. Each step then
    quantises the largest of the weights that are float still, in each layer, and holds them: what
    is trained on makes up for the error. A pruned layer is taken with its mask: what is 0 stays 0,
    and the fractions are of the rest.

    Args:
        bits: width of a code, 2 to 8, for 3, 5, 9, 17, 33, 65 or 129 values.
        fractions: of each layer's weights, how many are quantised after each step; the last is 1.

    Raises:
        ValueError: for another width, or fractions that do not increase to 1.

    Paper: Zhou et al., "Incremental Network Quantization", ICLR 2017.
    """

    bits: int = 5
    fractions: Sequence[float] = (0.5, 0.75, 0.875, 1.0)

    keeps_first_and_last: ClassVar[bool] = False
    binarizes_input: ClassVar[bool] = False
    folds: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_bits("INQ", self.bits)
        fractions = self.fractions
        sound = (
            isinstance(fractions, list | tuple)
            and all(isinstance(fraction, Real) for fraction in fractions)
            and all(low < high for low, high in pairwise((0, *fractions)))
            and list(fractions[-1:]) == [1]
        )
        if not sound:
            raise ValueError(
                f"INQ: fractions must increase from above 0 to 1, got {fractions!r}; the paper"
                " takes (0.5, 0.75, 0.875, 1)"
            )
        object.__setattr__(self, "fractions", tuple(fractions))

    def replaces(self, module: nn.Module) -> bool:
        """Whether the method has a layer for `module`: of torch exactly, or a pruned one."""
        return torch_type(module) is not None

    def replace(self, module: nn.Module) -> nn.Module:
        """The layer to be quantised, with the very Parameters of `module` and its mask."""
        return counterpart(module, _LAYERS[torch_type(module)], bits=self.bits)

    def steps(self, model: nn.Module) -> Iterator[INQStep]:
        """Quantise a share of the weights of `model`, in place, then yield for training; and again.

        What is quantised, and to which values, is part of the state dict: a model that is loaded in
        the middle of it goes on with the first fraction that it has not reached. Give every step a
        new optimizer, or its momentum is that of other weights; the paper also begins anew with the
        learning rate.

        After the last step no weight is free, but biases and BatchNorms still train.

        Raises:
            ValueError: if no layer of `model` is one of INQ with a float weight, or if a weight is
                not finite.
        """
        layers = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, INQConv2d | INQLinear) and not module.frozen
        }
        if not layers:
            raise ValueError(
                f"INQ.steps: {type(model).__name__} must have an INQ layer with a float weight, got"
                " none; call nncx.convert(model, nncx.INQ()) first"
            )
        return self._steps(layers)

    def _steps(self, layers: dict[str, INQConv2d | INQLinear]) -> Iterator[INQStep]:
        for number, fraction in enumerate(self.fractions, 1):
            for name, layer in layers.items():
                if not layer.weight.isfinite().all():
                    raise ValueError(
                        f"INQ.steps: '{name}' must have a finite weight, got NaN or infinity; train"
                        " it anew"
                    )
            if sum(layer.quantize_largest(fraction) for layer in layers.values()):
                yield INQStep(
                    number,
                    len(self.fractions),
                    fraction,
                    sum(layer.quantized for layer in layers.values()),
                    sum(layer.weights for layer in layers.values()),
                )
