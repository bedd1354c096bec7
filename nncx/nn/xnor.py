"""Layers of XNOR-Net: binary weights, binary inputs, a scale per filter.

In training they compute with torch's float kernels, in evaluation with `nncx.ops.binary_conv2d` and
`binary_linear` on packed signs. Both give the same float32 bits, because both convolve signs to an
integer first (exact in float32 up to 2**24 taps a filter, by any kernel that multiplies and adds:
not by Winograd or FFT), and then multiply by alpha, multiply by K and add the bias in that order.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nncx import ops
from nncx.nn.codes import pack_weight_signs, unpack_codes
from nncx.nn.geometry import PackedConv2d, PackedLinear, both_sides, kernel_dtype, no_autocast
from nncx.nn.packed import PackedLayer
from nncx.nn.quantizers import sign, xnor_alpha, xnor_sign
from nncx.ops._conv2d import memory_format
from nncx.ops._int8 import MOST_TERMS

SCALES = ("none", "alpha", "alpha_k")
PAD_VALUES = (-1, 0, 1)
_MOST_CHANNELS_IN_BYTES = 16  # of a group


class _XNORLayer(PackedLayer):
    """What the two layers share: the scale alpha, and signs packed to one bit."""

    precision = "binary"
    bits = 1  # of a packed weight
    scale: str
    alpha: Tensor | None

    def _init_xnor(self, scale: str) -> None:
        if scale not in SCALES:
            raise ValueError(f"scale must be one of {', '.join(SCALES)}, got {scale!r}")
        self.scale = scale
        self._shape = tuple(self.weight.shape)
        self.alpha = None  # a buffer from freezing on
        self._init_packing()

    def extra_repr(self) -> str:
        frozen = ", frozen=True" if self.frozen else ""
        return f"{super().extra_repr()}, scale={self.scale}{frozen}"

    def _weight_alpha(self) -> Tensor | None:
        return None if self.scale == "none" else xnor_alpha(self.weight)

    def _weight_signs(self) -> Tensor:
        binarize = sign if self.scale == "none" else xnor_sign
        return binarize(self.weight).float()

    def _drop_weight(self) -> None:
        alpha = self._weight_alpha()
        self.packed_weight = pack_weight_signs(self.weight)
        del self.alpha
        self.register_buffer("alpha", alpha)

    def _pack(self) -> None:
        if self.frozen:
            count = torch.Size(self._shape).numel()
            signs = unpack_codes(self.packed_weight, count, 1).view(self._shape).float() - 0.5
        else:
            signs = self.weight
            self.alpha = self._weight_alpha()
        self._prepacked = self._prepack(signs)

    def _prepack(self, weight: Tensor) -> Tensor:
        """What the kernel reads of a weight, of which the signs alone matter."""
        raise NotImplementedError

    def repack(self) -> None:
        if not self.frozen:
            self.alpha = None
        super().repack()

    def _kernel_epilogue(self, input: Tensor, input_scale: Tensor | None) -> dict[str, Any]:
        """The epilogue arguments of the binary ops."""
        return {
            "scale": self.alpha,
            "bias": None if self.bias is None else self.bias.float(),
            "input_scale": input_scale,
            "out_dtype": kernel_dtype(input),
        }

    def _float_epilogue(
        self, dots: Tensor, alpha: Tensor | None, input_scale: Tensor | None
    ) -> Tensor:
        """The same in torch: `dots * alpha * K + bias`, filters in dimension 1."""
        per_filter = (-1, *[1] * (dots.dim() - 2))
        if alpha is not None:
            dots = dots * alpha.view(per_filter)
        if input_scale is not None:
            dots = dots * input_scale
        return dots if self.bias is None else dots + self.bias.float().view(per_filter)


class XNORConv2d(_XNORLayer, PackedConv2d):
    """`nn.Conv2d` on the signs of its input and weight, scaled per filter.

    Forward: `alpha[o] * (K *) conv2d(sign(x), sign(W)) + bias`, with `alpha = mean |W|` per filter,
    `K` the mean of `|x|` over the taps and channels of the group, and `sign(0) = +1`.
    Pseudo-gradient: of x `1[|x| < 1]`, of W the published `1/n + alpha * 1[|W| < 1]`
    (`nncx.nn.quantizers`); K is differentiated as it stands.
    Paper: Rastegari et al., "XNOR-Net", ECCV 2016; the released code omits K, and so does the
    default.

    Input `[N, C, H, W]` or `[C, H, W]` of any floating dtype, which is the dtype of the output,
    also under autocast: inside, dot products and epilogue are float32.

    Args:
        scale: "none", "alpha", or "alpha_k" (alpha and K).
        pad_value: what positions of zero padding count as: 0 contributes nothing, as in torch; +1
            or -1 is cheaper to some other runtimes. K takes them as 0.

    Raises:
        ValueError: for another `scale` or `pad_value`, or a `pad_value` with a `padding_mode` that
            pads with the input's own values.
    """

    op = "binary_conv2d"

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
        scale: str = "alpha",
        pad_value: int = 0,
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
        if pad_value not in PAD_VALUES:
            raise ValueError(f"pad_value must be -1, 0 or 1, got {pad_value!r}")
        if pad_value and padding_mode != "zeros":
            raise ValueError(
                f"pad_value={pad_value} needs padding_mode='zeros', got {padding_mode!r}; drop one"
            )
        self.pad_value = pad_value
        self._init_xnor(scale)

    def extra_repr(self) -> str:
        pad_value = f", pad_value={self.pad_value}" if self.pad_value else ""
        return super().extra_repr() + pad_value

    def _kernel(self, input: Tensor, padding: tuple[int, int]) -> Tensor:
        convolve = self._in_bytes if self._runs_in_bytes(input.device) else self._in_bits
        return convolve(input, padding).to(input.dtype)

    def _in_bits(self, input: Tensor, padding: tuple[int, int]) -> Tensor:
        return ops.binary_conv2d(
            ops.pack_signs(input, self.groups),
            self._prepacked,
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            padding,
            self.dilation,
            self.groups,
            self.pad_value,
            channels_last=memory_format(input) is torch.channels_last,
            **self._kernel_epilogue(input, self._input_scale(input, padding)),
        )

    def _in_bytes(self, input: Tensor, padding: tuple[int, int]) -> Tensor:
        """The same bits: K, which `int8_conv2d` has not, is multiplied by in between."""
        input_scale = self._input_scale(input, padding)
        signs, padding = self._pad_signs(ops.sign_int8(input), padding)
        epilogue = self._kernel_epilogue(input, input_scale)
        if epilogue.pop("input_scale") is not None:
            epilogue = {}
        output = ops.int8_conv2d(
            signs,
            self._prepacked,
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            padding,
            self.dilation,
            self.groups,
            channels_last=memory_format(input) is torch.channels_last,
            **epilogue,
        )
        if input_scale is None:
            return output
        return self._float_epilogue(output, self.alpha, self._per_filter(input_scale))

    def _float(self, input: Tensor, padding: tuple[int, int]) -> Tensor:
        input_scale = self._input_scale(input, padding)
        signs, padding = self._pad_signs(sign(input).float(), padding)
        with no_autocast(input.device):
            weight = self._weight_signs()
            dots = F.conv2d(signs, weight, None, self.stride, padding, self.dilation, self.groups)
        if input_scale is not None:
            input_scale = self._per_filter(input_scale)
        return self._float_epilogue(dots, self._weight_alpha(), input_scale).to(input.dtype)

    def _prepack(self, weight: Tensor) -> Tensor:
        if self._runs_in_bytes(weight.device):
            return ops.int8_conv2d_prepack(ops.sign_int8(weight), self.groups)
        return ops.binary_conv2d_prepack(ops.pack_signs(weight), self.in_channels, self.groups)

    def _runs_in_bytes(self, device: torch.device) -> bool:
        """Whether signs are bytes and not bits: of few channels a group, on a CPU.

        A group begins at a whole word of 64 bits, which 16 channels fill to a quarter; up to there
        a CPU multiplies bytes faster.
        """
        channels = self.in_channels // self.groups
        terms = channels * math.prod(self.kernel_size)
        few = self.groups > 1 and channels <= _MOST_CHANNELS_IN_BYTES and terms <= MOST_TERMS
        return few and device.type == "cpu"

    def _pad_signs(self, signs: Tensor, padding: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        """A `pad_value` other than 0 written out, and what is left to pad."""
        if not self.pad_value:
            return signs, padding
        return F.pad(signs, both_sides(padding), value=self.pad_value), (0, 0)

    def _per_filter(self, input_scale: Tensor) -> Tensor:
        return input_scale.repeat_interleave(self.out_channels // self.groups, dim=1)

    def _input_scale(self, input: Tensor, padding: tuple[int, int]) -> Tensor | None:
        """K, float32 `[N, groups, H', W']`: mean of |x| over the group, then a box filter.

        The box is two passes of sums, not a convolution: those may round to TF32 on a GPU.
        """
        if self.scale != "alpha_k":
            return None
        magnitude = input.abs().unflatten(1, (self.groups, -1)).mean(2, dtype=torch.float32)
        magnitude = F.pad(magnitude, both_sides(padding))
        for dim in (0, 1):
            size = self.dilation[dim] * (self.kernel_size[dim] - 1) + 1
            windows = magnitude.unfold(dim + 2, size, self.stride[dim])
            magnitude = windows[..., :: self.dilation[dim]].mean(-1)
        return magnitude.contiguous()


class XNORLinear(_XNORLayer, PackedLinear):
    """`nn.Linear` on the signs of its input and weight, scaled per output feature.

    Forward: `alpha[o] * (K *) linear(sign(x), sign(W)) + bias`, with `alpha = mean |W|` per row of
    W, `K = mean |x|` per row of x, and `sign(0) = +1`.
    Pseudo-gradient, paper, dtypes: as `XNORConv2d`.

    Input `[..., in_features]`, output `[..., out_features]`.

    Args:
        scale: "none", "alpha", or "alpha_k" (alpha and K).

    Raises:
        ValueError: for another `scale`.
    """

    op = "binary_linear"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        scale: str = "alpha",
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self._init_xnor(scale)

    def _kernel(self, rows: Tensor) -> Tensor:
        output = ops.binary_linear(
            ops.pack_signs(rows),
            self._prepacked,
            self.in_features,
            self.out_features,
            **self._kernel_epilogue(rows, self._input_scale(rows)),
        )
        return output.to(rows.dtype)

    def _float(self, rows: Tensor) -> Tensor:
        input_scale = self._input_scale(rows)
        with no_autocast(rows.device):
            dots = F.linear(sign(rows).float(), self._weight_signs())
        input_scale = None if input_scale is None else input_scale[:, None]
        return self._float_epilogue(dots, self._weight_alpha(), input_scale).to(rows.dtype)

    def _prepack(self, weight: Tensor) -> Tensor:
        return ops.binary_linear_prepack(ops.pack_signs(weight), self.in_features)

    def _input_scale(self, rows: Tensor) -> Tensor | None:
        """K, float32 `[M]`: mean of |x| over the row."""
        return rows.abs().mean(1, dtype=torch.float32) if self.scale == "alpha_k" else None
