"""Layers of BinaryConnect: binary weights, float inputs.

In training they multiply by +1 and -1 in torch's float kernels, in evaluation with
`nncx.ops.codebook_conv2d` and `codebook_linear` on weights of one bit. Both add up the same floats,
in another order: they are equal to rounding.

The real weights are clipped to [-1, 1] at the start of each forward in training that wants their
gradient, which is when the last update is first used. No output depends on it, since clipping
changes neither a sign nor a probability; it bounds how many updates a weight is away from its next
change of sign.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nncx import ops
from nncx.nn.codes import pack_weight_signs
from nncx.nn.geometry import PackedConv2d, PackedLinear, kernel_input
from nncx.nn.packed import PackedLayer
from nncx.nn.quantizers import binary_connect_sample, binary_connect_sign


class _BinaryConnectLayer(PackedLayer):
    """What the two layers share: real weights in [-1, 1], their signs packed to one bit."""

    precision = "binary weights"
    stochastic: bool
    _codebook: Tensor  # what the bits 0 and 1 stand for, where the packed weights are

    def _init_binary_connect(self, stochastic: bool) -> None:
        self.stochastic = stochastic
        self._init_packing()

    def reset_parameters(self) -> None:
        super().reset_parameters()  # the bias, as torch's
        nn.init.uniform_(self.weight, -1, 1)

    def extra_repr(self) -> str:
        stochastic = ", stochastic=True" if self.stochastic else ""
        frozen = ", frozen=True" if self.frozen else ""
        return f"{super().extra_repr()}{stochastic}{frozen}"

    def _drop_weight(self) -> None:
        self.packed_weight = pack_weight_signs(self.weight)

    def _pack(self) -> None:
        bits = self.packed_weight if self.frozen else pack_weight_signs(self.weight)
        self._prepacked = self._prepack(bits)
        self._codebook = torch.tensor([-1.0, 1.0], device=self._prepacked.device)

    def _prepack(self, bits: Tensor) -> Tensor:
        raise NotImplementedError

    def _float_weight_and_bias(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """What torch's function takes; +1 and -1 are in every dtype."""
        if self.training and torch.is_grad_enabled() and self.weight.requires_grad:
            with torch.no_grad():
                self.weight.clamp_(-1, 1)
        sampled = self.training and self.stochastic
        weight = (binary_connect_sample if sampled else binary_connect_sign)(self.weight)
        return weight.to(dtype), None if self.bias is None else self.bias.to(dtype)

    def _kernel_bias(self) -> Tensor | None:
        return None if self.bias is None else self.bias.float()


class BinaryConnectConv2d(_BinaryConnectLayer, PackedConv2d):
    """`nn.Conv2d` with the weights +1 and -1, without a scale: a BatchNorm should follow.

    Forward: `conv2d(x, w_b) + bias`; `w_b = sign(W)` with `sign(0) = +1`, or if `stochastic`, in
    training, +1 with probability `clip((W + 1) / 2, 0, 1)`, else -1.
    Pseudo-gradient: `dC/dW = dC/dw_b`. W is clipped to [-1, 1] by each forward in training.
    Paper: Courbariaux et al., "BinaryConnect", NeurIPS 2015. There, a network trained with
    `stochastic` is tested with its real weights; evaluation here is always with `sign(W)`, which is
    what fits in one bit. (A float network of the same shape loads this state_dict for the former.)

    Input `[N, C, H, W]` or `[C, H, W]` of any floating dtype, which is the dtype of the output,
    but under autocast, where it is autocast's, as of torch's layers. (The native kernel computes
    float64 in float32.)

    A new layer's weights are Uniform(-1, 1). Their learning rate should be scaled:
    `nncx.compress.binary_connect.parameter_groups`.

    Args:
        stochastic: draw the weights of each forward in training at random.
    """

    op = "codebook_conv2d"

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
        stochastic: bool = False,
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
        self._init_binary_connect(stochastic)

    def _kernel(self, input: Tensor, padding: tuple[int, int]) -> Tensor:
        output = ops.codebook_conv2d(
            kernel_input(input),
            self._prepacked,
            self._codebook,
            1,
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            padding,
            self.dilation,
            self.groups,
            bias=self._kernel_bias(),
        )
        return output.double() if input.dtype == torch.float64 else output

    def _float(self, input: Tensor, padding: tuple[int, int]) -> Tensor:
        weight, bias = self._float_weight_and_bias(input.dtype)
        return F.conv2d(input, weight, bias, self.stride, padding, self.dilation, self.groups)

    def _prepack(self, bits: Tensor) -> Tensor:
        return ops.codebook_conv2d_prepack(
            bits, 1, self.in_channels, self.out_channels, self.kernel_size, self.groups
        )


class BinaryConnectLinear(_BinaryConnectLayer, PackedLinear):
    """`nn.Linear` with the weights +1 and -1, without a scale: a BatchNorm should follow.

    Forward: `linear(x, w_b) + bias`; w_b, pseudo-gradient, paper, dtypes: as `BinaryConnectConv2d`.

    Input `[..., in_features]`, output `[..., out_features]`.

    Args:
        stochastic: draw the weights of each forward in training at random.
    """

    op = "codebook_linear"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        stochastic: bool = False,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self._init_binary_connect(stochastic)

    def _kernel(self, rows: Tensor) -> Tensor:
        output = ops.codebook_linear(
            kernel_input(rows),
            self._prepacked,
            self._codebook,
            1,
            self.in_features,
            self.out_features,
            bias=self._kernel_bias(),
        )
        return output.double() if rows.dtype == torch.float64 else output

    def _float(self, rows: Tensor) -> Tensor:
        return F.linear(rows, *self._float_weight_and_bias(rows.dtype))

    def _prepack(self, bits: Tensor) -> Tensor:
        return ops.codebook_linear_prepack(bits, 1, self.in_features, self.out_features)
