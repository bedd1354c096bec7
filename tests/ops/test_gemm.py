"""Products that keep the CUDA kernels busy: more tiles than multiprocessors (an emulated GPU has
four), and k that goes round a kernel's ring of stages several times; every way to load A.
"""

import pytest
import torch
import torch.nn.functional as F
from int8_operands import codes, zero_point

from nncx import ops


def signs(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x >= 0, 1.0, -1.0)


@pytest.mark.parametrize(("m", "n", "k"), [(300, 600, 9000), (530, 129, 5000), (40, 300, 20000)])
def test_binary_matrices(emulated: str, m: int, n: int, k: int) -> None:
    x, w = torch.randn(m, k), torch.randn(n, k)
    weight = ops.binary_linear_prepack(ops.pack_signs(w), k)
    out = ops.binary_linear(ops.pack_signs(x), weight, k, n)
    assert torch.equal(out, signs(x) @ signs(w).T)


@pytest.mark.parametrize(("m", "n", "k"), [(300, 600, 1200), (530, 129, 700), (40, 300, 2500)])
def test_int8_matrices(emulated: str, m: int, n: int, k: int) -> None:
    x, w = codes(m, k), codes(n, k)
    out = ops.int8_linear(x, ops.int8_linear_prepack(w), k, n, input_zero_point=zero_point(-7))
    assert torch.equal(out.double(), (x.double() + 7) @ w.double().T)


GEOMETRIES = [
    {"kernel": (3, 3), "padding": 1},
    {"kernel": (2, 5), "padding": (0, 2), "stride": (2, 1), "dilation": (3, 1)},
    {"kernel": (3, 3), "padding": 1, "groups": 2},
]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=["3x3", "2x5", "groups"])
@pytest.mark.parametrize("channels", [64, 256, 1024])  # of a group
def test_binary_images(emulated: str, channels: int, geometry: dict) -> None:
    kernel, groups = geometry["kernel"], geometry.get("groups", 1)
    geometry = {name: value for name, value in geometry.items() if name != "kernel"}
    x, w = torch.randn(2, channels * groups, 10, 14), torch.randn(150 * groups, channels, *kernel)
    prepacked = ops.binary_conv2d_prepack(ops.pack_signs(w), channels * groups, groups)
    shape = (channels * groups, 150 * groups, kernel)
    out = ops.binary_conv2d(ops.pack_signs(x, groups), prepacked, *shape, **geometry)
    assert torch.equal(out, F.conv2d(signs(x), signs(w), **geometry))


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=["3x3", "2x5", "groups"])
@pytest.mark.parametrize("channels", [12, 32, 80])  # of a group
def test_int8_images(emulated: str, channels: int, geometry: dict) -> None:
    kernel, groups = geometry["kernel"], geometry.get("groups", 1)
    geometry = {name: value for name, value in geometry.items() if name != "kernel"}
    x, w = codes(2, channels * groups, 10, 14), codes(150 * groups, channels, *kernel)
    shape = (channels * groups, 150 * groups, kernel)
    z = zero_point(3)
    prepacked = ops.int8_conv2d_prepack(w, groups)
    out = ops.int8_conv2d(x, prepacked, *shape, **geometry, input_zero_point=z)
    assert torch.equal(out.double(), F.conv2d(x.double() - 3, w.double(), **geometry))
