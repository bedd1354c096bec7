"""What the tests of the ops on float images share: images, and the bound of a convolution."""

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = {torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8}


def images(*shape: int, layout: str = "nchw", dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(shape).to(dtype)
    return x.to(memory_format=torch.channels_last) if layout == "nhwc" else x


def assert_right(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    shuffle: int = 1,
) -> None:
    """Against torch's own float64 convolution, within the documented bound."""
    geometry = (stride, padding, dilation, groups)
    x, w = x.double(), weight.double()
    b = None if bias is None else bias.double()
    exact = F.conv2d(x, w, b, *geometry)
    magnitude = F.conv2d(x.abs(), w.abs(), None if b is None else b.abs(), *geometry)
    bound = (weight[0].numel() + 1) * 2**-23 * magnitude
    # rounded to the output's format once more, where subnormals have no more than fixed precision
    bound = bound + EPSILON[out.dtype] * (exact.abs() + bound) + 2**-25
    exact, bound = F.channel_shuffle(exact, shuffle), F.channel_shuffle(bound, shuffle)
    assert out.dtype == weight.dtype and out.shape == exact.shape
    assert ((out.double() - exact).abs() <= bound).all()


def strided_images() -> dict[str, Tensor]:
    x = torch.randn(2, 6, 9, 8)
    return {
        "contiguous": x,
        "channels_last": x.to(memory_format=torch.channels_last),
        "sliced": torch.randn(2, 6, 9, 16)[..., ::2],
        "unaligned": torch.randn(2 * 6 * 9 * 8 + 1)[1:].view(2, 6, 9, 8),
        "unaligned, channels_last": torch.randn(865)[1:].view(2, 9, 8, 6).permute(0, 3, 1, 2),
        "transposed": x.transpose(2, 3).contiguous().transpose(2, 3),
        "channels_last, sliced": torch.randn(2, 9, 8, 12)[..., ::2].permute(0, 3, 1, 2),
        "one channel": torch.randn(2, 1, 9, 8).to(memory_format=torch.channels_last),
        "one pixel": torch.randn(2, 6, 1, 1).to(memory_format=torch.channels_last),
        "expanded": torch.randn(1, 6, 9, 8).expand(3, -1, -1, -1),
    }
