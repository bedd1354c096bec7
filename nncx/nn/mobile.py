"""Layers of factorised convolutions: depthwise, grouped, pointwise, and the shuffle of channels.

They hold float weights as torch's layers do, under the same names, and run nncx's kernels in
training and evaluation alike; gradients are exact. What stands behind the convolution, an
activation or a shuffle, is done while its output is written.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nncx import ops
from nncx.nn.native import NativeLayer
from nncx.ops._activation import ACTIVATIONS
from nncx.ops._conv2d import memory_format

_Size = int | tuple[int, int]


class _FusedConv2d(NativeLayer, nn.Conv2d):
    """What the convolutions share: every padding of `nn.Conv2d`, autocast, an activation."""

    activation: str

    def _init_activation(self, activation: str) -> None:
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"{type(self).__name__}: activation must be one of {', '.join(ACTIVATIONS)}, got"
                f" {activation!r}"
            )
        self.activation = activation

    def extra_repr(self) -> str:
        return super().extra_repr() + _shown(activation=(self.activation, "none"))

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() == 3:
            return self.forward(input.unsqueeze(0)).squeeze(0)
        input, padding = self.padded(input)
        return self._convolve(*_autocast(input, self.weight, self.bias), padding)

    def padded(self, input: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """The input, checked, and the zeros on both sides that the op adds: alike, or none."""
        if input.dim() != 4 or input.shape[1] != self.in_channels:
            raise RuntimeError(
                f"{type(self).__name__}: input must be [N, {self.in_channels}, H, W] or"
                f" [{self.in_channels}, H, W], got {list(input.shape)}"
            )
        left, right, top, bottom = self._reversed_padding_repeated_twice
        if self.padding_mode == "zeros" and (left, top) == (right, bottom):
            return input, (top, left)
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        padded = F.pad(input, (left, right, top, bottom), mode)
        return padded.contiguous(memory_format=memory_format(input)), (0, 0)

    def _convolve(
        self, input: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, int]
    ) -> Tensor:
        raise NotImplementedError


class DepthwiseConv2d(_FusedConv2d):
    """`nn.Conv2d` that filters every channel alone: `groups` is the number of channels.

    Forward: `activation(conv2d(x, W, groups=C) + bias)`; gradients are exact.

    Input `[N, C, H, W]` or `[C, H, W]`, contiguous or channels_last, which the output
    `[N, C * multiplier, H', W']` is too; of the weight's dtype, or under autocast of any.

    Args:
        channels: C.
        kernel_size, stride, padding, dilation, bias, padding_mode: as nn.Conv2d.
        multiplier: outputs of each channel, which follow one another.
        activation: none, relu or relu6.

    Raises:
        ValueError: for another activation, or what `nn.Conv2d` does not take.

    Paper: Howard et al., "MobileNets: Efficient Convolutional Neural Networks for Mobile Vision
        Applications", 2017.
    """

    op = "depthwise_conv2d"

    def __init__(
        self,
        channels: int,
        kernel_size: _Size,
        stride: _Size = 1,
        padding: str | _Size = 0,
        dilation: _Size = 1,
        multiplier: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str = "none",
    ) -> None:
        for name, value in (("channels", channels), ("multiplier", multiplier)):
            if value < 1:
                raise ValueError(f"DepthwiseConv2d: {name} must be at least 1, got {value}")
        super().__init__(
            channels,
            channels * multiplier,
            kernel_size,
            stride,
            padding,
            dilation,
            channels,
            bias,
            padding_mode,
            device,
            dtype,
        )
        self._init_activation(activation)

    @property
    def channels(self) -> int:
        return self.in_channels

    @property
    def multiplier(self) -> int:
        return self.out_channels // self.in_channels

    def _convolve(
        self, input: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, int]
    ) -> Tensor:
        return ops.depthwise_conv2d(
            input, weight, bias, self.stride, padding, self.dilation, activation=self.activation
        )


class GroupedConv2d(_FusedConv2d):
    """`nn.Conv2d`, made for few or many groups and for 1x1 kernels, whose output may be shuffled.

    Forward: `channel_shuffle(activation(conv2d(x, W) + bias), shuffle)`; gradients are exact.

    Input, output, dtypes: as `DepthwiseConv2d`.

    Args:
        shuffle: groups of channels that the output is shuffled by; 1 leaves them in order.
        activation: none, relu or relu6.

    Raises:
        ValueError: if `shuffle` does not divide `out_channels`, for another activation, or what
            `nn.Conv2d` does not take.

    Paper: Zhang et al., "ShuffleNet: An Extremely Efficient Convolutional Neural Network for Mobile
        Devices", CVPR 2018.
    """

    op = "grouped_conv2d"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _Size,
        stride: _Size = 1,
        padding: str | _Size = 0,
        dilation: _Size = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        shuffle: int = 1,
        activation: str = "none",
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
        )
        if shuffle < 1 or out_channels % shuffle:
            raise ValueError(
                f"GroupedConv2d: shuffle must divide the {out_channels} output channels, got"
                f" {shuffle}"
            )
        self.shuffle = shuffle
        self._init_activation(activation)

    def extra_repr(self) -> str:
        return super().extra_repr() + _shown(shuffle=(self.shuffle, 1))

    def _convolve(
        self, input: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, int]
    ) -> Tensor:
        return ops.grouped_conv2d(
            input,
            weight,
            bias,
            self.stride,
            padding,
            self.dilation,
            self.groups,
            activation=self.activation,
            shuffle=self.shuffle,
        )


class ChannelShuffle(NativeLayer, nn.ChannelShuffle):
    """`nn.ChannelShuffle`: channels of `groups` groups, dealt out in turn.

    Forward: output channel `i * groups + g` is input channel `g * (C / groups) + i`.

    Input `[N, C, H, W]` of any dtype, contiguous or channels_last, which the output is too.

    Raises:
        ValueError: for fewer than one group.
    """

    op = "channel_shuffle"

    def __init__(self, groups: int) -> None:
        super().__init__(groups)
        if groups < 1:
            raise ValueError(f"ChannelShuffle: groups must be at least 1, got {groups}")

    def forward(self, input: Tensor) -> Tensor:
        return ops.channel_shuffle(input, self.groups)


class DepthwiseSeparableConv2d(NativeLayer):
    """A convolution in two factors: each channel filtered alone, then all mixed pixel by pixel.

    Forward: `pointwise(depthwise(x))`, a `DepthwiseConv2d` and a 1x1 `GroupedConv2d` of one group;
    `k * k * C + C * out` weights in place of `k * k * C * out`. Both run at once, the same bits,
    unless a half has hooks or is another module by now: then they are called in turn.

    Input `[N, in_channels, H, W]` or `[in_channels, H, W]`, dtypes: as `DepthwiseConv2d`.

    Args:
        kernel_size, stride, padding, dilation, padding_mode: of the depthwise convolution.
        bias: of both.
        multiplier: outputs of each channel of the depthwise convolution.
        depthwise_activation, activation: of the depthwise and of the pointwise convolution, each
            none, relu or relu6.

    Raises:
        ValueError: for another activation, or what `nn.Conv2d` does not take.

    Paper: Howard et al., "MobileNets: Efficient Convolutional Neural Networks for Mobile Vision
        Applications", 2017.
    """

    op = "depthwise_separable_conv2d"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _Size,
        stride: _Size = 1,
        padding: str | _Size = 0,
        dilation: _Size = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        multiplier: int = 1,
        depthwise_activation: str = "none",
        activation: str = "none",
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = kernel_size
        self.stride = stride
        self.padding = padding
        self.dilation = dilation
        self.bias = bias
        self.padding_mode = padding_mode
        self.multiplier = multiplier
        self.depthwise_activation = depthwise_activation
        self.activation = activation
        self.depthwise = DepthwiseConv2d(
            in_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            multiplier,
            bias=bias,
            padding_mode=padding_mode,
            device=device,
            dtype=dtype,
            activation=depthwise_activation,
        )
        self.pointwise = GroupedConv2d(
            in_channels * multiplier,
            out_channels,
            1,
            bias=bias,
            device=device,
            dtype=dtype,
            activation=activation,
        )

    def forward(self, input: Tensor) -> Tensor:
        depthwise, pointwise = self.depthwise, self.pointwise
        if not (_is_plain(depthwise, DepthwiseConv2d) and _is_plain(pointwise, GroupedConv2d)):
            return pointwise(depthwise(input))
        if input.dim() == 3:
            return self.forward(input.unsqueeze(0)).squeeze(0)
        input, padding = depthwise.padded(input)
        weights = depthwise.weight, pointwise.weight, depthwise.bias, pointwise.bias
        return ops.depthwise_separable_conv2d(
            *_autocast(input, *weights),
            depthwise.stride,
            padding,
            depthwise.dilation,
            depthwise_activation=depthwise.activation,
            activation=pointwise.activation,
        )


def _is_plain(layer: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether nobody would see that the layer is not called."""
    return type(layer) is cls and not (layer._forward_hooks or layer._forward_pre_hooks)


def _autocast(*operands: Tensor | None) -> list[Tensor | None]:
    """The operands, under autocast in its dtype, as torch's convolution takes them."""
    device = operands[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return list(operands)
    dtype = torch.get_autocast_dtype(device)
    return [
        each if each is None or each.dtype == torch.float64 else each.to(dtype) for each in operands
    ]


def _shown(**arguments: tuple[Any, Any]) -> str:
    """What `repr` says of each argument (value, default): nothing of one at its default."""
    return "".join(
        f", {name}={value}" for name, (value, default) in arguments.items() if value != default
    )
