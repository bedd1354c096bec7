"""`nncx doctor`: what runs here, and whether it runs right.

Versions, the CPU path and why it is that one, the CUDA build, the backend of each op by torch's
dispatcher, and a self-test of each op on every path. Bad news comes with what mends it.
"""

import os
import platform
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from nncx import _machine
from nncx._native import _C, MEND
from nncx._version import __version__
from nncx.commands import _self_test

PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True)
class Op:
    """An op of torch.ops.nncx.

    Attributes:
        cpu, cuda: which backend runs there, a path of the CPU and the code for this GPU; None where
            there is none.
        self_test: for each place ("scalar", ..., "cuda") None, or what was wrong there.
    """

    name: str
    cpu: str | None
    cuda: str | None
    self_test: dict[str, str | None]


@dataclass(frozen=True)
class Diagnosis:
    """What `examine` found.

    Attributes:
        facts: versions and choices, by name.
        notes: what works, but could be better.
        problems: what is wrong. Both are sentences that end in what mends it.
        seconds: how long the self-tests took.
    """

    facts: dict[str, str]
    ops: tuple[Op, ...]
    notes: tuple[str, ...]
    problems: tuple[str, ...]
    seconds: float


def examine() -> Diagnosis:
    """Look at the build and the machine, and run every self-test; takes seconds."""
    start = time.monotonic()
    results = _self_test.run()
    seconds = time.monotonic() - start
    on_cpu, on_cuda = (set(_self_test.registered_ops(key)) for key in ("CPU", "CUDA"))
    code = _code_of_this_gpu() if torch.cuda.is_available() else None
    ops = tuple(
        Op(
            name=name,
            cpu=_C.isa() if name in on_cpu else None,
            cuda=code if name in on_cuda else None,
            self_test=self_test,
        )
        for name, self_test in results.items()
    )
    problems = (*_build_problems(), *(line for op in ops for line in _op_problems(op)))
    return Diagnosis(_facts(), ops, tuple(_notes()), problems, seconds)


def _facts() -> dict[str, str]:
    return {
        "nncx": f"{__version__}, in {PACKAGE}",
        "torch": torch.__version__,
        "Python": f"{platform.python_version()}, {platform.platform()}",
        "compiler": _C.compiler,
        "CPU": _machine.cpu_name(),
        "features": " ".join(_machine.cpu_features()) or "unknown",
        "threads": str(torch.get_num_threads()),
        "paths built": ", ".join(_C.built_isas()),
        "paths of this CPU": ", ".join(_C.supported_isas()),
        "active path": f"{_C.isa()}, {_why_path()}",
        "CUDA build": _cuda_build(),
        "GPU": _gpu(),
    }


def _why_path() -> str:
    if os.environ.get("NNCX_ISA"):
        return "because NNCX_ISA says so"
    if _C.built_isas() == ["scalar"]:
        return f"the only one for {platform.machine()}"
    return "the best of what was built and what this CPU has"


def _cuda_build() -> str:
    if not _C.cuda_architectures:
        return "none"
    return f"nvcc {_C.cuda_compiler} for {' '.join(_C.cuda_architectures)}"


def _gpu() -> str:
    if torch.version.cuda is None:
        return "none: this torch has no CUDA"
    if not torch.cuda.is_available():
        return f"none that torch {torch.__version__} (CUDA {torch.version.cuda}) can use"
    major, minor = torch.cuda.get_device_capability()
    name = f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}"
    if not _C.cuda_architectures:
        return name
    return f"{name}, runs {_code_of_this_gpu() or 'none of what was built'}"


def _code_of_this_gpu() -> str | None:
    return gpu_code(torch.cuda.get_device_capability(), _C.cuda_architectures)


def gpu_code(capability: tuple[int, int], architectures: Sequence[str]) -> str | None:
    """Which of the compiled architectures, such as "sm_80" or "compute_75", a GPU runs.

    Machine code (sm_...) runs on GPUs of its generation that are not older, with an "a" on its own
    only; anything else the driver compiles from compute_..., if that is not newer.
    """
    machine, intermediate = {}, {}
    for name in architectures:
        kind, number, feature = re.fullmatch(r"(sm|compute)_(\d+)([af]?)", name).groups()
        target = divmod(int(number), 10)
        generation = target == capability if feature == "a" else target[0] == capability[0]
        if target <= capability and (generation or (kind == "compute" and not feature)):
            (machine if kind == "sm" else intermediate)[name] = (target, feature)
    found = machine or intermediate
    return max(found, key=found.get, default=None)


def _notes() -> list[str]:
    notes = []
    best = _C.supported_isas()[-1]
    if _C.isa() != best:
        notes.append(f"{best} is the faster path of this CPU: unset NNCX_ISA")
    if torch.cuda.is_available() and not _C.cuda_architectures:
        notes.append(
            "there is a GPU, but nncx was built without CUDA, so that its ops run on the CPU only: "
            f"put nvcc on PATH and {MEND}, with NNCX_CUDA=1"
        )
    elif torch.cuda.is_available() and (_code_of_this_gpu() or "").startswith("compute_"):
        notes.append(
            f"code compiled for this GPU is faster than {_code_of_this_gpu()}: {_mend_gpu()}"
        )
    return notes


def _build_problems() -> list[str]:
    problems = []
    if _C.version != __version__:
        problems.append(
            f"the native library is of nncx {_C.version}, the Python code of {__version__}: {MEND}"
        )
    if _library_folder() != PACKAGE:  # as an editable install of another checkout can have it
        problems.append(
            f"the Python code is in {PACKAGE}, the native library in {_library_folder()}: {MEND}"
        )
    if torch.cuda.is_available() and _C.cuda_architectures and _code_of_this_gpu() is None:
        built = " ".join(_C.cuda_architectures)
        problems.append(f"nncx was built for {built}, of which this GPU runs none: {_mend_gpu()}")
    return problems


def _library_folder() -> Path:
    return Path(_C.__file__).parent


def _op_problems(op: Op) -> list[str]:
    problems = []
    if op.cpu is None:
        problems.append(f"{op.name} has no kernel for the CPU: {MEND}")
    if not op.self_test:
        problems.append(f"{op.name} has no self-test: add one in nncx/commands/_self_test.py")
    for place, fault in op.self_test.items():
        told = place == "cuda" and op.cuda is None  # that there is no code for this GPU
        if fault is not None and not told:
            problems.append(f"{op.name} on {place}: {fault}; {_mend(op, place)}")
    return problems


def _mend(op: Op, place: str) -> str:
    if place == "cuda":
        return _mend_gpu()
    sound = [path for path in _C.supported_isas() if op.self_test.get(path, "") is None]
    return f"{MEND}" + (f"; until then, set NNCX_ISA={sound[-1]}" if sound else "")


def _mend_gpu() -> str:
    major, minor = torch.cuda.get_device_capability()
    return f"{MEND}, with TORCH_CUDA_ARCH_LIST={major}.{minor}"


def show(diagnosis: Diagnosis, console: Console) -> None:
    """Print it: facts, ops, notes, problems."""
    facts = Table.grid(padding=(0, 2))
    for name, value in diagnosis.facts.items():
        facts.add_row(f"[bold]{escape(name)}", escape(value))
    console.print(facts)
    console.print()

    ops = Table("op", "cpu", "cuda", "self-test", box=None, header_style="bold")
    for op in diagnosis.ops:
        tests = (f"{place} {_verdict(fault)}" for place, fault in op.self_test.items())
        ops.add_row(op.name, op.cpu or "-", op.cuda or "-", ", ".join(tests) or "[red]none")
    console.print(ops)
    console.print(f"\nself-tests took {diagnosis.seconds:.1f} s")
    for note in diagnosis.notes:
        console.print(f"[yellow]note[/yellow] {escape(note)}")
    for problem in diagnosis.problems:
        console.print(f"[red]wrong[/red] {escape(problem)}")
    if not diagnosis.problems:
        console.print("[green]all ops give what their references give[/green]")


def _verdict(fault: str | None) -> str:
    return "[green]ok[/green]" if fault is None else "[red]wrong[/red]"
