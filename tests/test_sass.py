"""What the compiled CUDA kernels consist of: the instructions that they are written for.

The machine code (SASS) of nncx/_cuda.so is read, which needs no GPU, but a disassembler: cuobjdump
and nvdisasm, of a CUDA toolkit or of the triton package.
"""

import functools
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from nncx import _C
from nncx._native import CUDA_LIBRARY

FUNCTION = re.compile(r"^\.text\.(\w+):$", re.MULTILINE)
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]+)", re.MULTILINE)


def _folders() -> Iterator[str]:
    yield from os.environ["PATH"].split(os.pathsep)
    if "CUDA_HOME" in os.environ:
        yield os.path.join(os.environ["CUDA_HOME"], "bin")
    yield "/usr/local/cuda/bin"
    triton = importlib.util.find_spec("triton")
    if triton and triton.origin:
        yield str(Path(triton.origin).parent / "backends" / "nvidia" / "bin")


@functools.cache
def _tool(name: str) -> str:
    found = (shutil.which(name, path=folder) for folder in _folders())
    return next(filter(None, found), None) or pytest.skip(
        f"no {name} in PATH, CUDA_HOME or the triton package"
    )


def _skip_unless_built_for(arch: str) -> None:
    if arch not in _C.cuda_architectures:
        pytest.skip(f"nncx is not built for {arch}")


@functools.cache
def _cubins(arch: str) -> list[bytes]:
    """The machine code of `arch`, one for each source file that has some."""
    _skip_unless_built_for(arch)
    with tempfile.TemporaryDirectory() as folder:
        command = [_tool("cuobjdump"), "-xelf", f".{arch}.", CUDA_LIBRARY]
        subprocess.run(command, cwd=folder, capture_output=True, check=True)
        return [path.read_bytes() for path in sorted(Path(folder).iterdir())]


@functools.cache
def _disassembled(cubin: bytes) -> dict[str, list[str]]:
    """The instructions of each kernel, in their order, by its mangled name."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_tool("nvdisasm"), "--print-code", "--no-dataflow", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    _, *parts = FUNCTION.split(text)
    return {
        name: INSTRUCTION.findall(code) for name, code in zip(parts[::2], parts[1::2], strict=True)
    }


def kernels(arch: str, *words: str) -> dict[str, list[str]]:
    """The instructions of the kernels, at least one, whose mangled names have all `words`."""
    found = {
        name: instructions
        for cubin in _cubins(arch)
        if all(word.encode() in cubin for word in words)
        for name, instructions in _disassembled(cubin).items()
        if all(word in name for word in words)
    }
    assert found, f"no kernel for {arch} is named {words}"
    return found


def assert_all_have(found: dict[str, list[str]], *patterns: str) -> None:
    for name, instructions in found.items():
        for pattern in patterns:
            assert any(re.match(pattern, i) for i in instructions), f"{name} has no {pattern}"


@pytest.mark.parametrize(
    ("arch", "words", "patterns"),
    [
        ("sm_80", ("gemm_sm80", "BinaryGemm"), (r"BMMA\.168256\.AND\.POPC", "LDGSTS", "LDSM")),
        ("sm_80", ("gemm_sm80", "Int8Gemm"), (r"IMMA\.16832\.S8\.S8", "LDGSTS", "LDSM")),
        ("sm_80", ("codebook_planes",), ("HMMA",)),
        ("sm_80", ("convolve_groups", "Half"), (r"HMMA\.16816\.F32", "LDSM")),
        ("sm_90a", ("convolve_groups", "BFloat16"), (r"HMMA\.16816\.F32\.BF16", "LDSM")),
        ("sm_90a", ("codebook_planes",), ("HMMA",)),
        ("sm_90a", ("gemm_sm90", "BinaryGemm"), (r"BGMMA\.64x\d+x256\.AND\.POPC", "UTMALDG")),
        ("sm_90a", ("gemm_sm90", "Int8Gemm"), (r"IGMMA\.64x\d+x32\.S8\.S8", "UTMALDG")),
    ],
)
def test_products_use_tensor_cores(arch: str, words: tuple[str], patterns: tuple[str]) -> None:
    assert_all_have(kernels(arch, *words), *patterns)


# Its sums take 128 registers, and what it needs once a tile lies in memory meanwhile.
KEEPS_A_WORD = "gemm_sm90INS0_8Int8GemmELi256E"
# Its sums, weights and input take 150, and where it reads next lies in memory for want of more: two
# loads of 16 for 350 multiplications. Without that a third of the threads would go.
KEEPS_A_PLACE = "convolve_stripsINS_4HalfELi5ELi1ELb1E"


@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_90a"])
def test_all_is_in_registers(arch: str) -> None:
    """What has a stack frame spills registers, or indexes an array when it runs."""
    _skip_unless_built_for(arch)
    command = [_tool("cuobjdump"), "-res-usage", "-arch", arch, CUDA_LIBRARY]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    frames = {
        name: int(size) for name, size in re.findall(r"Function (\w+):\s+REG:\d+ STACK:(\d+)", text)
    }
    assert len(frames) > 10
    most = {name: 16 * (KEEPS_A_PLACE in name or KEEPS_A_WORD in name) for name in frames}
    assert {name: size for name, size in frames.items() if size > most[name]} == {}


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_grouped_convolutions_copy_and_store_pieces(arch: str) -> None:
    """16 bytes at a time, the input and the weight past the registers."""
    found = kernels(arch, "convolve_groups", "Lb1E")
    assert_all_have(found, r"LDGSTS\.E\.BYPASS\.128", r"STG\.E\.128")


def test_main_loop_uses_no_memory() -> None:
    for instructions in kernels("sm_90a", KEEPS_A_WORD).values():
        products = [i for i, name in enumerate(instructions) if name.startswith("IGMMA")]
        loop = instructions[products[0] : products[-1]]
        assert not [name for name in loop if name.startswith(("LDL", "STL"))]


WIDE = (
    ("9pack_rows", "Li16E"),
    ("quantize_rows", "Li16E"),
    ("quantize_columns", "Lb1E"),
    ("4pool", "Li16E"),
    ("10interleave", "Li3E"),
    ("6gather", "Li16E"),
    ("skinny_gemm", "BinaryGemm"),
    ("skinny_gemm", "Int8Gemm"),
    ("codebook_planes",),
    ("codebook_values",),
    ("codebook_sums",),
)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("words", WIDE, ids="-".join)
def test_what_memory_bounds_reads_16_bytes_at_a_time(arch: str, words: tuple[str]) -> None:
    assert_all_have(kernels(arch, *words), r"LDG\.E\.128")
