"""The convolutions on PyTorch's own samples, those by which it tests its conv2d."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import places
import pytest
import torch
from float_images import assert_right
from torch import Tensor

from nncx import ops

pytest.importorskip("expecttest", reason="torch.testing._internal needs expecttest")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
Sample = tuple[Tensor, Tensor, Tensor | None, dict[str, Any]]

# In a process of its own: torch.testing._internal changes torch's global flags.
WRITE_SAMPLES = """
import sys, torch
from torch.testing._internal.common_methods_invocations import op_db
conv2d = next(op for op in op_db if op.name == "nn.functional.conv2d")
dtypes = torch.float32, torch.float16, torch.bfloat16
found = {
    str(dtype): [(s.input, *s.args, s.kwargs) for s in conv2d.sample_inputs("cpu", dtype)]
    for dtype in dtypes
}
torch.save(found, sys.argv[1])
"""


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Sample]]:
    """By dtype: images, weight, bias, geometry; without padding by words and single images, which
    layers take."""
    file: Path = tmp_path_factory.mktemp("torch") / "samples.pt"
    subprocess.run([sys.executable, "-c", WRITE_SAMPLES, file], check=True)
    found = {
        dtype: [
            sample
            for sample in of_dtype
            if sample[0].dim() == 4 and not isinstance(sample[-1].get("padding"), str)
        ]
        for dtype, of_dtype in torch.load(file, weights_only=True).items()
    }
    assert all(len(found[str(dtype)]) > 4 for dtype in DTYPES)
    return found


@pytest.fixture(params=places.CPU_PATHS)
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    with places.at(request.param) as path:
        yield path


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_grouped_conv2d(path: str, dtype: torch.dtype, samples: dict[str, list[Sample]]) -> None:
    for x, weight, bias, geometry in samples[str(dtype)]:
        assert_right(ops.grouped_conv2d(x, weight, bias, **geometry), x, weight, bias, **geometry)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_depthwise_conv2d(path: str, dtype: torch.dtype, samples: dict[str, list[Sample]]) -> None:
    """Their images and windows, with a window of its own for each channel."""
    for x, weight, _, geometry in samples[str(dtype)]:
        filters = torch.randn(x.shape[1], 1, *weight.shape[2:]).to(dtype)
        window = {name: value for name, value in geometry.items() if name != "groups"}
        out = ops.depthwise_conv2d(x, filters, None, **window)
        assert_right(out, x, filters, None, groups=x.shape[1], **window)
