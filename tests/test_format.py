"""Files of released format versions stay readable, and mean what they meant."""

import json
from pathlib import Path

import pytest
import torch

import nncx

FILES = sorted((Path(__file__).parent / "files").glob("model-format-*.safetensors"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_released_file_loads_and_computes_the_same(isa: str, path: Path) -> None:
    model = nncx.load(path)
    logits = model(torch.linspace(-1, 1, 128).reshape(2, 1, 8, 8))
    expected = torch.tensor(json.loads(path.with_suffix(".json").read_text())["logits"])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_there_is_a_file_of_every_version() -> None:
    from nncx._files import FORMAT_VERSIONS

    assert {f"model-format-{version}" for version in FORMAT_VERSIONS} <= {p.stem for p in FILES}
