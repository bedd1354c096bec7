"""torch's products as rivals: float32 on a CPU; float16, bfloat16, TF32 and int8 on a GPU.

TF32 is what float32 products are while benchmarks run on a GPU (gpu.py). Convolutions run there in
channels_last, in which cuDNN is fastest.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

GPU_FORMATS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "TF32": torch.float32}

Rivals = dict[str, Callable[[], Tensor]]


def linear(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Rivals:
    """`F.linear`, in the formats of the device."""
    return gpu_linear(x, w, bias) if x.is_cuda else {"F.linear": partial(F.linear, x, w, bias)}


def gpu_linear(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Rivals:
    return {
        f"{name}:F.linear": partial(F.linear, *_cast((x, w, bias), dtype))
        for name, dtype in GPU_FORMATS.items()
    }


def conv2d(
    x: Tensor, w: Tensor, bias: Tensor | None, stride: int, padding: int, groups: int = 1
) -> Rivals:
    """`F.conv2d`, in the formats of the device."""
    geometry = stride, padding, 1, groups
    if x.is_cuda:
        return gpu_conv2d(x, w, bias, *geometry)
    x_nhwc, w_nhwc = (t.to(memory_format=torch.channels_last) for t in (x, w))
    return {
        "nchw": partial(F.conv2d, x.contiguous(), w, bias, *geometry),
        "nhwc": partial(F.conv2d, x_nhwc, w_nhwc, bias, *geometry),
    }


def gpu_conv2d(x: Tensor, w: Tensor, bias: Tensor | None, *geometry: int) -> Rivals:
    x_nhwc, w_nhwc = (t.to(memory_format=torch.channels_last) for t in (x, w))
    return {
        f"{name}:F.conv2d": partial(F.conv2d, *_cast((x_nhwc, w_nhwc, bias), dtype), *geometry)
        for name, dtype in GPU_FORMATS.items()
    }


def int_mm(x: Tensor, codes: Tensor) -> Rivals:
    """`torch._int_mm`, which gives the sums of int8 products as int32, without an epilogue.

    On a GPU it wants more than 16 rows and multiples of 8: where they are not, it runs on padded
    tensors, and padding them is not timed.
    """
    return gpu_int_mm(x, codes) if x.is_cuda else {"_int_mm:_int_mm": _int_mm(x, codes)}


def gpu_int_mm(x: Tensor, codes: Tensor) -> Rivals:
    (m, k), o = x.shape, len(codes)
    padded = F.pad(x, (0, -k % 8, 0, max(0, 17 - m))), F.pad(codes, (0, -k % 8, 0, -o % 8))
    name = "_int_mm" if padded[0].shape == x.shape and padded[1].shape == codes.shape else "padded"
    return {f"_int_mm:{name}": _int_mm(*padded)}


def _int_mm(x: Tensor, codes: Tensor) -> Callable[[], Tensor]:
    return partial(torch._int_mm, x, codes.T)


def _cast(tensors: tuple[Tensor | None, ...], dtype: torch.dtype) -> list[Tensor | None]:
    return [None if tensor is None else tensor.to(dtype) for tensor in tensors]
