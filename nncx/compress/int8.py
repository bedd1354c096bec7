"""int8: weights and inputs of layers in 8 bits, trained or calibrated."""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from nncx.compress._counterpart import GEOMETRY, counterpart
from nncx.nn.int8 import Int8Conv2d, Int8Linear

_LAYERS = {nn.Conv2d: Int8Conv2d, nn.Linear: Int8Linear}


@dataclass(frozen=True)
class Int8:
    """The method of int8 for `nncx.convert`: every `nn.Conv2d` and `nn.Linear`.

    The first and the last layer become int8 as well; biases, BatchNorms and what is between the
    layers stay float. A trained network needs no change of its weights, only the ranges of the
    layers' inputs: run some batches through it in training mode, or train it on (quantization-aware
    training), and stop the ranges with `observe(model, False)` before the end if they shall not
    move any more. A network that shall not be trained at all is better given to `nncx.quantize`,
    which folds BatchNorms and chooses ranges by observers.

    Args:
        per_channel: a scale of the weight for each output channel, or one for each layer.
        symmetric: whether inputs have the zero point 0.

    Paper: Jacob et al., "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference", CVPR 2018.
    """

    per_channel: bool = True
    symmetric: bool = False

    keeps_first_and_last: ClassVar[bool] = False
    binarizes_input: ClassVar[bool] = False
    folds: ClassVar[bool] = False

    def replaces(self, module: nn.Module) -> bool:
        """Whether the method has a layer for `module`; subclasses may mean something else."""
        return type(module) in GEOMETRY

    def replace(self, module: nn.Module) -> nn.Module:
        """The int8 layer, with the very Parameters of `module`, which optimizers may hold."""
        cls = _LAYERS[type(module)]
        return counterpart(module, cls, per_channel=self.per_channel, symmetric=self.symmetric)


def observe(model: nn.Module, mode: bool = True) -> nn.Module:
    """Let the input ranges of int8 layers follow the data in training, or stay; in place.

    Returns:
        `model`.

    Raises:
        ValueError: if it has no int8 layer.
    """
    layers = [m for m in model.modules() if isinstance(m, tuple(_LAYERS.values()))]
    if not layers:
        raise ValueError(
            f"observe: {type(model).__name__} must have an int8 layer, got none; call"
            " nncx.convert(model, nncx.Int8()) first"
        )
    for layer in layers:
        layer.observe = mode
    return model
