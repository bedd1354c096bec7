"""Layers of int8: weights and inputs in 8 bits, sums in 32.

In training they compute with the same integers in torch's float kernels, in evaluation with
`nncx.ops.quantize_int8` and `int8_conv2d` or `int8_linear`. Both add up integers, then multiply by
`s_x * s_w[o]` and add the bias, in that order. They give the same bits as long as float32 holds the
sums, which is sure for up to 518 terms (2**24 / (255 * 127)), and else are equal to rounding.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nncx import ops
from nncx.nn.geometry import PackedConv2d, PackedLinear, kernel_dtype, no_autocast
from nncx.nn.packed import PackedLayer
from nncx.nn.quantizers import (
    int8_input,
    int8_input_parameters,
    int8_weight,
    int8_weight_scale,
)
from nncx.ops._conv2d import memory_format
from nncx.ops._int8 import MOST_TERMS

_SCALES = ("weight_scale", "input_scale", "input_zero_point")
_MOMENTUM = 0.01  # of a batch in the moving average of the input range


class _Int8Layer(PackedLayer):
    """What the two layers share: the range of the input, and weights in int8 with their scale.

    Attributes:
        input_range: float32 `[2]`, minimum and maximum of the input; (inf, -inf), the range of
            nothing, until it is known. That is equal to itself, unlike NaN, and no data gives it,
            unlike a scale of 0. A buffer until freezing.
        input_scale, input_zero_point: float32 and int8 `[]`: what follows from the range.
        weight_scale: float32 `[O]`, or `[1]` if the layer has one for all. These three are there in
            evaluation, as buffers from freezing on.
        observe: whether training follows the input's range by a moving average.
    """

    precision = "int8"
    per_channel: bool
    symmetric: bool
    observe: bool
    input_range: Tensor | None
    input_scale: Tensor | None
    input_zero_point: Tensor | None
    weight_scale: Tensor | None
    _sum_scale: Tensor  # float32 [O], beside the packed weights

    def _init_int8(self, per_channel: bool, symmetric: bool) -> None:
        terms = math.prod(self.weight.shape[1:])
        if terms > MOST_TERMS:
            raise ValueError(
                f"{type(self).__name__}: an output must sum at most {MOST_TERMS} products, which"
                f" int32 holds, got {terms}; keep this layer float"
            )
        self.per_channel = per_channel
        self.symmetric = symmetric
        self.observe = True
        self._outputs = len(self.weight)
        self.register_buffer("input_range", None)
        self.reset_buffers()
        self.input_scale = self.input_zero_point = self.weight_scale = None
        self._init_packing()

    def reset_buffers(self) -> None:
        self.input_range = torch.tensor([math.inf, -math.inf], device=self.weight.device)

    def extra_repr(self) -> str:
        extras = "" if self.per_channel else ", per_channel=False"
        extras += ", symmetric=True" if self.symmetric else ""
        extras += ", frozen=True" if self.frozen else ""
        return super().extra_repr() + extras

    def set_input_range(self, minimum: float, maximum: float) -> None:
        """Say in which range the inputs lie, as from a calibration; what is outside is clipped.

        The range always contains 0: a minimum above and a maximum below it count as 0.

        Raises:
            ValueError: if the two are not finite and in order.
            RuntimeError: if the layer is frozen.
        """
        name = type(self).__name__
        minimum, maximum = float(minimum), float(maximum)
        if not -math.inf < minimum <= maximum < math.inf:
            raise ValueError(
                f"{name}: minimum and maximum of the input range must be finite and in order, got"
                f" {minimum} and {maximum}; take them from an observer of nncx.compress.observers"
            )
        if self.frozen:
            raise RuntimeError(
                f"{name}: the input range must be set before freezing, got a frozen layer; convert"
                " the float model again"
            )
        self.input_range = torch.tensor([minimum, maximum], device=self.weight.device)
        self.repack()

    def why_not_freezable(self) -> str | None:
        if self.weight.is_meta:
            return None
        if reason := self._why_no_range():
            return reason
        if not self.weight.isfinite().all():
            return "must have a finite weight, got NaN or infinity; train it anew"
        return None

    def _why_no_range(self) -> str | None:
        if self.input_range.is_meta:
            return None
        minimum, maximum = self.input_range.tolist()
        if -math.inf < minimum <= maximum < math.inf:
            return None
        got = "none yet" if minimum > maximum else f"{minimum} to {maximum}"
        return (
            f"must know the range of its input, got {got}; call set_input_range(minimum, maximum),"
            " or forward in training mode with observe=True, or nncx.quantize"
        )

    def _why_not_usable(self) -> str | None:
        """`why_not_freezable`, also of a frozen layer, whose scales a file may hold."""
        if not self.frozen:
            return self.why_not_freezable()
        scales = torch.cat([self.input_scale.view(1), self.weight_scale])
        if not ((scales > 0) & scales.isfinite()).all():
            return "must have scales that are positive and finite, got others; freeze it anew"
        return None

    def _why_not_packed(self, device: torch.device) -> str:
        reason = self._why_not_usable()
        return f"{type(self).__name__} {reason}" if reason else super()._why_not_packed(device)

    def _drop_weight(self) -> None:
        self._set_scales()
        scales = {name: getattr(self, name) for name in _SCALES}
        self.packed_weight = self._codes()
        self.input_range = None
        for name, tensor in scales.items():
            delattr(self, name)
            self.register_buffer(name, tensor)

    def repack(self) -> None:
        if not self.frozen:
            self.input_scale = self.input_zero_point = self.weight_scale = None
        super().repack()

    def _pack(self) -> None:
        if self._why_not_usable():  # which forward will say
            return
        if not self.frozen:
            self._set_scales()
        self._prepacked = self._prepack(self.packed_weight if self.frozen else self._codes())
        self._sum_scale = self._times(self.input_scale, self.weight_scale)

    def _prepack(self, codes: Tensor) -> Tensor:
        raise NotImplementedError

    def _set_scales(self) -> None:
        """What the kernel reads besides the weight, of the float weight and the range."""
        self.input_scale, self.input_zero_point = self._input_parameters()
        self.weight_scale = int8_weight_scale(self.weight, self.per_channel)

    def _codes(self) -> Tensor:
        if self.weight.is_meta:  # as in load, at once
            return self.weight.new_empty(self.weight.shape, dtype=torch.int8)
        return int8_weight(self.weight, self.weight_scale).to(torch.int8).contiguous()

    def _input_parameters(self) -> tuple[Tensor, Tensor]:
        return int8_input_parameters(self.input_range, self.symmetric)

    def _times(self, input_scale: Tensor, weight_scale: Tensor) -> Tensor:
        """The scale of the sums, float32 `[O]`."""
        return (input_scale * weight_scale).expand(self._outputs).contiguous()

    def _kernel_input(self, input: Tensor) -> Tensor:
        input = input.to(kernel_dtype(input))
        return ops.quantize_int8(input, self.input_scale, self.input_zero_point)

    def _kernel_epilogue(self, input: Tensor) -> dict[str, Any]:
        """What the int8 ops take besides the sum's operands."""
        return {
            "input_zero_point": self.input_zero_point,
            "scale": self._sum_scale,
            "bias": None if self.bias is None else self.bias.float(),
            "out_dtype": kernel_dtype(input),
        }

    def _float_operands(self, input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Integers of input and weight, and the scale of the sums of their products."""
        if self.training and self.observe:
            self._follow(input.detach())
        elif not torch.compiler.is_compiling() and (reason := self._why_no_range()):
            raise RuntimeError(f"{type(self).__name__} {reason}")
        input_scale, zero_point = self._input_parameters()
        weight_scale = int8_weight_scale(self.weight, self.per_channel)
        return (
            int8_input(input, input_scale, zero_point),
            int8_weight(self.weight, weight_scale),
            self._times(input_scale, weight_scale),
        )

    def _float_epilogue(self, dots: Tensor, scale: Tensor) -> Tensor:
        """`dots * scale + bias`, outputs in dimension 1."""
        per_output = (-1, *[1] * (dots.dim() - 2))
        dots = dots * scale.view(per_output)
        return dots if self.bias is None else dots + self.bias.float().view(per_output)

    @torch.no_grad()
    def _follow(self, input: Tensor) -> None:
        """Move the range towards that of a batch; the first one sets it, a non-finite one nothing.

        (It is the overflow of a step that a gradient scaler skips.)
        """
        if not input.numel():
            return
        batch = torch.stack(torch.aminmax(input)).float()
        known = self.input_range[0] <= self.input_range[1]
        moved = torch.where(known, torch.lerp(self.input_range, batch, _MOMENTUM), batch)
        self.input_range.copy_(torch.where(batch.isfinite().all(), moved, self.input_range))

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any
    ) -> None:
        """A float layer's state leaves the range as it is."""
        if not self.frozen:
            state_dict.setdefault(f"{prefix}input_range", self.input_range)
        super()._load_from_state_dict(state_dict, prefix, *arguments)


class Int8Conv2d(_Int8Layer, PackedConv2d):
    """`nn.Conv2d` on 8-bit integers: its input rounded to one of 256 values, its weight to 255.

    Forward: `s_x * s_w[o] * conv2d(q_x - z_x, q_w) + bias`, with
    `q_x = clamp(rint(x / s_x) + z_x, -128, 127)` and `q_w = clamp(rint(W / s_w), -127, 127)`,
    `s_w = max |W|` of the filter over 127, and `s_x`, `z_x` from the input's range
    (`nncx.nn.quantizers.int8_input_parameters`). Zero padding counts as 0.
    Pseudo-gradient: rounding is the identity, what is clipped has no gradient, scales are constant.
    Paper: Jacob et al., "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference", CVPR 2018.

    In training the range follows that of the inputs by a moving average, unless `observe` is set to
    False; or `set_input_range` says it. Until one of them has, evaluation refuses.

    Input `[N, C, H, W]` or `[C, H, W]` of any floating dtype, which is the dtype of the output,
    also under autocast: inside, sums are int32 (training: float32) and the epilogue is float32. In
    evaluation a NaN counts as 0.

    Args:
        per_channel: a scale for each filter, or one for the layer.
        symmetric: the input's codes have the zero point 0, so that an input that is never negative
            (as after a ReLU) uses half of them; kernels without VNNI are faster on those.

    Raises:
        ValueError: for filters of more than 65,793 weights, whose sum int32 may not hold.
    """

    op = "int8_conv2d"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        per_channel: bool = True,
        symmetric: bool = False,
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
        self._init_int8(per_channel, symmetric)

    def _kernel(self, input: Tensor, padding: tuple[int, int]) -> Tensor:
        output = ops.int8_conv2d(
            self._kernel_input(input),
            self._prepacked,
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            padding,
            self.dilation,
            self.groups,
            channels_last=memory_format(input) is torch.channels_last,
            **self._kernel_epilogue(input),
        )
        return output.to(input.dtype)

    def _float(self, input: Tensor, padding: tuple[int, int]) -> Tensor:
        codes, weight, scale = self._float_operands(input)
        with no_autocast(input.device):
            dots = F.conv2d(codes, weight, None, self.stride, padding, self.dilation, self.groups)
        return self._float_epilogue(dots, scale).to(input.dtype)

    def _prepack(self, codes: Tensor) -> Tensor:
        return ops.int8_conv2d_prepack(codes, self.groups)


class Int8Linear(_Int8Layer, PackedLinear):
    """`nn.Linear` on 8-bit integers: its input rounded to one of 256 values, its weight to 255.

    Forward: `s_x * s_w[o] * linear(q_x - z_x, q_w) + bias`; codes, scales, pseudo-gradient, paper,
    range of the input, dtypes: as `Int8Conv2d`.

    Input `[..., in_features]`, output `[..., out_features]`.

    Args:
        per_channel: a scale for each row of the weight, or one for the layer.
        symmetric: as `Int8Conv2d`.

    Raises:
        ValueError: for more than 65,793 in_features, whose sum int32 may not hold.
    """

    op = "int8_linear"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        per_channel: bool = True,
        symmetric: bool = False,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self._init_int8(per_channel, symmetric)

    def _kernel(self, rows: Tensor) -> Tensor:
        output = ops.int8_linear(
            self._kernel_input(rows),
            self._prepacked,
            self.in_features,
            self.out_features,
            **self._kernel_epilogue(rows),
        )
        return output.to(rows.dtype)

    def _float(self, rows: Tensor) -> Tensor:
        codes, weight, scale = self._float_operands(rows)
        with no_autocast(rows.device):
            dots = F.linear(codes, weight)
        return self._float_epilogue(dots, scale).to(rows.dtype)

    def _prepack(self, codes: Tensor) -> Tensor:
        return ops.int8_linear_prepack(codes)
