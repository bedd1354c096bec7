"""Layers whose weights are codes into a small table of values, the codebook.

    training        the float weight, of which `_values` makes the weight that counts
    evaluation      `nncx.ops.codebook_conv2d` and `codebook_linear`, on codes of `bits` bits
    frozen          `packed_weight` (dense codes) and `codebook` (what they stand for), both saved

Training and evaluation add up the same floats, in another order: they are equal to rounding.

A family is two classes, of `CodebookConv2d` and `CodebookLinear`, that say which values a weight
may have. It calls `_init_codebook` at the end of its constructors and implements `_values`,
`_codes` and `_levels`. How fast weights move to those values is the business of `nncx.compress`.

Such a layer may have a mask, as of a pruned network: where it is False the weight is 0. Nothing
else needs to know of it, since forward computes with the weight that counts: momentum and weight
decay may move the float weight there, and nothing comes of it. In a codebook that has a zero, code
0 is the value 0.
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from nncx import ops
from nncx.nn.codes import pack_codes, packed_size
from nncx.nn.geometry import PackedConv2d, PackedLinear, kernel_input
from nncx.nn.packed import PackedLayer


class CodebookLayer(PackedLayer):
    """What convolutions and linear layers share.

    Attributes:
        bits: width of a code, 1 to 8.
        mask: bool, like the weight: False where that is 0 for good. None for no such place, and in
            a frozen layer, whose codes say it.
        codebook: float32 `[2**bits]`, or a row for each output, `[O, 2**bits]`: a buffer, at the
            latest from freezing on.
    """

    constant_codebook: ClassVar[bool] = False
    """Whether `_levels` are the same for every layer of the class, so that no file holds them."""

    bits: int
    mask: Tensor | None
    codebook: Tensor | None
    _table: Tensor | None  # the codebook of `_prepacked`, unless there is a buffer

    def _init_codebook(self, masked: bool = False) -> None:
        mask = torch.ones_like(self.weight, dtype=torch.bool) if masked else None
        self.register_buffer("mask", mask)
        self.register_buffer("codebook", None)
        self._table = None
        self._init_packing()

    def _values(self) -> Tensor:
        """The weight that counts, with its gradients, in shape and dtype of the float one."""
        raise NotImplementedError

    def _codes(self) -> Tensor:
        """The codes of the float weight, in its shape: uint8, or bool for one bit."""
        raise NotImplementedError

    def _levels(self) -> Tensor:
        """The codebook of `_codes`."""
        raise NotImplementedError

    def _extra_arguments(self) -> str:
        """Arguments of the constructor that torch's layer lacks, for `repr`."""
        return ""

    @property
    def precision(self) -> str:
        return f"{self.bits}-bit codebook"

    @property
    def masked(self) -> bool:
        """Whether there is a mask: an argument of the constructors of families with a zero."""
        return self.mask is not None

    def extra_repr(self) -> str:
        masked = ", masked=True" if self.masked else ""
        frozen = ", frozen=True" if self.frozen else ""
        return f"{super().extra_repr()}{self._extra_arguments()}{masked}{frozen}"

    def _masked_weight(self) -> Tensor:
        """The float weight, 0 without a gradient where the mask says so."""
        return self.weight if self.mask is None else torch.where(self.mask, self.weight, 0)

    def _packs(self) -> list[Tensor]:
        return super()._packs() if self.mask is None else [*super()._packs(), self.mask]

    def _drop_weight(self) -> None:
        codes = self._packed_codes()
        if not self.constant_codebook:
            self.codebook = self._levels()
        self.packed_weight = codes
        self.mask = None

    def _pack(self) -> None:
        self._prepacked = self._prepack(self.packed_weight if self.frozen else self._packed_codes())
        self._table = self._levels() if self.codebook is None else None

    def _packed_codes(self) -> Tensor:
        weight = self._packs()[0]
        if weight.is_meta:  # as in load, at once
            return weight.new_empty(packed_size(weight.numel(), self.bits), dtype=torch.uint8)
        return pack_codes(self._codes(), self.bits)

    def _prepack(self, codes: Tensor) -> Tensor:
        raise NotImplementedError

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any
    ) -> None:
        """A float layer's state leaves the mask as it is; values begin anew, from its weight."""
        tensors = self._parameters | self._buffers
        own = {name for name, tensor in tensors.items() if tensor is not None}
        values = own - {"weight", "bias", "mask"}
        given = {name for name in own if f"{prefix}{name}" in state_dict}
        is_float = not self.frozen and "weight" in given and given.isdisjoint(values)
        for name in own & {"mask"} | (values if is_float else set()):
            state_dict.setdefault(f"{prefix}{name}", tensors[name])
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        if is_float:
            self.reset_buffers()

    def _kernel_codebook(self) -> Tensor:
        return self._table if self.codebook is None else self.codebook

    def _kernel_bias(self) -> Tensor | None:
        return None if self.bias is None else self.bias.float()

    def _float_weight_and_bias(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """What torch's function takes."""
        return self._values().to(dtype), None if self.bias is None else self.bias.to(dtype)


class CodebookConv2d(CodebookLayer, PackedConv2d):
    """`nn.Conv2d` on weights of a codebook."""

    op = "codebook_conv2d"

    def _kernel(self, input: Tensor, padding: tuple[int, int]) -> Tensor:
        output = ops.codebook_conv2d(
            kernel_input(input),
            self._prepacked,
            self._kernel_codebook(),
            self.bits,
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

    def _prepack(self, codes: Tensor) -> Tensor:
        return ops.codebook_conv2d_prepack(
            codes, self.bits, self.in_channels, self.out_channels, self.kernel_size, self.groups
        )


class CodebookLinear(CodebookLayer, PackedLinear):
    """`nn.Linear` on weights of a codebook."""

    op = "codebook_linear"

    def _kernel(self, rows: Tensor) -> Tensor:
        output = ops.codebook_linear(
            kernel_input(rows),
            self._prepacked,
            self._kernel_codebook(),
            self.bits,
            self.in_features,
            self.out_features,
            bias=self._kernel_bias(),
        )
        return output.double() if rows.dtype == torch.float64 else output

    def _float(self, rows: Tensor) -> Tensor:
        return F.linear(rows, *self._float_weight_and_bias(rows.dtype))

    def _prepack(self, codes: Tensor) -> Tensor:
        return ops.codebook_linear_prepack(codes, self.bits, self.in_features, self.out_features)
