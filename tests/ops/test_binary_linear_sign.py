import pytest
import torch

from nncx import ops
from nncx.ops.binary_linear_sign import binary_linear_sign_reference


def sign(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x >= 0, 1.0, -1.0).double()


@pytest.mark.parametrize("k", [0, 1, 63, 64, 65, 1031])
@pytest.mark.parametrize(("m", "n"), [(0, 5), (5, 0), (1, 1), (1, 640), (7, 31), (17, 97)])
def test_exact(isa: str, m: int, n: int, k: int) -> None:
    x, w = torch.randn(m, k), torch.randn(n, k)
    threshold, flip = torch.randint(-20, 21, (n,), dtype=torch.int32), torch.rand(n) > 0.5
    weight = ops.binary_linear_prepack(ops.pack_signs(w), k)
    out = ops.binary_linear_sign(ops.pack_signs(x), weight, threshold, flip, k, n)
    positive = (sign(x) @ sign(w).T >= threshold) != flip
    assert torch.equal(out, ops.pack_signs(positive.double() - 0.5))
    packed = (ops.pack_signs(x), ops.pack_signs(w))
    assert torch.equal(out, binary_linear_sign_reference(*packed, threshold, flip, k, n))
