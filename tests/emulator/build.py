"""Compiles the CUDA ops for the emulator, with nothing but g++: `python tests/emulator/build.py`.

The library registers every op of nncx as torch.ops.nncx_emulated.<op> for tensors of the CPU. What
is up to date is not compiled again.
"""

import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
EMULATOR = ROOT / "tests" / "emulator"
BUILD = ROOT / "build" / "emulator"
TORCH = Path(torch.__file__).parent

FLAGS = [
    *("-std=c++20", "-O2", "-g1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"),
    *("-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"),  # x86 would forgive
    *("-Wall", "-Wextra", "-Wno-psabi", "-Wno-unknown-pragmas"),
    *("-I", str(EMULATOR), "-I", str(ROOT / "csrc"), "-isystem", str(TORCH / "include")),
    *("-DNNCX_EMULATED", "-DNNCX_DEVICE_CUDA", "-DNNCX_NAMESPACE=nncx_emulated"),
    *("-DTORCH_TARGET_VERSION=0x020a000000000000", "-DUSE_CUDA"),
]
if os.uname().machine == "x86_64":
    FLAGS.append("-msse4.2")  # popcount


def compiler() -> str | None:
    """The C++ compiler, if there is one."""
    return shutil.which(os.environ.get("CXX", "g++"))


def sources() -> list[Path]:
    """What the library is made of; empty where nncx is installed without its sources."""
    patterns = ("csrc/torch/*.cpp", "csrc/cuda/*.cpp", "csrc/cuda/*.cu", "tests/emulator/*.cpp")
    return [path for pattern in patterns for path in sorted(ROOT.glob(pattern))]


def build(files: list[Path] | None = None, name: str = "nncx_emulated") -> Path:
    """Compiles and links `files` (default: all of the CUDA ops) and returns the library.

    Raises `RuntimeError` with the compiler's words.
    """
    files = sources() if files is None else files
    jobs = int(os.environ.get("MAX_JOBS") or len(os.sched_getaffinity(0)))
    BUILD.mkdir(parents=True, exist_ok=True)
    with _one_process_at_a_time(), ThreadPoolExecutor(jobs) as pool:
        objects = list(pool.map(_compile, files))
        libraries = [*map(str, objects), str(TORCH / "lib" / "libtorch_cpu.so")]
        command = [compiler(), "-shared", "-Wl,--no-undefined", *libraries]
        library = BUILD / f"lib{name}-{_tag(command)}.so"
        made = library.stat().st_mtime if library.exists() else 0
        if any(o.stat().st_mtime > made for o in objects):
            _run(*command, "-o", str(library))
    return library


def build_or_skip(files: list[Path] | None = None, name: str = "nncx_emulated") -> Path:
    """`build` for a test, which is skipped where there is nothing to build or to build with."""
    if compiler() is None:
        pytest.skip("no C++ compiler here for the emulator; set CXX")
    if not (ROOT / "csrc").is_dir():
        pytest.skip("nncx is installed without its sources, which the emulator runs")
    return build(files, name)


@contextmanager
def _one_process_at_a_time() -> Iterator[None]:
    """Tests may run in several; the first builds, the others wait and find it done."""
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _compile(source: Path) -> Path:
    command = [compiler(), *FLAGS, "-x", "c++", "-MMD", "-c", str(source)]
    output = BUILD / f"{source.stem}-{_tag(command)}.o"
    if not _up_to_date(output):
        output.unlink(missing_ok=True)
        start = time.time()
        _run(*command, "-o", str(output))
        os.utime(output, (start, start))  # a header may have changed meanwhile
    return output


def _tag(command: list[str]) -> str:
    """Tells outputs of different commands apart."""
    return hashlib.sha256(shlex.join(command).encode()).hexdigest()[:12]


def _up_to_date(output: Path) -> bool:
    rules = output.with_suffix(".d")
    if not (output.exists() and rules.exists()):
        return False
    needs = rules.read_text().replace("\\\n", "").partition(":")[2].split()
    built = output.stat().st_mtime
    return all(os.path.exists(path) and os.stat(path).st_mtime < built for path in needs)


def _run(*command: str) -> None:
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        raise RuntimeError(f"{shlex.join(command)}\n{process.stderr}")


if __name__ == "__main__":
    print(build())
