"""What the int8 benchmarks share: torch's quantized weights and engines as rivals.

torch's quantized ops take unsigned activations; on a CPU without VNNI they add products in 16 bits
that saturate, so that they are exact only for activations of 7 bits. Their weights are packed
before, as ours are. An engine is one of torch.backends.quantized.supported_engines.
"""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from rivals import Rivals
from torch import Tensor

# Of the rate of torch.mm, which is near that of FMA, 16 products a cycle: what the instructions
# allow. avx2 needs 2 vpmaddubsw and 1 vpmaddwd for 64 products, or 4 vpmaddwd for activations of
# any sign, and two start in a cycle (Zen 3, Zen 4); avx512 needs one vpdpbusd.
NON_NEGATIVE = {"avx2": 2.67, "avx512": 4}
ANY_SIGN = {"avx2": 2, "avx512": 4}

# fbgemm uses VNNI wherever it is: no rival of the same kind where oneDNN is told not to.
ENGINES = ("onednn",) if "ONEDNN_MAX_CPU_ISA" in os.environ else ("onednn", "fbgemm")

LOWEST = {"symmetric": 0, "affine": -128}  # activation, and their zero point


def weights(*shape: int) -> tuple[Tensor, Tensor]:
    """Codes of Gaussian weights, and their scale for each output channel."""
    weight = torch.randn(shape)
    scale = weight.flatten(1).abs().amax(1) / 127
    return (weight / scale.view(-1, *[1] * (len(shape) - 1))).round().to(torch.int8), scale


def quantized(codes: Tensor, scale: Tensor) -> Tensor:
    """The same weights as torch's quantized ops know them."""
    values = codes.float() * scale.view(-1, *[1] * (codes.dim() - 1))
    zero_points = torch.zeros(len(codes), dtype=torch.long)
    with _without_deprecations():
        return torch.quantize_per_channel(values, scale.double(), zero_points, 0, torch.qint8)


def quantized_input(codes: Tensor, scale: float, zero_point: int) -> Tensor:
    values = (codes.float() - zero_point) * scale
    with _without_deprecations():
        return torch.quantize_per_tensor(values, scale, zero_point + 128, torch.quint8)


def with_kinds(rivals: Rivals) -> Rivals:
    """Those of a CPU, which are float32, beside others."""
    return {name if ":" in name else f"float32:{name}": run for name, run in rivals.items()}


def by_engine(prepack: Callable[[], Callable[[], Tensor]]) -> Rivals:
    """A rival for each engine: what `prepack` gives while that engine is chosen."""
    before = torch.backends.quantized.engine
    rivals = {}
    try:
        for engine in ENGINES:
            if engine in torch.backends.quantized.supported_engines:
                torch.backends.quantized.engine = engine
                rivals[f"quantized:{engine}"] = prepack()
    finally:
        torch.backends.quantized.engine = before
    return rivals


@contextmanager
def _without_deprecations() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.quantize_per", UserWarning)
        yield
