"""The convolutions on PyTorch's own samples, those by which it tests its conv2d."""

from collections.abc import Iterator
from typing import Any

import places
import pytest
import torch
from float_images import assert_right
from torch import Tensor

from nncx import ops

pytest.importorskip("expecttest", reason="torch.testing._internal needs expecttest")
from torch.testing._internal.common_methods_invocations import op_db  # noqa: E402

CONV2D = next(op for op in op_db if op.name == "nn.functional.conv2d")

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


@pytest.fixture(params=places.CPU_PATHS)
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    with places.at(request.param) as path:
        yield path


def samples(dtype: torch.dtype) -> list[tuple[Tensor, Tensor, Tensor | None, dict[str, Any]]]:
    """Images, weight, bias, geometry; but padding by words and single images, which layers take."""
    found = [
        (sample.input, *sample.args, sample.kwargs)
        for sample in CONV2D.sample_inputs("cpu", dtype)
        if sample.input.dim() == 4 and not isinstance(sample.kwargs.get("padding"), str)
    ]
    assert len(found) > 4
    return found


@dtypes
def test_grouped_conv2d(path: str, dtype: torch.dtype) -> None:
    for x, weight, bias, geometry in samples(dtype):
        assert_right(ops.grouped_conv2d(x, weight, bias, **geometry), x, weight, bias, **geometry)


@dtypes
def test_depthwise_conv2d(path: str, dtype: torch.dtype) -> None:
    """Their images and windows, with a window of its own for each channel."""
    for x, weight, _, geometry in samples(dtype):
        filters = torch.randn(x.shape[1], 1, *weight.shape[2:]).to(dtype)
        window = {name: value for name, value in geometry.items() if name != "groups"}
        out = ops.depthwise_conv2d(x, filters, None, **window)
        assert_right(out, x, filters, None, groups=x.shape[1], **window)
