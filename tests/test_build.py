"""What the build promises: libraries that load, say what they are and carry no trace of the machine
that made them."""

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import nncx
from nncx import _C
from nncx.commands._self_test import registered_ops

PACKAGE = Path(nncx.__file__).parent
MODULE = Path(_C.__file__)
CUDA_LIBRARY = PACKAGE / "_cuda.so"
ROOT = Path(__file__).parents[1]


def run(code: str, path: Path = PACKAGE.parent, **environment: str) -> subprocess.CompletedProcess:
    """Runs `code` in a new interpreter that finds nncx in `path`, and nowhere else: without -S an
    editable install would offer its own."""
    paths = os.pathsep.join([str(path), *filter(None, sys.path)])
    return subprocess.run(
        [sys.executable, "-S", "-c", code],
        env=os.environ | {"PYTHONPATH": paths} | environment,
        cwd=path,
        capture_output=True,
        text=True,
    )


def last_line(text: str) -> str:
    return text.strip().splitlines()[-1]


def test_versions_agree():
    assert _C.version == nncx.__version__


def test_metadata():
    try:
        metadata = importlib.metadata.metadata("nncx")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("nncx is imported from a folder, not installed")
    assert metadata["Version"] == nncx.__version__
    assert metadata["License-Expression"] == "MIT"
    assert any(re.match(r"torch>=2\.10$", name) for name in metadata.get_all("Requires-Dist"))
    (command,) = importlib.metadata.entry_points(group="console_scripts", name="nncx")
    assert command.value == "_nncx_command:main"


def test_paths():
    assert "scalar" in _C.built_isas()
    if platform.machine() == "x86_64":
        assert {"avx2", "avx512"} <= set(_C.built_isas())
    assert set(_C.supported_isas()) <= set(_C.built_isas())
    assert _C.isa() in _C.supported_isas()


@pytest.mark.parametrize("isa", _C.supported_isas())
def test_path_is_forced_by_environment(isa: str):
    assert run("import nncx; print(nncx._C.isa())", NNCX_ISA=isa).stdout.strip() == isa


def test_unknown_path_is_refused():
    process = run("import nncx", NNCX_ISA="mmx")
    assert process.returncode != 0
    assert re.search(
        r"NNCX_ISA must be a path .* \(scalar.*\), got 'mmx'", last_line(process.stderr)
    )


def test_import_is_light():
    heavy = ("torchvision", "matplotlib", "sklearn", "pandas", "PIL", "typer", "rich")
    process = run(f"import nncx, sys; print(*[name for name in {heavy} if name in sys.modules])")
    assert process.returncode == 0, process.stderr
    assert process.stdout.strip() == ""


@pytest.mark.parametrize("content", [None, b"no library"], ids=["missing", "broken"])
def test_unusable_library_is_one_sentence(tmp_path: Path, content: bytes | None):
    shutil.copytree(PACKAGE, tmp_path / "nncx", ignore=shutil.ignore_patterns("*.so"))
    if content is not None:
        (tmp_path / "nncx" / MODULE.name).write_bytes(content)
    process = run("import nncx", path=tmp_path)
    assert process.returncode != 0
    assert re.match(
        r"ImportError: nncx's native library cannot be loaded \(.+\); .*pip install",
        last_line(process.stderr),
    )


@pytest.mark.parametrize("library", [MODULE, CUDA_LIBRARY], ids=lambda path: path.name)
def test_no_build_paths(library: Path):
    if not library.exists():
        pytest.skip("built without CUDA")
    content = library.read_bytes()
    sources = re.findall(rb"(?<![\w.+/-])/[\w.+/-]+\.(?:h|hpp|cuh|c|cpp|cu)\b", content)
    assert sources == []
    assert b"site-packages" not in content
    assert bytes(PACKAGE.parent) not in content


def test_cuda_facts_agree():
    built = bool(_C.cuda_architectures)
    assert built == bool(_C.cuda_compiler) == CUDA_LIBRARY.exists()
    assert all(re.fullmatch(r"(sm|compute)_\d+[af]?", name) for name in _C.cuda_architectures)


def test_cuda_ops_are_registered_where_torch_has_cuda():
    if not _C.cuda_architectures:
        pytest.skip("built without CUDA")
    torchs = ("sign_int8", "hashed_weight", "hashed_bucket_sums")  # on a GPU
    native = [name for name in registered_ops() if name not in torchs]
    assert registered_ops("CUDA") == (native if torch.version.cuda is not None else [])


def test_lint_versions_agree():
    hooks = ROOT / ".pre-commit-config.yaml"
    if not hooks.exists():
        pytest.skip("not a checkout")
    pinned = set(
        re.findall(r'"((?:ruff|clang-format)==[^"]+)"', (ROOT / "pyproject.toml").read_text())
    )
    hooked = set(re.findall(r"\[((?:ruff|clang-format)==[^\]]+)\]", hooks.read_text()))
    assert hooked == pinned
