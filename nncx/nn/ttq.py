"""Layers of Trained Ternary Quantization: three values a weight, two of them learned."""

from numbers import Real

import torch
from torch import Tensor, nn

from nncx.nn.codebook import CodebookConv2d, CodebookLayer, CodebookLinear
from nncx.nn.quantizers import ternary, ternary_regions


def check_threshold(name: str, threshold: float) -> None:
    """Refuse what is no fraction of the largest weight."""
    if not isinstance(threshold, Real) or not 0 <= threshold < 1:
        raise ValueError(
            f"{name}: threshold must be at least 0 and less than 1, got {threshold!r}; the paper"
            " takes 0.05"
        )


class _TTQLayer(CodebookLayer):
    """What the two layers share: float weights in three regions, and a value for each.

    Attributes:
        positive, negative: Parameters `[]`: Wp, the value of weights above the threshold, and Wn;
            that of those below it is -Wn. Gone when frozen.
    """

    bits = 2
    threshold: float
    positive: Tensor | None
    negative: Tensor | None

    def _init_ttq(self, threshold: float, masked: bool) -> None:
        check_threshold(type(self).__name__, threshold)
        self.threshold = threshold
        for name in ("positive", "negative"):
            self.register_parameter(name, nn.Parameter(self.weight.new_empty(())))
        self._init_codebook(masked)
        self.reset_buffers()

    def reset_buffers(self) -> None:
        """The learned values become the mean magnitudes of the weights that they stand for."""
        for name, value in zip(("positive", "negative"), self._mean_magnitudes(), strict=True):
            if getattr(self, name).device != value.device:
                setattr(self, name, nn.Parameter(value, self.weight.requires_grad))
            else:  # the Parameter stays, since an optimizer may hold it
                with torch.no_grad():
                    getattr(self, name).copy_(value)

    def _mean_magnitudes(self) -> tuple[Tensor, Tensor]:
        """Of either region; of both for one that is empty, 0 if both are."""
        weight = self._masked_weight().detach()
        above, below = ternary_regions(weight, self.threshold)
        magnitudes = weight.abs().float()

        def mean(region: Tensor, otherwise: Tensor) -> Tensor:
            count = region.sum()
            return torch.where(count > 0, (magnitudes * region).sum() / count, otherwise)

        both = mean(above | below, magnitudes.new_zeros(()))
        return mean(above, both).to(weight.dtype), mean(below, both).to(weight.dtype)

    def why_not_freezable(self) -> str | None:
        learned = (self.weight, self.positive, self.negative)
        if self.weight.is_meta or all(tensor.isfinite().all() for tensor in learned):
            return None
        return "must have a finite weight, got NaN or infinity; train it anew"

    def _extra_arguments(self) -> str:
        return f", threshold={self.threshold}"

    def _packs(self) -> list[Tensor]:
        learned = [] if self.frozen else [self.positive, self.negative]
        return [*super()._packs(), *learned]

    def _values(self) -> Tensor:
        return ternary(self._masked_weight(), self.positive, self.negative, self.threshold)

    def _codes(self) -> Tensor:
        above, below = ternary_regions(self._masked_weight(), self.threshold)
        return above.to(torch.uint8) + 2 * below.to(torch.uint8)

    def _levels(self) -> Tensor:
        zero = torch.zeros_like(self.positive)
        return torch.stack([zero, self.positive, -self.negative, zero]).float()

    def _drop_weight(self) -> None:
        super()._drop_weight()
        self.positive = self.negative = None


class TTQConv2d(_TTQLayer, CodebookConv2d):
    """`nn.Conv2d` with weights of three values, of which training learns two.

    Forward: `conv2d(x, w_t) + bias`; `w_t = Wp` where `W > D`, `-Wn` where `W < -D`, else 0, with
    `D = threshold * max |W|`.
    Gradient: `dC/dWp` is the sum of `dC/dw_t` over the weights above D, `dC/dWn` minus the sum over
    those below -D. Pseudo-gradient: `dC/dW = dC/dw_t` times Wp, 1 and Wn: above D, between, below.
    D counts as a constant.
    Paper: Zhu et al., "Trained Ternary Quantization", ICLR 2017.

    Input `[N, C, H, W]` or `[C, H, W]` of any floating dtype, which is the dtype of the output, but
    under autocast, where it is autocast's, as of torch's layers. (The native kernel computes
    float64 in float32.)

    Wp and Wn, the Parameters `positive` and `negative`, begin as the mean magnitudes of the weights
    that they stand for, and do so again when the state dict of a float layer is loaded.

    Args:
        threshold: of the largest magnitude, what a weight must exceed not to become 0.
        masked: whether there is a `mask`, at first of nothing but True.

    Raises:
        ValueError: for a threshold that is not in [0, 1).
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
        threshold: float = 0.05,
        masked: bool = False,
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
        self._init_ttq(threshold, masked)


class TTQLinear(_TTQLayer, CodebookLinear):
    """`nn.Linear` with weights of three values, of which training learns two.

    Forward: `linear(x, w_t) + bias`; w_t, gradients, paper, dtypes, first values: as `TTQConv2d`.

    Input `[..., in_features]`, output `[..., out_features]`.

    Args:
        threshold, masked: as `TTQConv2d`.

    Raises:
        ValueError: for a threshold that is not in [0, 1).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        threshold: float = 0.05,
        masked: bool = False,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self._init_ttq(threshold, masked)
