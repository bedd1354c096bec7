"""Layers of Deep Compression: the weights share a few values, which are trained."""

from numbers import Integral

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nncx.nn.codebook import CodebookConv2d, CodebookLayer, CodebookLinear


def check_width(name: str, bits: int) -> None:
    """Refuse what is no width of a code."""
    if not isinstance(bits, Integral) or isinstance(bits, bool) or not 1 <= bits <= 8:
        raise ValueError(
            f"{name}: bits must be an integer from 1 to 8, got {bits!r}; the paper takes 8 for"
            " convolutions and 5 for linear layers"
        )


class _SharedLayer(CodebookLayer):
    """What the two layers share: codes that stay, and the centroids they stand for.

    There is no float weight: `weight` is None from the beginning.

    Attributes:
        codes: uint8, in the shape of the weight. If there is a mask, 0 is the value 0, and what
            they say counts where the mask is True. A buffer until freezing.
        centroids: Parameter `[2**bits]`; one less with a mask, whose 0 is not trained. Gone when
            frozen.
    """

    codes: Tensor | None
    centroids: Tensor | None

    def _init_shared(self, bits: int, masked: bool) -> None:
        check_width(type(self).__name__, bits)
        self.bits = int(bits)
        self.register_buffer("codes", None)
        self.register_parameter("centroids", None)
        self._init_codebook(masked)
        self._share_evenly()

    def _share_evenly(self) -> None:
        """A new layer: evenly spaced values in torch's range, for each weight the nearest one."""
        weight, count = self.weight.detach(), self._most_centroids
        bound = (weight[:1].numel() or 1) ** -0.5
        step = 2 * bound / (count - 1 or 1)
        centroids = torch.arange(count, device=weight.device) * step - bound
        self.share(((weight + bound) / step).round().clamp(0, count - 1), centroids)

    @property
    def _most_centroids(self) -> int:
        return 2**self.bits - self.masked

    @torch.no_grad()
    def share(self, assignment: Tensor, centroids: Tensor) -> None:
        """Take a few values for the weights, in place of the float weight or of those so far.

        Args:
            assignment: for each weight an index into `centroids`; ignored where the mask is False.
            centroids: `[c]`, not more than the layer has; those it has beyond are 0 and unused.

        Raises:
            ValueError: for other shapes, or if the layer is frozen.
        """
        name = type(self).__name__
        if self.frozen:
            raise ValueError(f"{name}: a frozen layer must keep its values; convert anew")
        shape, most = list(self._packs()[0].shape), self._most_centroids
        if list(assignment.shape) != shape or not len(centroids) <= most:
            raise ValueError(
                f"{name}: the assignment must be {shape} and the centroids at most {most}, got"
                f" {list(assignment.shape)} and {len(centroids)}; assign each weight to a centroid"
            )
        like = self.centroids if self.weight is None else self.weight
        self.codes = assignment.to(like.device, torch.uint8) + int(self.masked)
        values = F.pad(centroids, (0, most - len(centroids))).to(like)
        self.centroids = nn.Parameter(values, requires_grad=like.requires_grad)
        self.weight = None
        self.repack()

    def _extra_arguments(self) -> str:
        return f", bits={self.bits}"

    def _packs(self) -> list[Tensor]:
        if self.codes is None:
            return super()._packs()
        return [self.codes, self.centroids, *([self.mask] if self.masked else [])]

    def _codebook_of_training(self) -> Tensor:
        """What the codes stand for, with gradients for all but the 0 of a mask."""
        return F.pad(self.centroids, (int(self.masked), 0))

    def _values(self) -> Tensor:
        # A gather of floats: its backward adds up, for each centroid, the gradients of its weights.
        codes = self._codes()
        values = self._codebook_of_training().index_select(0, codes.flatten().int())
        return values.view(codes.shape)

    def _codes(self) -> Tensor:
        return self.codes * self.mask if self.masked else self.codes

    def _levels(self) -> Tensor:
        return self._codebook_of_training().detach().float()

    def _drop_weight(self) -> None:
        super()._drop_weight()
        self.codes = self.centroids = None


class SharedConv2d(_SharedLayer, CodebookConv2d):
    """`nn.Conv2d` whose weights share a few values, which training moves.

    Forward: `conv2d(x, W) + bias` with `W_i = C[I_i]`; the codes I never change.
    Gradient: `dL/dC_k` is the sum of `dL/dW_i` over all i with `I_i = k`.
    Paper: Han et al., "Deep Compression", ICLR 2016.

    Input `[N, C, H, W]` or `[C, H, W]` of any floating dtype, which is the dtype of the output, but
    under autocast, where it is autocast's, as of torch's layers. (The native kernel computes
    float64 in float32.)

    A new layer's weights are those of a new `nn.Conv2d`, each replaced by the nearest of evenly
    spaced values. What `nncx.DeepCompression` finds in a trained one is given by `share`.

    Args:
        bits: width of a code, 1 to 8: there are `2**bits` values.
        masked: whether there is a `mask`, at first of nothing but True. One of the values is then
            0, and is not trained.

    Raises:
        ValueError: for another width.
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
        bits: int = 8,
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
        self._init_shared(bits, masked)


class SharedLinear(_SharedLayer, CodebookLinear):
    """`nn.Linear` whose weights share a few values, which training moves.

    Forward: `linear(x, W) + bias`; W, gradients, paper, dtypes, first values: as `SharedConv2d`.

    Input `[..., in_features]`, output `[..., out_features]`.

    Args:
        bits, masked: as `SharedConv2d`.

    Raises:
        ValueError: for another width.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bits: int = 5,
        masked: bool = False,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self._init_shared(bits, masked)
