"""A linear layer whose weights share few values, found by a hash of their place.

In training the weight is written out, for torch's float kernels, and forgotten after backward: two
native passes over it in each step, and no index is kept. In evaluation `nncx.ops.hashed_linear`
hashes as it multiplies, and no more than the buckets is in memory. Both add up the same floats, in
another order: they are equal to rounding.
"""

import math
from numbers import Integral

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nncx import ops
from nncx.nn.geometry import PackedLinear, kernel_input


class HashedLinear(PackedLinear):
    """`nn.Linear` whose weights share the values of `buckets` numbers.

    Forward: `linear(x, V) + bias`; `V[o, k]` is plus or minus one of the buckets, and which one a
    hash of (`seed`, o, k) says: the formula stands in csrc/hashed_linear.h.
    Gradient: exact; that of a bucket is the sum of those of its weights, with their signs.
    Paper: Chen et al., "Compressing Neural Networks with the Hashing Trick", ICML 2015.

    The Parameter `weight` is the buckets, `[buckets]`. A new layer's are Uniform(-1 / sqrt(K), 1 /
    sqrt(K)) with K = `in_features`, so that V begins as the weight of `nn.Linear` does. Two layers
    of a network should have two seeds. The layer stores less; it multiplies as much as `nn.Linear`.

    Input `[..., in_features]` of any floating dtype, which is the dtype of the output, but under
    autocast, where it is autocast's. Output `[..., out_features]`. (The native kernel computes
    float64 in float32.)

    Args:
        compression: buckets for each weight, in (0, 1], rounded up to a whole number of buckets.
        buckets: how many, instead.
        seed: of the hash, any 64-bit integer.

    Raises:
        ValueError: for a compression, a number of buckets or a seed out of range.
    """

    op = "hashed_linear"
    precision = "hashed weights"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        compression: float = 1 / 8,
        buckets: int | None = None,
        seed: int = 0,
    ) -> None:
        # A weight as large as the virtual one is never allocated.
        super().__init__(in_features, out_features, bias, "meta", dtype)
        virtual = max(1, in_features * out_features)
        if buckets is None:
            if not 0 < compression <= 1:
                raise ValueError(f"HashedLinear: compression must be in (0, 1], got {compression}")
            buckets = math.ceil(compression * virtual)
        if not 1 <= buckets < 2**31:
            raise ValueError(f"HashedLinear: buckets must be from 1 to 2**31 - 1, got {buckets}")
        if not isinstance(seed, Integral) or not -(2**63) <= seed < 2**63:
            raise ValueError(f"HashedLinear: seed must be a 64-bit integer, got {seed}")
        self.buckets = buckets
        self.compression = buckets / virtual
        self.seed = seed
        self.weight = nn.Parameter(torch.empty(buckets, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        self.reset_parameters()
        self._init_packing()

    def reset_parameters(self) -> None:
        bound = 1 / math.sqrt(max(1, self.in_features))
        for parameter in (self.weight, self.bias):
            if parameter is not None:
                nn.init.uniform_(parameter, -bound, bound)

    def extra_repr(self) -> str:
        frozen = ", frozen=True" if self.frozen else ""
        return f"{super().extra_repr()}, buckets={self.buckets}, seed={self.seed}{frozen}"

    def virtual_weight(self) -> Tensor:
        """The weight that the layer multiplies by, `[out_features, in_features]`."""
        buckets = self.packed_weight if self.frozen else self.weight
        if buckets.dtype != torch.float64:
            buckets = buckets.float()
        return ops.hashed_weight(buckets, self.seed, self.in_features, self.out_features)

    def _drop_weight(self) -> None:
        self.packed_weight = self.weight.detach().float().clone()

    def _pack(self) -> None:
        buckets = self.packed_weight if self.frozen else self.weight
        self._prepacked = buckets.detach().float().clone()

    def _kernel(self, rows: Tensor) -> Tensor:
        output = ops.hashed_linear(
            kernel_input(rows),
            self._prepacked,
            self.seed,
            self.in_features,
            self.out_features,
            bias=None if self.bias is None else self.bias.float(),
        )
        return output.double() if rows.dtype == torch.float64 else output

    def _float(self, rows: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(rows.dtype)
        return F.linear(rows, self.virtual_weight().to(rows.dtype), bias)
