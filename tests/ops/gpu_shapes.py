"""Shapes and GPUs that the shape rules of the CUDA ops are asked about."""

from typing import Any, NamedTuple

from nncx import _C

# multiprocessors, and shared memory of a block
EMULATED_GPUS = {"cuda_cores": (4, 64 << 10), "sm80": (4, 163 << 10), "sm90": (4, 227 << 10)}
T4, RTX4090, A100, H200 = (40, 64 << 10), (128, 99 << 10), (108, 163 << 10), (132, 227 << 10)


class Shape(NamedTuple):
    """Of a convolution; one of rows has no height and width."""

    input: tuple[int, int, int, int]
    out_channels: int
    kernel_size: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def plan(self, op: str, path: str, gpu: tuple[int, int], address: int = 0) -> dict[str, Any]:
        return _C.gemm_plan(op, *self, path, *gpu, address)


def rows(m: int, k: int, n: int) -> Shape:
    return Shape((m, k, 1, 1), n)
