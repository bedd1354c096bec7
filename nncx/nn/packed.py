"""The life of a layer that trains on float weights and is evaluated by a native kernel.

    training        latent float weight, torch's kernels, pseudo-gradients
    evaluation      the same weight, packed for the native kernel in `_prepacked`
    frozen          no float weight: `packed_weight` (dense, saved) and `_prepacked` (never saved)

The packed copy is made by everything that may change the weight from outside: `train(False)`,
`load_state_dict`, `.to()` and its kin, unpickling, `repack()`. Never by forward, which must stay
compilable: forward refuses a copy that the weight has outrun, as by an optimizer step in evaluation
mode. It sees what autograd sees, hence neither a change through `weight.data` nor, in compiled
code, any. What exists in one mode only is no buffer: `buffers()` must not depend on the mode.
"""

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from nncx.nn.native import NativeLayer


class PackedLayer(NativeLayer):
    """Mixin, to stand before the torch layer it extends, which has a `weight`.

    A subclass calls `_init_packing` at the end of its constructor and implements `_pack`, which
    fills `_prepacked` from the float weight or from `packed_weight`, and `_drop_weight`, which
    turns the float weight into `packed_weight`. Its buffers are what kernels read: `.half()` and
    its kin, which are for what the user sees, leave their dtypes.
    """

    precision: ClassVar[str]
    frozen: bool  # whether the float weight is gone
    packed_weight: Tensor | None
    _is_partial: bool = False  # whether it evaluates on torch's kernels, by intention
    _prepacked: Tensor | None
    _packed_from: list[tuple[Tensor, int | None]] | None  # `_packs()` then, with their versions

    def _init_packing(self) -> None:
        self.frozen = False
        self.register_buffer("packed_weight", None)
        self._prepacked = None
        self._packed_from = None
        self.register_load_state_dict_post_hook(_repack_after_load)

    def _pack(self) -> None:
        raise NotImplementedError

    def _drop_weight(self) -> None:
        raise NotImplementedError

    def reset_buffers(self) -> None:
        """Give what a new layer has besides weight and bias first values, where its weight is."""

    def adopt_sizes(self, state: Mapping[str, Tensor], prefix: str) -> None:
        """Give a frozen layer's buffers the sizes they have in a state dict that it is to load.

        Most have only those that follow from the constructor's arguments. What cannot be is left
        as it is: whoever loads compares.

        Args:
            state: from anywhere; the names of this layer's tensors begin with `prefix`.
        """

    def code_widths(self) -> dict[str, int]:
        """The buffers of a frozen layer that are dense codes, uint8 `[bytes]`: bits of a code.

        `nncx.save(entropy=True)` makes them smaller. By default `packed_weight` is one, if the
        layer has `bits`.
        """
        bits = getattr(self, "bits", None)
        return {} if bits is None else {"packed_weight": bits}

    def why_not_freezable(self) -> str | None:
        """What the layer lacks to run without its float weight, the end of a sentence."""
        return None

    def freeze(self) -> "PackedLayer":
        """Drop the float weight: from now on the layer always runs its native kernel.

        Raises:
            ValueError: if the layer lacks what its kernel needs.
        """
        if not self.frozen:
            if reason := self.why_not_freezable():
                raise ValueError(f"freeze: the {type(self).__name__} {reason}")
            with torch.no_grad():
                self._drop_weight()
            self.frozen = True
            self.register_parameter("weight", None)
            self.requires_grad_(False)
            self.repack()
        return self

    @torch.no_grad()
    def repack(self) -> None:
        """Rebuild what the native kernel reads; a layer in training has no use for it."""
        self._prepacked = self._packed_from = None
        packs = self._packs()
        if (self.frozen or not self.training) and self._has_kernel(packs[0].device):
            self._pack()
            self._packed_from = _with_versions(packs)

    def _packs(self) -> list[Tensor]:
        """What is packed."""
        return [self.packed_weight if self.frozen else self.weight]

    def _is_stale(self) -> bool:
        """Whether the weight is not the one that was packed; not to be asked in compiled code.

        That of a frozen layer is a buffer, which DistributedDataParallel writes anew, with the same
        bits, before every forward: packed once more, they tell.
        """
        found = _with_versions(self._packs())
        pairs = zip(found, self._packed_from, strict=True)
        if all(now is then and version == before for (now, version), (then, before) in pairs):
            return False
        if not self.frozen:
            return True
        before = self._prepacked
        with torch.no_grad():
            self._pack()
        if torch.equal(before, self._prepacked):
            self._packed_from = found
            return False
        self._prepacked = before
        return True

    def train(self, mode: bool = True) -> "PackedLayer":
        super().train(mode)
        if not self.frozen:
            self.repack()
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any
    ) -> None:
        if self.frozen:
            self.adopt_sizes(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedLayer":
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            if buffer is not None and self._buffers[name].dtype != buffer.dtype:
                self._buffers[name] = buffer.to(self._buffers[name].device)
        self.repack()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_prepacked": None, "_packed_from": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.repack()  # it may have been pickled on a machine with another kernel path

    def _runs_native(self, input: Tensor) -> bool:
        """Whether forward takes the native kernel, through which no gradient flows."""
        if not self.frozen and (self.training or self._is_partial):
            return False
        wants_gradient = self._wants_gradient(input)
        if wants_gradient and self.frozen:
            raise RuntimeError(
                f"{type(self).__name__} is frozen and no gradient flows through packed weights, got"
                " an input, a bias or a scale that requires one; run it under torch.no_grad()"
            )
        if wants_gradient:
            _warn_of_float_path(
                "was called with gradients enabled", "wrap in torch.no_grad() or nncx.freeze(model)"
            )
            return False
        if not self.frozen and self._prepacked is None and not self._has_kernel(input.device):
            _warn_of_float_path(
                f"has no native kernel on {input.device.type}",
                f"{_how_to_have_one(input.device)} for speed",
            )
            return False
        if self._prepacked is None:
            raise RuntimeError(self._why_not_packed(input.device))
        if not torch.compiler.is_compiling() and self._is_stale():
            raise RuntimeError(
                f"the weights of this {type(self).__name__} changed since they were packed; call"
                " nncx.repack(model)"
            )
        return True

    def _wants_gradient(self, input: Tensor) -> bool:
        """Whether a derivative is asked for: backward or, of which no_grad says nothing, forward.

        Packing leaves none to ask for by the weight, but scales and biases are still there.
        """
        backward, forward = torch.is_grad_enabled(), forward_ad._current_level >= 0
        if not (backward or forward):
            return False
        tensors = (input, *self.parameters(), *self.buffers())
        if backward and any(tensor.requires_grad for tensor in tensors):
            return True
        return forward and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors)

    def _has_kernel(self, device: torch.device) -> bool:
        return has_kernel(self.op, device)

    def _why_not_packed(self, device: torch.device) -> str:
        name = type(self).__name__
        if self._has_kernel(device):
            return f"{name} has no packed weights; call eval() or nncx.repack(model)"
        return (
            f"a frozen {name} needs a native {self.op} kernel, of which this build of nncx has none"
            f" for {device.type}; {_how_to_have_one(device)}"
        )


def _with_versions(tensors: list[Tensor]) -> list[tuple[Tensor, int | None]]:
    """Each with autograd's count of its in-place changes, which inference tensors lack."""
    return [(each, None if each.is_inference() else each._version) for each in tensors]


def _repack_after_load(layer: PackedLayer, incompatible_keys: Any) -> None:
    layer.repack()


def has_kernel(op: str, device: torch.device) -> bool:
    """Whether this build has a native kernel of `nncx.ops.<op>` for the device."""
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device.type)
    return key is not None and torch._C._dispatch_has_kernel_for_dispatch_key(f"nncx::{op}", key)


def _how_to_have_one(device: torch.device) -> str:
    if device.type == "cuda":
        return "build nncx with CUDA (NNCX_CUDA=1, nvcc on PATH) or move the model to the CPU"
    return "move the model to the CPU"


def _warn_of_float_path(reason: str, remedy: str) -> None:
    if not torch.compiler.is_compiling():
        _warn_once(reason, remedy)


@functools.cache
def _warn_once(reason: str, remedy: str) -> None:
    """Once per process and reason."""
    warnings.warn(
        f"an nncx layer in eval mode {reason} and runs torch's float kernels, not its own;"
        f" {remedy}",
        stacklevel=7,  # the caller of the layer
    )
