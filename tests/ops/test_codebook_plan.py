"""Which kernel a codebook op gets on CUDA."""

from typing import Any

import pytest
from gpu_shapes import A100, H200, RTX4090, T4, Shape, rows

from nncx import _C


def plan(
    shape: Shape,
    bits: int,
    path: str = "sm90",
    gpu: tuple[int, int] = H200,
    per_output: bool = False,
) -> dict[str, Any]:
    return _C.codebook_plan(bits, per_output, *shape, path, *gpu)


@pytest.mark.parametrize(
    ("m", "bits", "per_output", "kernel"),
    [
        (1, 1, False, "sums"),
        (1, 2, False, "sums"),
        (1, 1, True, "planes"),
        (2, 1, False, "planes"),
        (16, 2, False, "planes"),
        (1, 3, False, "values"),
        (16, 8, True, "values"),
        (17, 1, False, "tiled"),
    ],
)
def test_few_rows(m: int, bits: int, per_output: bool, kernel: str) -> None:
    assert plan(rows(m, 4096, 4096), bits, per_output=per_output)["kernel"] == kernel


def test_without_tensor_cores_there_are_no_planes() -> None:
    for m, bits, kernel in ((2, 1, "sums"), (8, 1, "sums"), (9, 1, "values"), (2, 2, "values")):
        assert plan(rows(m, 4096, 4096), bits, "cuda_cores", T4)["kernel"] == kernel


@pytest.mark.parametrize(
    ("shape", "kernel"),
    [
        (Shape((2, 32, 9, 9), 32, (3, 3), groups=32), "direct"),  # depthwise
        (Shape((2, 32, 9, 9), 64, (3, 3), groups=8), "direct"),
        (Shape((2, 32, 9, 9), 72, (3, 3), groups=8), "tiled"),  # groups of 9 outputs
        (Shape((2, 3, 9, 9), 8, (3, 3)), "tiled"),
        (Shape((1, 8, 4, 4), 64, (1, 1), stride=(2, 2)), "tiled"),  # 4 rows, but not all pixels
        (Shape((1, 8, 4, 4), 64), "values"),
    ],
)
def test_convolutions(shape: Shape, kernel: str) -> None:
    assert plan(shape, 4)["kernel"] == kernel


@pytest.mark.parametrize("gpu", [T4, RTX4090, A100, H200])
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("m", [1, 3, 16])
def test_shared_memory_suffices(m: int, bits: int, gpu: tuple[int, int]) -> None:
    chosen = plan(rows(m, 4096, 4096), bits, "cuda_cores", gpu)
    assert chosen["shared_bytes"] <= gpu[1]
    assert (chosen["kernel"] == "tiled") == (bits == 8 and gpu is T4)


def test_blocks_fill_the_gpu_and_warps_have_steps() -> None:
    assert plan(rows(1, 4096, 8192), 4)["outputs"] == 2  # 128 blocks of 64 outputs
    assert plan(rows(1, 4096, 4096), 4)["outputs"] == 1
    assert plan(rows(1, 4096, 4096), 4)["warps"] == 16
    assert plan(rows(1, 65, 4096), 4)["warps"] == 3  # steps of 32 codes
