"""Layers whose weights are stored in 16 bits: half the file, float arithmetic.

On a CPU torch's float kernels, which evaluation runs, are faster than those of 16 bits.
"""

import torch
from torch import Tensor

from nncx.nn.expanded import ExpandedConv2d, ExpandedLinear
from nncx.nn.packed import PackedLayer
from nncx.nn.quantizers import half_weight

STORAGES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


class _HalfLayer(PackedLayer):
    """What the two layers share: weights that a 16-bit float holds."""

    storage: str

    def _init_half(self, storage: str) -> None:
        if storage not in STORAGES:
            raise ValueError(f"storage must be one of {', '.join(STORAGES)}, got {storage!r}")
        self.storage = storage
        self.precision = f"{storage} weights"
        self._init_packing()

    def extra_repr(self) -> str:
        frozen = ", frozen=True" if self.frozen else ""
        return f"{super().extra_repr()}, storage={self.storage}{frozen}"

    def why_not_freezable(self) -> str | None:
        if self.weight.is_meta or self._stored().isfinite().all():
            return None
        largest = self.weight.detach().abs().max().item()
        return f"must have weights that {self.storage} holds, got {largest:.3g}; keep it float"

    def _stored(self) -> Tensor:
        if self.frozen:
            return self.packed_weight
        return self.weight.detach().to(STORAGES[self.storage])

    def _drop_weight(self) -> None:
        self.packed_weight = self._stored()

    def _expanded(self) -> Tensor:
        return self._stored().float()

    def _trained(self) -> Tensor:
        return half_weight(self.weight, STORAGES[self.storage])


class HalfConv2d(_HalfLayer, ExpandedConv2d):
    """`nn.Conv2d` with weights that 16 bits hold.

    Forward: `conv2d(x, W_h) + bias`, in the dtype of x, with W_h the weight rounded to `storage`.
    Pseudo-gradient: `dC/dW = dC/dW_h`.

    Input `[N, C, H, W]` or `[C, H, W]` of any floating dtype, which is the dtype of the output, but
    under autocast, where it is autocast's, as of torch's layers.

    Args:
        storage: "float16" (11 bits of precision, up to 65,504), or "bfloat16" (8 bits, any size).

    Raises:
        ValueError: for another `storage`.
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
        storage: str = "float16",
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
        self._init_half(storage)


class HalfLinear(_HalfLayer, ExpandedLinear):
    """`nn.Linear` with weights that 16 bits hold.

    Forward: `linear(x, W_h) + bias`, in the dtype of x, with W_h the weight rounded to `storage`.
    Pseudo-gradient, dtypes: as `HalfConv2d`.

    Input `[..., in_features]`, output `[..., out_features]`.

    Args:
        storage: as `HalfConv2d`.

    Raises:
        ValueError: for another `storage`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        storage: str = "float16",
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self._init_half(storage)
