"""The families of layers, and inputs for them: what tests of one and of all families share."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nncx.nn import (
    BinaryConnectConv2d,
    BinaryConnectLinear,
    HalfConv2d,
    HalfLinear,
    INQConv2d,
    INQLinear,
    Int8Conv2d,
    Int8Linear,
    PrunedConv2d,
    PrunedLinear,
    SharedConv2d,
    SharedLinear,
    TTQConv2d,
    TTQLinear,
    XNORConv2d,
    XNORLinear,
)

# Arguments of a convolution from 6 to 9 channels, kernel 3x3 unless stated.
GEOMETRIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "stride": {"stride": 2, "padding": 1},
    "mixed": {"kernel_size": (3, 2), "stride": (1, 2), "padding": (2, 1), "dilation": (2, 1)},
    "groups": {"groups": 3, "padding": 1},
    "pointwise": {"kernel_size": 1, "bias": False},
    "same": {"padding": "same"},
    "same, even kernel": {"kernel_size": (4, 3), "padding": "same", "dilation": (1, 2)},
    "valid": {"padding": "valid"},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "replicate": {"padding": (1, 2), "padding_mode": "replicate"},
    "circular, same": {"kernel_size": 2, "padding": "same", "padding_mode": "circular"},
}


@dataclass(frozen=True)
class Family:
    """The two layers of a method, built with `arguments`, which `repr` shows as `shown`.

    Those that must know the range of their input get `input_range` and do not follow it, so that
    training and evaluation compute the same. A mask gets some False, that of a pruned layer six in
    seven; weights that are quantised in steps are all quantised.
    """

    conv_class: type[nn.Conv2d]
    linear_class: type[nn.Linear]
    arguments: dict[str, Any]
    shown: str
    frozen_buffers: set[str]
    sums_integers: bool
    native: bool = True  # whether it needs a kernel of nncx
    parameters: frozenset[str] = frozenset()  # besides weight and bias
    buffers: frozenset[str] = frozenset()  # before freezing
    stored: str = "weight"  # where the weight is before freezing: a Parameter or a buffer
    held: bool = False  # whether no optimizer can move the weight that counts
    input_range: tuple[float, float] | None = None

    def conv(self, in_channels: int = 6, out_channels: int = 9, **arguments: Any) -> nn.Conv2d:
        torch.manual_seed(0)
        arguments = {"kernel_size": 3} | self.arguments | arguments
        return self.ready(self.conv_class(in_channels, out_channels, **arguments))

    def linear(self, in_features: int, out_features: int, **arguments: Any) -> nn.Linear:
        torch.manual_seed(0)
        arguments = self.arguments | arguments
        return self.ready(self.linear_class(in_features, out_features, **arguments))

    def ready(self, layer: nn.Module) -> nn.Module:
        if self.input_range is not None:
            layer.set_input_range(*self.input_range)
            layer.observe = False
        if isinstance(layer, PrunedConv2d | PrunedLinear):
            layer.mask.copy_(torch.rand_like(layer.weight) < 1 / 7)
        elif "mask" in self.buffers:
            layer.mask.flatten()[::3] = False
            layer.reset_buffers()
        if self.held and not layer.weight.is_meta:
            layer.quantize_largest(1)
        return layer

    def network(self) -> nn.Sequential:
        """For images [N, 6, 9, 8]."""
        conv = self.conv(kernel_size=2, padding="same")
        return nn.Sequential(conv, nn.Flatten(1), self.linear(9 * 72, 3))

    def assert_equal(self, trained: Tensor, evaluated: Tensor) -> None:
        """In bits where both paths add up integers, else to rounding."""
        tolerance = {"rtol": 0, "atol": 0} if self.sums_integers else {}
        torch.testing.assert_close(trained, evaluated, **tolerance)


FAMILIES = {
    "XNOR": Family(
        XNORConv2d, XNORLinear, {}, ", scale=alpha", {"packed_weight", "alpha"}, sums_integers=True
    ),
    "XNOR with K": Family(
        XNORConv2d,
        XNORLinear,
        {"scale": "alpha_k"},
        ", scale=alpha_k",
        {"packed_weight", "alpha"},
        sums_integers=True,
    ),
    "BinaryConnect": Family(
        BinaryConnectConv2d, BinaryConnectLinear, {}, "", {"packed_weight"}, sums_integers=False
    ),
}

FAMILIES["TTQ"] = Family(
    TTQConv2d,
    TTQLinear,
    {},
    ", threshold=0.05",
    {"packed_weight", "codebook"},
    sums_integers=False,
    parameters=frozenset({"positive", "negative"}),
)
FAMILIES["TTQ with a mask"] = Family(
    TTQConv2d,
    TTQLinear,
    {"threshold": 0.3, "masked": True},
    ", threshold=0.3, masked=True",
    {"packed_weight", "codebook"},
    sums_integers=False,
    parameters=frozenset({"positive", "negative"}),
    buffers=frozenset({"mask"}),
)
FAMILIES["INQ"] = Family(
    INQConv2d,
    INQLinear,
    {},
    ", bits=5",
    {"packed_weight", "codebook"},
    sums_integers=False,
    buffers=frozenset({"codes", "codebook"}),
    held=True,
)

FAMILIES["shared"] = Family(
    SharedConv2d,
    SharedLinear,
    {"bits": 4},
    ", bits=4",
    {"packed_weight", "codebook"},
    sums_integers=False,
    parameters=frozenset({"centroids"}),
    buffers=frozenset({"codes"}),
    stored="codes",
)
FAMILIES["shared with a mask"] = Family(
    SharedConv2d,
    SharedLinear,
    {"bits": 3, "masked": True},
    ", bits=3, masked=True",
    {"packed_weight", "codebook"},
    sums_integers=False,
    parameters=frozenset({"centroids"}),
    buffers=frozenset({"codes", "mask"}),
    stored="codes",
)

FAMILIES |= {
    f"half, {storage}": Family(
        HalfConv2d,
        HalfLinear,
        {"storage": storage},
        f", storage={storage}",
        {"packed_weight"},
        sums_integers=False,
        native=False,
    )
    for storage in ("float16", "bfloat16")
}
_INT8 = {
    "frozen_buffers": {"packed_weight", "weight_scale", "input_scale", "input_zero_point"},
    "sums_integers": True,
    "buffers": frozenset({"input_range"}),
    "input_range": (-2.5, 4.0),
}
FAMILIES["int8"] = Family(Int8Conv2d, Int8Linear, {}, "", **_INT8)
FAMILIES["int8, a scale a layer, symmetric"] = Family(
    Int8Conv2d,
    Int8Linear,
    {"per_channel": False, "symmetric": True},
    ", per_channel=False, symmetric=True",
    **_INT8,
)
FAMILIES["pruned"] = Family(
    PrunedConv2d,
    PrunedLinear,
    {},
    "",
    {"packed_weight", "gaps"},
    sums_integers=False,
    native=False,
    buffers=frozenset({"mask"}),
)


def images(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*shape or (2, 6, 9, 8), generator=generator).to(dtype)


def signs(x: Tensor) -> Tensor:
    return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)


def expected_output(layer: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """torch's layer with the weight given, in float64."""
    plain = nn.Conv2d if isinstance(layer, nn.Conv2d) else nn.Linear
    twin = copy.deepcopy(layer).train().double()
    twin.weight.data = weight.detach().double()
    return plain.forward(twin, x.double()).detach()


def evaluate(layer: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return layer.eval()(x)
