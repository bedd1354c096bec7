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
from torch import Tensor, nn

from nncx.nn.codebook import CodebookConv2d, CodebookLayer, CodebookLinear
from nncx.nn.quantizers import binary_connect_sample, binary_connect_sign


class _BinaryConnectLayer(CodebookLayer):
    """What the two layers share: real weights in [-1, 1], of which the signs count."""

    bits = 1
    constant_codebook = True
    precision = "binary weights"
    bits = 1
    stochastic: bool

    def _init_binary_connect(self, stochastic: bool) -> None:
        self.stochastic = stochastic
        self._init_codebook()

    def reset_parameters(self) -> None:
        super().reset_parameters()  # the bias, as torch's
        nn.init.uniform_(self.weight, -1, 1)

    def _extra_arguments(self) -> str:
        return ", stochastic=True" if self.stochastic else ""

    def _values(self) -> Tensor:
        if self.training and torch.is_grad_enabled() and self.weight.requires_grad:
            with torch.no_grad():
                self.weight.clamp_(-1, 1)
        sampled = self.training and self.stochastic
        return (binary_connect_sample if sampled else binary_connect_sign)(self.weight)

    def _codes(self) -> Tensor:
        return self.weight >= 0

    def _levels(self) -> Tensor:
        return torch.tensor([-1.0, 1.0], device=self._prepacked.device)


class BinaryConnectConv2d(_BinaryConnectLayer, CodebookConv2d):
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


class BinaryConnectLinear(_BinaryConnectLayer, CodebookLinear):
    """`nn.Linear` with the weights +1 and -1, without a scale: a BatchNorm should follow.

    Forward: `linear(x, w_b) + bias`; w_b, pseudo-gradient, paper, dtypes: as `BinaryConnectConv2d`.

    Input `[..., in_features]`, output `[..., out_features]`.

    Args:
        stochastic: draw the weights of each forward in training at random.
    """

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
