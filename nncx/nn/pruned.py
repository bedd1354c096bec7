"""Pruned layers: most weights are 0, and only the others are stored.

Which weights are left says a mask that forward applies, in training as well: whatever an optimizer
does to a pruned weight (momentum, weight decay), it counts as 0 and gets no gradient. Freezing
stores the survivors in float32 and where they stand in a few bits each (`nncx.nn.relative`).

It is the file that gets smaller. Evaluation runs torch's dense kernels, zeros and all.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nncx.nn.codes import pack_codes, packed_size, unpack_codes
from nncx.nn.expanded import ExpandedConv2d, ExpandedLinear
from nncx.nn.packed import PackedLayer
from nncx.nn.relative import (
    check_gap_bits,
    gaps_to_positions,
    mask_to_gaps,
    may_have_entries,
)


class PrunedLayer(PackedLayer):
    """What the two layers share.

    Attributes:
        weight_shape: also of a frozen layer.
        mask: bool, in the shape of the weight: False where it is pruned. To be changed in place
            (`nncx.Pruning` does). None once frozen.
        packed_weight, gaps: once frozen: the entries, float32 `[E]`, and their gaps, uint8 in the
            layout of `nncx.nn.codes`, row by row. E is not less than the survivors that are not 0.
    """

    precision = "pruned float32"
    gap_bits: int
    weight_shape: torch.Size
    mask: Tensor | None
    gaps: Tensor | None

    def _init_pruned(self, gap_bits: int) -> None:
        check_gap_bits(gap_bits)
        self.gap_bits = gap_bits
        self.weight_shape = self.weight.shape
        self.register_buffer("mask", None)
        self.register_buffer("gaps", None)
        self.reset_buffers()
        self._init_packing()

    def reset_buffers(self) -> None:
        self.mask = torch.ones_like(self.weight, dtype=torch.bool)

    def extra_repr(self) -> str:
        extras = "" if self.gap_bits == 5 else f", gap_bits={self.gap_bits}"
        extras += ", frozen=True" if self.frozen else ""
        return super().extra_repr() + extras

    @property
    def survivors(self) -> int:
        """How many weights are not pruned; once frozen, how many are not 0."""
        return int((self.packed_weight if self.frozen else self.mask).count_nonzero())

    def masked_weight(self) -> Tensor:
        """The weight that counts, dense: 0 where it is pruned; gradients flow to the survivors."""
        if self.frozen:
            return self._expanded()
        return torch.where(self.mask, self.weight, 0.0)

    def _packs(self) -> list[Tensor]:
        return [self.packed_weight, self.gaps] if self.frozen else [self.weight, self.mask]

    def _trained(self) -> Tensor:
        return self.masked_weight()

    def _expanded(self) -> Tensor:
        if not self.frozen:
            return self.masked_weight().float()
        gaps = unpack_codes(self.gaps, len(self.packed_weight), self.gap_bits)
        weight = self.packed_weight.new_zeros(self.weight_shape)
        positions = gaps_to_positions(gaps, weight.numel())
        weight.view(-1)[positions] = self.packed_weight
        return weight

    def _drop_weight(self) -> None:
        if self.weight.is_meta:  # as in load, which will know how many there are
            self._make_room(self.weight.numel())
        else:
            weight = self._expanded()
            gaps = mask_to_gaps(weight != 0, self.gap_bits)
            self.packed_weight = weight.flatten()[gaps_to_positions(gaps, weight.numel())]
            self.gaps = pack_codes(gaps, self.gap_bits)
        self.mask = None

    @torch.no_grad()
    def thaw(self) -> None:
        """Undo `freeze`: the survivors are a float weight again, with a mask around them."""
        weight = self._expanded()
        self.frozen = False
        self.weight = torch.nn.Parameter(weight)
        self.mask = weight != 0
        self.packed_weight = self.gaps = None
        self.repack()

    def _make_room(self, entries: int) -> None:
        """Buffers of a frozen layer, to be filled."""
        device = self._packs()[0].device
        size = packed_size(entries, self.gap_bits)
        self.packed_weight = torch.empty(entries, device=device)
        self.gaps = torch.empty(size, dtype=torch.uint8, device=device)

    def code_widths(self) -> dict[str, int]:
        return {"gaps": self.gap_bits}

    def adopt_sizes(self, state: Mapping[str, Tensor], prefix: str) -> None:
        values = state.get(f"{prefix}packed_weight")
        if values is None or values.dim() != 1:
            return
        entries, count = len(values), self.weight_shape.numel()
        possible = may_have_entries(count, entries, self.gap_bits)
        if possible and entries != len(self.packed_weight):
            self._make_room(entries)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any
    ) -> None:
        """A float layer's state leaves the mask as it is."""
        if not self.frozen:
            state_dict.setdefault(f"{prefix}mask", self.mask)
        super()._load_from_state_dict(state_dict, prefix, *arguments)


class PrunedConv2d(PrunedLayer, ExpandedConv2d):
    """`nn.Conv2d` of whose weights some are 0 and stay so.

    Forward: `conv2d(x, W_m) + bias` in the dtype of x; `W_m = W` where `mask` is True, else 0.
    Gradient: `dC/dW = dC/dW_m` where `mask` is True, else 0.
    Paper: Han et al., "Learning both Weights and Connections for Efficient Neural Networks",
    NeurIPS 2015.

    A new layer's mask is True everywhere; `nncx.Pruning` chooses what to prune.

    Input `[N, C, H, W]` or `[C, H, W]` of any floating dtype, which is the dtype of the output, but
    under autocast, where it is autocast's, as of torch's layers.

    Args:
        gap_bits: width in which a frozen layer stores the gap between two survivors, 1 to 8. Where
            one is longer, a 0 is stored as if it were a survivor. 5 suits about 90 % of zeros.

    Raises:
        ValueError: for another `gap_bits`.
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
        gap_bits: int = 5,
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
        self._init_pruned(gap_bits)


class PrunedLinear(PrunedLayer, ExpandedLinear):
    """`nn.Linear` of whose weights some are 0 and stay so.

    Forward: `linear(x, W_m) + bias` in the dtype of x, with W_m as of `PrunedConv2d`.
    Gradient, paper, mask, dtypes: as `PrunedConv2d`.

    Input `[..., in_features]`, output `[..., out_features]`.

    Args:
        gap_bits: as `PrunedConv2d`.

    Raises:
        ValueError: for another `gap_bits`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        gap_bits: int = 5,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self._init_pruned(gap_bits)
