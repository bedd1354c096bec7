"""One line that says on what a figure was measured."""

import platform

import torch

from nncx._native import _C


def describe() -> str:
    """CPU, threads, CPU path of nncx, versions: to stand beside every measured figure."""
    threads = torch.get_num_threads()
    return (
        f"{cpu_name()}, {threads} thread{'s' * (threads != 1)}, path {_C.isa()}, "
        f"torch {torch.__version__}, nncx {_C.version}"
    )


def cpu_features() -> list[str]:
    """The vector extensions of the CPU by the kernel's names; none where /proc does not tell."""
    flags = _cpuinfo("flags").split()  # of x86
    return [flag for flag in flags if flag.startswith(("avx", "amx", "f16c", "fma"))]


def cpu_name() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpuinfo(field: str) -> str:
    """What /proc/cpuinfo has for the first core, or nothing."""
    try:
        with open("/proc/cpuinfo") as info:
            for line in info:
                name, _, value = line.partition(":")
                if name.strip() == field:
                    return value.strip()
    except OSError:
        pass
    return ""
