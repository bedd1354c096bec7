"""The shapes of layers that stand in for `nn.Conv2d` and `nn.Linear`, whatever they compute.

A family of layers mixes these with what its arithmetic needs, and implements `_kernel` (the native
op) and `_float` (the same in torch, with gradients), of which `forward` calls one.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nncx.nn.packed import PackedLayer
from nncx.ops._conv2d import memory_format


class PackedConv2d(PackedLayer, nn.Conv2d):
    """Images `[N, C, H, W]` or `[C, H, W]`, every padding of `nn.Conv2d`, its memory formats.

    `_kernel` and `_float` get a batch of images and a zero padding alike on both sides, as
    `(height, width)`.
    """

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() == 3:
            return self.forward(input.unsqueeze(0)).squeeze(0)
        name = type(self).__name__
        _check_floating(input, name)
        if input.dim() != 4 or input.shape[1] != self.in_channels:
            raise RuntimeError(
                f"{name}: input must be [N, {self.in_channels}, H, W] or"
                f" [{self.in_channels}, H, W], got {list(input.shape)}"
            )
        strides = memory_format(input)
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
        padding, crop = self._symmetric_padding()
        convolve = self._kernel if self._runs_native(input) else self._float
        output = convolve(input, padding)
        if any(crop):
            output = output[:, :, crop[0] :, crop[1] :]
        return output.contiguous(memory_format=strides)

    def _kernel(self, input: Tensor, padding: tuple[int, int]) -> Tensor:
        raise NotImplementedError

    def _float(self, input: Tensor, padding: tuple[int, int]) -> Tensor:
        raise NotImplementedError

    def _symmetric_padding(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Zero padding as the ops take it, and the leading rows and columns to cut off after it.

        padding="same" under an even kernel needs one more on the right than on the left. The op
        pads both sides alike, so it gets the larger; the stride is 1 there, and cutting is exact.
        """
        if self.padding_mode != "zeros":
            return (0, 0), (0, 0)
        left, right, top, bottom = self._reversed_padding_repeated_twice
        return (bottom, right), (bottom - top, right - left)


class PackedLinear(PackedLayer, nn.Linear):
    """`[..., in_features]` -> `[..., out_features]`; `_kernel` and `_float` get rows `[M, K]`."""

    def forward(self, input: Tensor) -> Tensor:
        name = type(self).__name__
        _check_floating(input, name)
        if input.dim() == 0 or input.shape[-1] != self.in_features:
            raise RuntimeError(
                f"{name}: input must be [..., {self.in_features}], got {list(input.shape)}"
            )
        rows = input.flatten(0, -2) if input.dim() > 1 else input.unsqueeze(0)
        multiply = self._kernel if self._runs_native(input) else self._float
        return multiply(rows).view(*input.shape[:-1], self.out_features)

    def _kernel(self, rows: Tensor) -> Tensor:
        raise NotImplementedError

    def _float(self, rows: Tensor) -> Tensor:
        raise NotImplementedError


def both_sides(padding: tuple[int, int]) -> list[int]:
    """(height, width) -> what F.pad takes."""
    height, width = padding
    return [width, width, height, height]


def kernel_dtype(input: Tensor) -> torch.dtype:
    """That of `input`, if a native op can give its result in it."""
    native = (torch.float32, torch.float16, torch.bfloat16)
    return input.dtype if input.dtype in native else torch.float32


def kernel_input(input: Tensor) -> Tensor:
    """In a dtype that the native ops take, which is that of their output: under autocast its."""
    if input.dtype == torch.float64:
        return input.float()
    if torch.is_autocast_enabled(input.device.type):
        return input.to(torch.get_autocast_dtype(input.device.type))
    return input


def no_autocast(device: torch.device) -> AbstractContextManager:
    """For sums of integers: autocast would make them half precision, exact up to 2**11 only."""
    if device.type == "meta":  # which has none to switch off
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def _check_floating(input: Tensor, layer: str) -> None:
    if not input.is_floating_point():
        raise RuntimeError(f"{layer}: input must be floating, got {input.dtype}; convert it")
