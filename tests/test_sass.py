"""What the compiled CUDA kernels consist of: the instructions they were written for.

The machine code (SASS) of nncx/_cuda.so is read, which needs no GPU, but a disassembler: cuobjdump
and nvdisasm, of a CUDA toolkit or of the triton package.
"""

import functools
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from nncx import _C
from nncx._native import CUDA_LIBRARY

INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]+)")


def _folders() -> Iterator[str]:
    yield from os.environ["PATH"].split(os.pathsep)
    for toolkit in (os.environ.get("CUDA_HOME"), "/usr/local/cuda"):
        if toolkit:
            yield os.path.join(toolkit, "bin")
    triton = importlib.util.find_spec("triton")
    if triton and triton.origin:
        yield str(Path(triton.origin).parent / "backends" / "nvidia" / "bin")


def _tools() -> str | None:
    """The first folder that has both: cuobjdump calls nvdisasm, which it finds beside itself."""
    have = (
        f for f in _folders() if all(shutil.which(n, path=f) for n in ("cuobjdump", "nvdisasm"))
    )
    return next(have, None)


@functools.cache
def kernels(arch: str) -> dict[str, frozenset[str]]:
    """The instructions of each kernel that was compiled for `arch`, by its mangled name."""
    if arch not in _C.cuda_architectures:
        pytest.skip(f"not built for {arch}")
    folder = _tools()
    if folder is None:
        pytest.skip("no cuobjdump with nvdisasm beside it, in PATH, CUDA_HOME or triton")
    command = [f"{folder}/cuobjdump", "-sass", "-arch", arch, CUDA_LIBRARY]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    functions = re.split(r"^\s+Function : (\S+)$", text, flags=re.M)[1:]
    return {
        name: frozenset(INSTRUCTION.findall(code))
        for name, code in zip(functions[::2], functions[1::2], strict=True)
    }
