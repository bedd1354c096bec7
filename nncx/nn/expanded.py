"""Layers that are small in a file only: evaluation expands the weight, and runs torch's kernels.

There is no native op behind them. The weight is expanded once, when the layer packs, to float32,
in which torch's kernels are fastest on a CPU. So a frozen layer takes in memory what a float layer
does, and what its file holds besides.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nncx.nn.geometry import PackedConv2d, PackedLinear
from nncx.nn.packed import PackedLayer


class _ExpandedLayer(PackedLayer):
    """What the two shapes share; a family implements what is raised here, and `_drop_weight`."""

    def _expanded(self) -> Tensor:
        """The weight of evaluation in float32, from the float weight or from what is saved."""
        raise NotImplementedError

    def _trained(self) -> Tensor:
        """The weight of training, through which gradients reach `weight`."""
        raise NotImplementedError

    def _has_kernel(self, device: torch.device) -> bool:
        return device.type != "meta"

    def _pack(self) -> None:
        self._prepacked = self._expanded()

    def _operands(self, input: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """What torch's function takes, in the dtype of the input: it, the weight and the bias."""
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return input, weight.to(input.dtype), bias


class ExpandedConv2d(_ExpandedLayer, PackedConv2d):
    """A convolution by `F.conv2d`."""

    op = "conv2d"  # of torch

    def _kernel(self, input: Tensor, padding: tuple[int, int]) -> Tensor:
        return self._convolve(input, self._prepacked, padding)

    def _float(self, input: Tensor, padding: tuple[int, int]) -> Tensor:
        return self._convolve(input, self._trained(), padding)

    def _convolve(self, input: Tensor, weight: Tensor, padding: tuple[int, int]) -> Tensor:
        operands = self._operands(input, weight)
        return F.conv2d(*operands, self.stride, padding, self.dilation, self.groups)


class ExpandedLinear(_ExpandedLayer, PackedLinear):
    """A linear layer by `F.linear`."""

    op = "linear"  # of torch

    def _kernel(self, rows: Tensor) -> Tensor:
        return F.linear(*self._operands(rows, self._prepacked))

    def _float(self, rows: Tensor) -> Tensor:
        return F.linear(*self._operands(rows, self._trained()))
