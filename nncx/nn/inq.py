"""Layers of Incremental Network Quantization: powers of two, a share of the weights at a time."""

import torch
import torch.nn.functional as F
from torch import Tensor

from nncx.nn.codebook import CodebookConv2d, CodebookLayer, CodebookLinear
from nncx.nn.quantizers import inq_codebook, inq_codes

FREE = 255
"""The code of a weight that is a float still; that of a quantised one is at most 128."""


def check_bits(name: str, bits: int) -> None:
    """Refuse a width for which there is no codebook."""
    if not isinstance(bits, int) or not 2 <= bits <= 8:
        raise ValueError(f"{name}: bits must be 2 to 8, got {bits!r}; the paper takes 5")


class _INQLayer(CodebookLayer):
    """What the two layers share: weights that are quantised for good, and others that train on.

    Attributes:
        codes: uint8, like the weight: of quantised weights their codes, of all others `FREE`. A
            buffer until freezing.
        codebook: float32 `[2**bits]`, of the weight as it was when its first part was quantised,
            zeros before: always a buffer.
    """

    bits: int
    codes: Tensor | None

    def _init_inq(self, bits: int, masked: bool) -> None:
        check_bits(type(self).__name__, bits)
        self.bits = bits
        self._init_codebook(masked)
        self.register_buffer("codes", None)
        self.reset_buffers()

    def reset_buffers(self) -> None:
        """No weight is quantised, but for those that a mask makes 0."""
        self.codebook = self.weight.new_zeros(2**self.bits, dtype=torch.float32)
        codes = torch.full_like(self.weight, FREE, dtype=torch.uint8)
        self.codes = codes if self.mask is None else codes * self.mask

    @torch.no_grad()
    def quantize_largest(self, fraction: float) -> int:
        """Quantise the largest of the free weights, until `fraction` of all weights are quantised.

        Those that were stay as they are. A weight that a mask makes 0 does not count.

        Returns:
            How many weights were quantised.
        """
        free, quantized = self.codes == FREE, self.quantized
        count = int(fraction * self.weights + 0.5) - quantized
        if count <= 0:
            return 0
        if not quantized:
            self.codebook.copy_(inq_codebook(self._masked_weight(), self.bits))
        magnitudes = torch.where(free, self.weight.abs(), -1).flatten()
        chosen = magnitudes.argsort(descending=True, stable=True)[:count]
        found = inq_codes(self.weight, self.codebook).flatten()[chosen]
        codes = self.codes.flatten().index_copy(0, chosen, found)
        self.codes.copy_(codes.view_as(self.codes))
        self.repack()
        return count

    @property
    def weights(self) -> int:
        """How many weights there are, without those that a mask makes 0."""
        return self.weight.numel() if self.mask is None else int(self.mask.sum())

    @property
    def quantized(self) -> int:
        """How many of them are quantised."""
        return self.weights - int((self.codes == FREE).sum())

    def why_not_freezable(self) -> str | None:
        if self.codes.is_meta or self.quantized == self.weights:
            return None
        return (
            f"must have all its weights quantised, got {self.quantized} of {self.weights}; run the"
            " steps of nncx.INQ to the end"
        )

    def _extra_arguments(self) -> str:
        return f", bits={self.bits}"

    def repack(self) -> None:
        if not self.frozen:  # free weights are in no codebook, which is what the kernel reads
            self._is_partial = not self.codes.is_meta and bool((self.codes == FREE).any())
        super().repack()

    def _packs(self) -> list[Tensor]:
        return super()._packs() if self.frozen else [self.codes, self.codebook]

    def _pack(self) -> None:
        if not self._is_partial:
            super()._pack()

    def _values(self) -> Tensor:
        values = F.pad(self.codebook, (0, 256 - len(self.codebook)))[self.codes.int()]
        return torch.where(self.codes == FREE, self.weight, values.to(self.weight.dtype))

    def _codes(self) -> Tensor:
        return self.codes

    def _levels(self) -> Tensor:
        return self.codebook

    def _drop_weight(self) -> None:
        super()._drop_weight()
        self.codes = None


class INQConv2d(_INQLayer, CodebookConv2d):
    """`nn.Conv2d` whose weights become 0 and powers of two, a share of them at a time.

    Forward: `conv2d(x, w) + bias`; of the weights that are quantised w is that value of the
    codebook `{0, +-2**n2 ... +-2**n1}`, of all others it is W. `n1 = floor(log2(4/3 * max |W|))` of
    the weight as it is when its first part is quantised, `n2 = n1 + 1 - 2**(bits - 2)`.
    Gradient: `dC/dW = dC/dw` where a weight is not quantised, else 0. Those that are cannot move:
    forward reads their codes, whatever an optimizer does to W.
    Paper: Zhou et al., "Incremental Network Quantization", ICLR 2017.

    A new layer has no quantised weight, nor has one that loads the state dict of a float layer;
    `quantize_largest` makes some, as `nncx.INQ.steps` does for a network. Until all are, evaluation
    runs torch's float kernels, and freezing refuses.

    Input `[N, C, H, W]` or `[C, H, W]` of any floating dtype, which is the dtype of the output, but
    under autocast, where it is autocast's, as of torch's layers. (The native kernel computes
    float64 in float32.)

    Args:
        bits: width of a code, 2 to 8, for 3, 5, 9, 17, 33, 65 or 129 values.
        masked: whether there is a `mask`, at first of nothing but True.

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
        bits: int = 5,
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
        self._init_inq(bits, masked)


class INQLinear(_INQLayer, CodebookLinear):
    """`nn.Linear` whose weights become 0 and powers of two, a share of them at a time.

    Forward: `linear(x, w) + bias`; w, gradient, paper, dtypes, evaluation: as `INQConv2d`.

    Input `[..., in_features]`, output `[..., out_features]`.

    Args:
        bits, masked: as `INQConv2d`.

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
        self._init_inq(bits, masked)
